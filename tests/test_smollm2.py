"""Prompt-based classification by a real decoder: `--slow`, fetches SmolLM2-135M (93 MB)."""

from __future__ import annotations

import pytest
from sklearn.metrics import roc_auc_score

import ntkengine as ntk
from ntkengine import assets


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_kernel_regression_on_64_snippets_beats_zero_shot():
    pytest.importorskip("gguf", reason="gguf is not installed")
    model = ntk.load_model(
        assets.fetch_smollm2(), task="causal-lm", peft={"peft_type": "LORA", "r": 8, "target_modules": "q_proj,v_proj"}
    )
    train, held = assets.movie_snippets(assets.fetch_demo().snippets, 64, 200, seed=0)
    inputs, eval_inputs = (ntk.tokenize([f"{text} It was" for text in part.texts], model) for part in (train, held))
    words = ntk.LabelWords.of([" terrible", " great"], model.ntk_tokenizer, margin=True)
    gram = ntk.compute_gram(model, inputs, eval_inputs=eval_inputs, readout=words)
    krr = ntk.KernelRidge(ridge="loo").fit(gram, 2.0 * train.labels[:, None] - 1, offset=gram.outputs)
    zero, tuned = gram.eval_outputs[:, 0], krr.predict(gram.cross, offset=gram.eval_outputs)[:, 0]
    accuracy = [float(((f > 0) == held.labels).mean()) for f in (zero, tuned)]
    auc = [float(roc_auc_score(held.labels, f)) for f in (zero, tuned)]
    print(f"held-out accuracy {accuracy[0]:.3f} -> {accuracy[1]:.3f}, AUC {auc[0]:.3f} -> {auc[1]:.3f}")
    assert gram.meta["noise_relative"] < 1e-5
    assert accuracy[1] > accuracy[0] + 0.05
    assert auc[1] > auc[0]
