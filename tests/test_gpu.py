"""The same Grams on a CUDA device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ntkengine.finetune import fine_tune
from ntkengine.forecast.lora import rehearse
from ntkengine.gram.engine import compute_gram
from ntkengine.gram.linear import tangent_factors
from tests.brute import KINDS, contracted, gradients, relative_error, tiny_inputs, tiny_model

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
