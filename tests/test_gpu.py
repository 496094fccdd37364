"""The same Grams on a CUDA device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ntkengine.finetune import fine_tune
from ntkengine.forecast.crossfit import cross_fit
from ntkengine.forecast.lora import rehearse
from ntkengine.gram.engine import compute_gram
from ntkengine.gram.features import tangent_features
from ntkengine.gram.jacobian import TangentProducts
from ntkengine.gram.linear import tangent_factors
from ntkengine.inputs import streaming
from ntkengine.inputs.fingerprint import fingerprint_model
from ntkengine.inputs.heads import fit_head
from ntkengine.inputs.models import load_model
from ntkengine.inputs.weights import Entry
from tests.brute import KINDS, contracted, gradients, relative_error, tiny_inputs, tiny_model, with_lora
from tests.test_layout import LAYOUTS, forced

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(("precision", "tolerance"), [("exact", 1e-9), ("high", 1e-5)])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_brute_force_on_the_device(kind, precision, tolerance):
    model = tiny_model(kind)
    inputs, eval_inputs = tiny_inputs(model, [11, 3, 5, 7, 2], 12), tiny_inputs(model, [4, 13], 15, seed=1)
    names = {name for name, _ in model.named_parameters()}
    G, H = gradients(model, inputs, names), gradients(model, eval_inputs, names)
    model.cuda()
    for contraction in ("trace", "full", "per-output"):
        gram = compute_gram(
            model, inputs, eval_inputs=eval_inputs, params="all", contraction=contraction, precision=precision
        )
        assert max(relative_error(gram.values, contracted(G, G, contraction))) < tolerance
        assert max(relative_error(gram.cross, contracted(H, G, contraction))) < tolerance


def test_rehearsals_and_training_equal_those_of_the_cpu():
    inputs, held = (tiny_inputs(tiny_model("bert"), lengths, 12) for lengths in ([11, 3, 5, 7], [4, 9]))
    y, y_held = np.eye(3)[[0, 1, 2, 0]], np.eye(3)[[1, 2]]
    recipe = {"learning_rate": 0.05, "epochs": 3, "batch_size": 2}
    found = []
    for device in ("cpu", "cuda"):
        model = tiny_model("bert").to(device)
        factors = tangent_factors(model, inputs, held, params="*query.weight")
        told = rehearse(factors, y, recipe, rank=2, eval_targets=y_held)
        run = fine_tune(
            model, inputs, y, recipe, params="*query.weight", eval_inputs=held, eval_targets=y_held, linear=True
        )
        found.append((told.train_losses[0], told.eval_losses[0], run.outputs, run.eval_outputs))
    for cpu, gpu in zip(*found, strict=True):
        np.testing.assert_allclose(gpu, cpu, rtol=1e-3, atol=1e-4)


VARIANTS = {
    "sign": {"transform": "sign", "precision": "exact"},
    "sketch": {"sketch": 16},
    "fast": {"precision": "fast"},
    "by module": {"per_module": True},
    "sum of outputs": {"contraction": "sum-of-outputs"},
    "sums in tiles": {},
    "hidden states on the host": {},
    "hidden states on the disk": {},
    "lora": {"params": "trainable"},
    "loss": {"readout": "loss"},
}


@pytest.mark.parametrize("case", VARIANTS)
def test_every_way_to_sum_gives_what_it_gives_on_the_cpu(case, tmp_path, monkeypatch):
    settings = {"params": "all", **VARIANTS[case]}
    if case.split()[-1] in LAYOUTS:
        forced(monkeypatch, LAYOUTS[case.split()[-1]])
    found = []
    for device in ("cpu", "cuda"):
        model = tiny_model("bert")
        inputs, held = tiny_inputs(model, [11, 3, 5, 7, 2, 9], 12), tiny_inputs(model, [4, 9], 10, seed=1)
        if case == "lora":
            model = with_lora(model, ["query"], away_from_start=True)
        if case == "loss":
            inputs, held = (given | {"labels": torch.arange(len(given["input_ids"])) % 3} for given in (inputs, held))
        out = {"out": tmp_path / f"{device}.h5", "checkpoint_s": 0.0} if case == "by module" else {}
        gram = compute_gram(model.to(device), inputs, eval_inputs=held, **settings, **out)
        parts = [np.asarray(part[...]) for part in gram.modules.values()]
        found.append([np.asarray(gram), np.asarray(gram.cross[...]), gram.outputs, *parts])
    tolerance = 3e-2 if case == "fast" else 1e-4
    for cpu, gpu in zip(*found, strict=True):
        assert np.isfinite(gpu).all()
        np.testing.assert_allclose(gpu, cpu, rtol=0, atol=tolerance * max(np.abs(cpu).max(), 1e-30))


def test_heads_features_and_products_equal_those_of_the_cpu():
    found = []
    y = -np.ones((8, 1))
    y[::2] = 1.0
    for device in ("cpu", "cuda"):
        model = tiny_model("bert", num_labels=1)
        inputs = tiny_inputs(model, [11, 3, 5, 7, 2, 9, 6, 4], 12)
        model = model.to(device)
        head = fit_head(model, inputs, y, folds=2)
        held = cross_fit(model, inputs, head, params="*query.weight")
        features = tangent_features(model, inputs, params="*query.weight")
        products = TangentProducts(model, inputs, params="*query.weight", precision="high")
        z = np.random.default_rng(0).standard_normal((8, 2))
        found.append(
            [head.held_out, head.fitted, np.asarray(held.grams), np.asarray(held.outputs), features, products(z)]
        )
    for cpu, gpu in zip(*found, strict=True):
        np.testing.assert_allclose(gpu, cpu, rtol=0, atol=1e-4 * np.abs(cpu).max())


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_streamed_weights_give_what_loaded_ones_give(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "STREAMED", 256)
    ahead = []
    monkeypatch.setattr(
        Entry, "read_to", lambda self, buffer, read=Entry.read_to: ahead.append(1) or read(self, buffer)
    )
    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    inputs = tiny_inputs(model, [11, 3, 5, 7, 2, 9], 12)
    names = {name for name, _ in model.named_parameters()}
    wanted = contracted(*[gradients(model, inputs, names)] * 2, "trace")
    for precision, tolerance in (("exact", 1e-9), ("high", 1e-5)):
        streamed = load_model(tmp_path, num_labels=3, stream=True, device="cuda")
        gram = compute_gram(streamed, inputs, params="all", precision=precision)
        assert max(relative_error(gram.values, wanted)) < tolerance
    assert ahead  # a block's weights came while another worked


def test_a_fingerprint_is_the_same_on_the_device():
    model = tiny_model("bert")
    before = fingerprint_model(model)
    assert fingerprint_model(model.cuda()) == before
