"""Float64 passes: a model's own casts to float32 are none, what reads bits is left alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import ntkengine as ntk
from ntkengine.inputs.unrounded import unrounded
from tests.brute import relative_error, tiny_inputs, tiny_model
from tests.zoo import LENGTHS


def test_a_normalisation_that_casts():
    torch.manual_seed(0)
    norm, x = LlamaRMSNorm(8, eps=1e-6).double(), torch.randn(3, 8, dtype=torch.float64)
    wanted = x.numpy() / np.sqrt((x.numpy() ** 2).mean(1, keepdims=True) + 1e-6)
    assert np.abs(norm(x).detach().numpy() - wanted).max() > 1e-9
    with unrounded(torch.float64):
        assert np.abs(norm(x).detach().numpy() - wanted).max() < 1e-15
    with unrounded(torch.float32):
        assert torch.ones(2, dtype=torch.int64).float().dtype == torch.float32


def test_casts_factories_and_bits():
    raw = bytearray(torch.tensor([1.5, -2.0]).numpy().tobytes())
    with unrounded(torch.float64):
        x = torch.ones(2, dtype=torch.int64)
        found = [
            x.float(), x.half(), x.bfloat16(), x.to(torch.float32), x.to("cpu", torch.bfloat16), x.type(torch.float32),
            torch.zeros(2, dtype=torch.float32), torch.zeros(2), torch.arange(2, dtype=torch.float16), x / 3,
            torch.softmax(x.double(), 0, dtype=torch.float32), x.double().sum(dtype=torch.float32),
        ]  # fmt: skip
        assert {y.dtype for y in found} == {torch.float64}
        assert torch.frombuffer(raw, dtype=torch.float32).tolist() == [1.5, -2.0]
        assert torch.zeros(2, dtype=torch.int32).view(torch.float32).dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32
    assert torch.zeros(1).float().dtype == torch.float32


def test_exact_grams_in_other_batches():
    model = tiny_model("llama")
    inputs = tiny_inputs(model, LENGTHS, 12)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    first = ntk.compute_gram(model, inputs, params="all", precision="exact")
    other = ntk.compute_gram(model, {k: v[order] for k, v in inputs.items()}, params="all", precision="exact")
    products = ntk.TangentProducts(model, inputs, params="all", contraction="sum-of-outputs")
    summed = ntk.compute_gram(model, inputs, params="all", precision="exact", contraction="sum-of-outputs")
    assert max(relative_error(other.values, first.values[np.ix_(order, order)])) < 1e-14
    assert max(relative_error(products(np.eye(len(order))), summed.values)) < 1e-13


def test_kernels_of_other_libraries_keep_their_digits():
    """As those of quantised layers, which are handed numbers of the type that they ask for, and do not look."""
    library = torch.library.Library("elsewhere", "DEF")
    library.define("twice(Tensor x) -> Tensor")

    def twice(x):
        assert x.dtype == torch.float32
        return 2 * x

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.ops.elsewhere.twice(x)

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)

        def forward(self, x):
            return self.two(Twice.apply(self.one(x).float()).to(x.dtype))

    library.impl("twice", twice, "CPU")
    x = {"x": torch.randn(5, 4)}
    grams = [ntk.compute_gram(Model(), x, params="all", precision=precision) for precision in ("high", "exact")]
    products = ntk.TangentProducts(Model(), x, params="all", contraction="sum-of-outputs")
    summed = ntk.compute_gram(Model(), x, params="all", contraction="sum-of-outputs")
    assert grams[0].meta["noise_relative"] < 1e-6
    assert max(relative_error(grams[1].values, grams[0].values)) < 1e-6
    assert max(relative_error(products(np.eye(5)), summed.values)) < 1e-6
    with (
        unrounded(torch.float64),
        pytest.raises(RuntimeError, match="elsewhere.twice.* of another library"),
    ):
        torch.ops.elsewhere.twice(x["x"])
