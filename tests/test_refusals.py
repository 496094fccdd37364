"""What the engine refuses: wrong arguments, wrong inputs, gradients that are wrong or not finite."""

from __future__ import annotations

from types import MethodType

import numpy as np
import pytest
import torch

from ntkengine.errors import CheckFailed, InputError, NonFinite
from ntkengine.gram import run
from ntkengine.gram.engine import compute_gram
from tests.brute import tiny_inputs, tiny_model

LENGTHS = [11, 3, 5, 7, 2, 9, 5]


def test_check_stops_a_wrong_sweep(monkeypatch):
    model = tiny_model("bert")
    inputs = tiny_inputs(model, LENGTHS, 12)
    right = run.contract

    def wrong(factors, strategy, total, root):
        if factors.name.endswith("layer.1.output.dense.weight"):
            for uses in factors.chunks:
                for use in uses:
                    use.d = use.d * 1.01
        right(factors, strategy, total, root)

    monkeypatch.setattr(run, "contract", wrong)
    with pytest.raises(
        CheckFailed,
        match=r"layer\.1\.output\.dense\.weight \(of Linear\): differs from plain autograd by .* between examples",
    ):
        compute_gram(model, inputs, params="all")


def test_a_module_that_is_off_by_less_than_float32_tells_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    linear = torch.nn.functional.linear
    model[2].forward = MethodType(lambda self, x: linear(x, self.weight, self.bias) * (1 + 4e-5), model[2])
    inputs = {"x": torch.randn(9, 6, generator=torch.Generator().manual_seed(0))}
    with pytest.raises(CheckFailed, match=r"2\.weight \(of Linear\): differs from plain autograd by 8\.0e-05"):
        compute_gram(model, inputs, params="all", readout=lambda out, _: out)


def test_non_finite_gradient_names_module_and_example():
    class Root(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)

        def forward(self, x):
            return self.last(torch.sqrt(self.first(x) * 0 + x))

    x = torch.rand(20, 2) + 0.5
    x[11] = 0.0  # √ has an infinite slope at 0
    with pytest.raises(NonFinite, match=r"first\.(weight|bias).* example 11"):
        compute_gram(Root(), {"x": x}, params="all", readout=lambda out, _: out)


def test_non_finite_output_names_the_example():
    model = tiny_model("bert")
    inputs = tiny_inputs(model, LENGTHS, 12)

    def bad(out, one):
        return out.logits / (one["attention_mask"].sum(1, keepdim=True) != 7)

    with pytest.raises(NonFinite, match="example 3"):
        compute_gram(model, inputs, params="all", readout=bad, check=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"contraction": "sum"}, "contraction: expected one of 'trace'"),
        ({"precision": "low"}, "precision: expected one of 'exact'"),
        ({"backend": "cuda"}, "backend: expected one of"),
        ({"readout": "logit"}, "readout: expected one of"),
        ({"readout": "margin"}, "expected 2 logits, got 3"),
        ({"readout": "loss"}, "inputs have no 'labels'"),
        ({"readout": lambda out, _: out.logits[0]}, r"expected a tensor of shape \(N="),
        ({"params": "nothing.*"}, "params 'nothing.*': matches no parameter"),
        ({"params": []}, "got an empty list"),
        ({"targets": np.zeros((3, 1))}, "targets: expected 7 rows"),
        ({"eval_targets": np.zeros((3, 1))}, "eval_targets: given without eval_inputs"),
        ({"out": "/no/such/folder/k.h5"}, "out: folder"),
        ({"comm": object()}, "comm: expected an mpi4py communicator or None, got object"),
    ],
)
def test_bad_arguments(arguments, message):
    model = tiny_model("bert")
    with pytest.raises(InputError, match=message):
        compute_gram(model, tiny_inputs(model, LENGTHS, 12), **{"params": "all", **arguments})


def test_bad_inputs():
    model = tiny_model("bert")
    inputs = tiny_inputs(model, LENGTHS, 12)
    for bad, message in [
        ({}, "expected a mapping"),
        ({"pixel_values": ["a"]}, "expected a tensor"),
        (inputs | {"attention_mask": inputs["attention_mask"][:3]}, "expected 7 samples"),
        ({k: v[:0] for k, v in inputs.items()}, "got N = 0"),
        (inputs | {"attention_mask": torch.zeros_like(inputs["attention_mask"])}, "attends to no token"),
        ({"inputs_embeds": torch.full((2, 3, 32), float("nan"))}, "not finite"),
    ]:
        with pytest.raises(InputError, match=message):
            compute_gram(model, bad, params="all")
