"""How far float32 and bfloat16 Grams are off, and what they say of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ntkengine.errors import CheckFailed, InputError
from ntkengine.gram import finer
from ntkengine.gram.engine import compute_gram
from tests.brute import contracted, gradients, relative_error, tiny_inputs, tiny_model, with_lora

LENGTHS = [11, 3, 5, 7, 2, 9, 5]


def test_noise_covers_the_true_error():
    model = tiny_model("bert")
    inputs = tiny_inputs(model, [2 + i % 9 for i in range(40)], 12)
    exact = compute_gram(model, inputs, params="all", precision="exact")
    high = compute_gram(model, inputs, params="all", precision="high")
    true = np.linalg.norm(np.asarray(high.values) - exact.values, 2)
    assert true < high.noise < 7 * true
    assert exact.noise < 1e-9 * high.noise * 1e3


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("contraction", ["trace", "full", "per-output"])
def test_fast_is_as_far_off_as_it_says(kind, contraction):
    model = tiny_model(kind)
    inputs = tiny_inputs(model, [3, 9, 12, 5, 7, 1, 8, 10, 2, 6, 4, 11] * 2, 12)
    exact = compute_gram(model, inputs, params="all", contraction=contraction, precision="exact")
    fast = compute_gram(model, inputs, params="all", contraction=contraction, precision="fast")
    error = np.asarray(fast.values) - np.asarray(exact.values)
    true = max(np.linalg.norm(layer, 2) for layer in (error if error.ndim == 3 else error[None]))
    assert true < fast.noise < 7 * true
    assert 1e-4 < max(relative_error(fast.values, exact.values)) < 5e-2
    assert next(model.parameters()).dtype == torch.float32


def test_fast_under_transforms_and_adapters():
    model = with_lora(tiny_model("bert"), ["query", "value"], away_from_start=True)
    inputs = tiny_inputs(model, LENGTHS, 12)
    for transform in ("sgd", "sign", "asymmetric-sign"):
        exact = compute_gram(model, inputs, transform=transform, precision="exact")
        fast = compute_gram(model, inputs, transform=transform, precision="fast")
        assert max(relative_error(fast.values, exact.values)) < 5e-2


def test_a_model_that_bfloat16_is_too_coarse_for_is_refused_with_the_reason():
    model = tiny_model("bert")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and "embeddings" not in name:
                p.mul_(40.0)
    inputs = tiny_inputs(model, LENGTHS, 12)
    with pytest.raises(CheckFailed, match=r"; bfloat16 may be too coarse for this model: precision='high'$"):
        compute_gram(model, inputs, params="all", precision="fast")


@pytest.mark.parametrize("precision", ["high", "exact"])
@pytest.mark.parametrize("how", ["@", "linear", "einsum"])
def test_a_readout_has_weights_of_its_own_precision(precision, how):
    model = tiny_model("bert")
    inputs = tiny_inputs(model, [5, 7, 4, 6], 7)
    torch.manual_seed(1)
    own = torch.nn.Linear(3, 2, bias=False)  # float32

    def readout(outputs, _inputs):
        if how == "linear":
            return own(outputs.logits)
        return outputs.logits @ own.weight.T if how == "@" else torch.einsum("nc,kc->nk", outputs.logits, own.weight)

    gram = compute_gram(model, inputs, params="all", readout=readout, precision=precision)
    W = own.weight.detach().double()
    names = [name for name, _ in model.named_parameters()]
    J = gradients(model, inputs, names, lambda outputs, _: outputs.logits @ W.T)
    assert max(relative_error(gram.values, contracted(J, J, "trace"))) < {"high": 1e-5, "exact": 1e-13}[precision]
    assert np.isfinite(gram.noise)


def test_what_writes_in_place_is_not_promoted():
    def readout(outputs, _inputs):
        held = torch.zeros(len(outputs.logits), 2)
        return held.addmm_(outputs.logits.double(), torch.ones(3, 2).double())

    model = tiny_model("bert")
    with pytest.raises(InputError, match="cannot be run on example"):
        compute_gram(model, tiny_inputs(model, [5, 7], 7), params="all", readout=readout)


def test_float64_settles_what_float32_refuses_in_a_bounded_job(monkeypatch):
    model = tiny_model("bert")
    inputs = tiny_inputs(model, [5, 3, 6, 4], 7)
    right = compute_gram(model, inputs, params="all", memory_gib=0.2)
    swept, seen = finer._swept, []

    def coarse(task, *given, **more):
        seen.append(task.dtype)
        if task.dtype == torch.float32:
            raise CheckFailed("rounding")
        return swept(task, *given, **more)

    monkeypatch.setattr(finer, "_swept", coarse)
    gram = compute_gram(model, inputs, params="all", memory_gib=0.2)
    assert seen == [torch.float32, torch.float64]
    np.testing.assert_array_equal(gram.values, right.values)

    def unusable(task, *given, **more):
        if task.dtype == torch.float64:
            raise TypeError("no float64")
        return coarse(task, *given, **more)

    monkeypatch.setattr(finer, "_swept", unusable)
    with pytest.raises(CheckFailed, match="rounding"):
        compute_gram(model, inputs, params="all", memory_gib=0.2)
