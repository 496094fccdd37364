"""Targets of two classes on one output: ±1, whose sign is the class; 0 and 1 are refused wherever they can go."""

from __future__ import annotations

import numpy as np
import pytest

import ntkengine as ntk
from ntkengine.errors import InputError
from ntkengine.losses import as_targets
from tests.brute import tiny_inputs, tiny_model

BITS = np.array([0.0, 1.0, 1.0, 0.0])
KERNEL = np.eye(4) + 0.5


@pytest.fixture(scope="module")
def model():
    return tiny_model("bert", num_labels=2)


def test_zero_and_one_are_no_targets_of_a_margin(model):
    inputs = tiny_inputs(model, [3, 4, 5, 2], 5)
    recipe = {"learning_rate": 1e-3}
    for call in (
        lambda: ntk.forecast(KERNEL, BITS),
        lambda: ntk.simulate([KERNEL], BITS, {"optimizer": "sgd", **recipe}, offset=np.zeros((4, 1))),
        lambda: ntk.compute_gram(model, inputs, readout="margin", targets=BITS[:, None]),
        lambda: ntk.fine_tune(model, inputs, BITS, recipe, readout="margin"),
    ):
        with pytest.raises(InputError, match=r"^targets: expected -1 and \+1 .* got 0 and 1; 2"):
            call()
    signs = 2 * BITS - 1
    with pytest.raises(InputError, match="^eval_targets: expected -1"):
        ntk.compute_gram(model, inputs, eval_inputs=inputs, readout="margin", targets=signs[:, None], eval_targets=BITS)


def test_a_ridge_of_a_margins_gram_wants_signs(model):
    gram = ntk.compute_gram(model, tiny_inputs(model, [3, 4, 5, 2], 5), readout="margin")
    with pytest.raises(InputError, match=r"^y: expected -1 and \+1"):
        ntk.KernelRidge(1.0).fit(gram, BITS)
    assert ntk.KernelRidge(1.0).fit(gram, 2 * BITS - 1).ridge_ == 1.0
    assert ntk.KernelRidge(1.0).fit(KERNEL, BITS).ridge_ == 1.0  # of what, nobody knows


def test_other_zeros_and_ones_are_targets():
    assert as_targets("targets", BITS, "cross-entropy", 4, 1).tolist() == [0, 1, 1, 0]
    assert as_targets("targets", np.eye(4)[:, :2], "squared", 4, 2).shape == (4, 2)  # one column a class
    assert as_targets("targets", np.zeros(4), "squared", 4, 1).shape == (4, 1)
    assert ntk.forecast(KERNEL, [0.0, 1.0, 0.5, 2.0]).loo_accuracy is None
