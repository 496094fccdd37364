"""The engine against brute force: architectures, adapters, contractions, readouts, parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ntkengine.gram.engine import compute_gram
from tests.brute import KINDS, TwoLinears, contracted, gradients, relative_error, tiny_inputs, tiny_model, with_lora

LENGTHS = [11, 3, 5, 7, 2, 9, 5]


EVAL_LENGTHS = [4, 13, 6, 8]


TOLERANCE = {"exact": 1e-9, "high": 1e-5}


CONTRACTIONS = ("trace", "full", "per-output", "sum-of-outputs")


LORA_TARGETS = {
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "v_proj"],
}


def summed(out, _inputs):
    return out.logits.sum(1, keepdim=True)


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    model = tiny_model(request.param)
    inputs, eval_inputs = tiny_inputs(model, LENGTHS, 12), tiny_inputs(model, EVAL_LENGTHS, 15, seed=1)
    names = {name for name, _ in model.named_parameters()}
    truth = {None: (gradients(model, inputs, names), gradients(model, eval_inputs, names))}
    # Some models round to float32 inside: the gradient of a sum is compared with the gradient of that sum.
    truth["sum"] = gradients(model, inputs, names, summed), gradients(model, eval_inputs, names, summed)
    return model, inputs, eval_inputs, truth


@pytest.mark.parametrize("precision", ["exact", "high"])
@pytest.mark.parametrize("contraction", CONTRACTIONS)
def test_all_parameters_equal_brute_force(case, contraction, precision):
    model, inputs, eval_inputs, truth = case
    G, H = truth["sum" if contraction == "sum-of-outputs" else None]
    gram = compute_gram(
        model, inputs, eval_inputs=eval_inputs, params="all", contraction=contraction, precision=precision
    )
    assert max(relative_error(gram.values, contracted(G, G, contraction))) < TOLERANCE[precision]
    assert max(relative_error(gram.cross, contracted(H, G, contraction))) < TOLERANCE[precision]
    two = compute_gram(model, eval_inputs, inputs, params="all", contraction=contraction, precision=precision)
    assert max(relative_error(two.values, contracted(H, G, contraction))) < TOLERANCE[precision]
    assert not gram.meta["unused_parameters"]
    assert gram.plan.blocks == 3


@pytest.mark.parametrize("away", [False, True], ids=["start", "away"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["exact", "high"])
def test_lora_equals_brute_force(kind, away, precision):
    model = with_lora(tiny_model(kind), LORA_TARGETS[kind], away_from_start=away)
    inputs, eval_inputs = tiny_inputs(model, LENGTHS, 12), tiny_inputs(model, EVAL_LENGTHS, 15, seed=1)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in names)
    G, H = gradients(model, inputs, names), gradients(model, eval_inputs, names)
    for contraction in CONTRACTIONS[:3]:
        gram = compute_gram(model, inputs, eval_inputs=eval_inputs, contraction=contraction, precision=precision)
        assert max(relative_error(gram.values, contracted(G, G, contraction))) < TOLERANCE[precision]
        assert max(relative_error(gram.cross, contracted(H, G, contraction))) < TOLERANCE[precision]


def test_per_module_grams_sum_to_the_whole_and_each_is_right():
    model = tiny_model("bert")
    inputs = tiny_inputs(model, LENGTHS, 12)
    gram = compute_gram(model, inputs, params="all", precision="exact", per_module=True)
    assert np.abs(sum(gram.modules.values()) - gram.values).max() < 1e-12 * np.abs(gram.values).max()
    for module in ("bert.encoder.layer.1.attention.self.query", "bert.embeddings.word_embeddings", "classifier"):
        names = {f"{module}.{local}" for local in ("weight", "bias")}
        G = gradients(model, inputs, names)
        assert max(relative_error(gram.modules[module], contracted(G, G, "trace"))) < 1e-9
        assert gram.meta["module_trace"][module] == pytest.approx(np.trace(gram.modules[module]), rel=1e-9)


def test_readouts():
    model = tiny_model("bert", num_labels=2)
    inputs = tiny_inputs(model, LENGTHS, 12) | {"labels": torch.tensor([0, 1, 1, 0, 1, 0, 0])}
    names = {name for name, _ in model.named_parameters()}
    functions = {
        "margin": lambda out, _: out.logits[:, 1:] - out.logits[:, :1],
        "loss": lambda out, one: torch.nn.functional.cross_entropy(out.logits, one["labels"], reduction="none")[
            :, None
        ],
    }
    for name, function in functions.items():
        G = gradients(model, inputs, names, function)
        for readout in (name, function):
            gram = compute_gram(model, inputs, params="all", precision="exact", readout=readout)
            assert max(relative_error(gram.values, contracted(G, G, "trace"))) < 1e-9
            assert gram.outputs.shape == (7, 1)


@pytest.mark.parametrize("form", [lambda f: {"logits": f}, lambda f: (f, f.sum()), lambda f: f])
def test_the_logits_of_any_output(form):
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    forms = (lambda f: f, form)
    plain, formed = (TwoLinears(lambda m, x, g=g: g(m.two(torch.tanh(m.one(x))))) for g in forms)
    grams = [compute_gram(m, {"x": x}, params="all", precision="exact", readout="margin") for m in (plain, formed)]
    assert np.array_equal(grams[0].values, grams[1].values)


def test_params_by_glob_and_list():
    model = tiny_model("bert")
    inputs = tiny_inputs(model, LENGTHS, 12)
    names = {name for name, _ in model.named_parameters() if ".layer.1." in name}
    G = gradients(model, inputs, names)
    truth = contracted(G, G, "trace")
    for params in ("*.layer.1.*", sorted(names)):
        assert max(relative_error(compute_gram(model, inputs, params=params, precision="exact").values, truth)) < 1e-9


def test_one_sample_and_long_tail():
    model = tiny_model("llama")
    inputs = tiny_inputs(model, [5], 5)
    names = {name for name, _ in model.named_parameters()}
    G = gradients(model, inputs, names)
    gram = compute_gram(model, inputs, params="all", precision="exact")
    assert max(relative_error(gram.values, contracted(G, G, "trace"))) < 1e-9
