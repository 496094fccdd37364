"""The same Grams on a CUDA device."""

from __future__ import annotations

import pytest
import torch

from ntkengine.gram.engine import compute_gram
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
