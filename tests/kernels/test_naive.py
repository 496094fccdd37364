"""The engine's strategies against the float64 references, factor by factor; the references against autograd."""

from __future__ import annotations

import pytest
import torch
from ntk_kernels.naive import ghost, lookup, materialise, syrk

from ntkengine.gram.frame import Frame
from ntkengine.gram.strategies import contract
from ntkengine.gram.tiles import Accumulator
from ntkengine.tangents.factors import Dense, Lookup, Outer, ParameterFactors

SIZES = [(1, 1), (3, 2), (6, 5)]


def run(factors, strategy, n, C):
    total = Accumulator(Frame((0, n), (0, n), C, "trace"), torch.device("cpu"))
    contract(factors, strategy, total)
    return total.finish()[0]


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("strategy", ["ghost", "materialise"])
def test_outer(strategy, sizes, C, T):
    generator = torch.Generator().manual_seed(0)
    n = sum(sizes)
    a, d = torch.randn(n, T, 33, generator=generator), torch.randn(n, C, T, 63, generator=generator)
    d[:, :, T // 2 :] = d[:, :, T // 2 :] * (torch.arange(n) % 2)[:, None, None, None]  # ragged: odd samples only
    chunks = [[Outer(x, y).compact()] for x, y in zip(a.split(sizes), d.split(sizes), strict=True)]
    got = run(ParameterFactors("w", (63, 33), list(sizes), chunks), strategy, n, C)
    truth = ghost(a, d, a, d)
    G = materialise(a, d)
    torch.testing.assert_close(truth, syrk(G.reshape(n, -1)), rtol=1e-12, atol=1e-10)
    assert (got - truth).norm() < 1e-6 * truth.norm()


@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_lookup(sizes, C):
    generator = torch.Generator().manual_seed(0)
    n = sum(sizes)
    ids, d = torch.randint(0, 7, (n, 9), generator=generator), torch.randn(n, C, 9, 33, generator=generator)
    chunks = [[Lookup(x, y)] for x, y in zip(ids.split(sizes), d.split(sizes), strict=True)]
    factors = ParameterFactors("w", (7, 33), list(sizes), chunks)
    truth = lookup(ids, d, 7)
    assert (run(factors, "lookup", n, C) - truth).norm() < 1e-6 * truth.norm()
    assert (run(factors, "materialise", n, C) - truth).norm() < 1e-6 * truth.norm()


def test_several_uses_of_one_parameter_sum_before_the_product():
    generator = torch.Generator().manual_seed(0)
    n, C, R, I = 5, 2, 7, 4  # noqa: E741
    a, d = torch.randn(n, 3, I, generator=generator), torch.randn(n, C, 3, R, generator=generator)
    ids, e = torch.randint(0, R, (n, 6), generator=generator), torch.randn(n, C, 6, I, generator=generator)
    g = torch.randn(n, C, R, I, generator=generator)
    factors = ParameterFactors("w", (R, I), [n], [[Outer(a, d), Lookup(ids, e), Dense(g)]])
    assert factors.kind == "mixed"
    rows = torch.zeros(n, C, R, I)
    for i in range(n):
        for t in range(6):
            rows[i, :, ids[i, t]] += e[i, :, t]
    G = materialise(a, d) + rows + g
    truth = syrk(G.reshape(n, -1))
    assert (run(factors, "materialise", n, C) - truth).norm() < 1e-6 * truth.norm()


@pytest.mark.parametrize("n", [4, 16])
def test_long_sums_keep_their_digits(n):
    # One float32 product over millions of terms of one sign loses digits; tiles summed in float64 do not.
    generator = torch.Generator().manual_seed(0)
    a, d = torch.rand(n, 1, 1500, generator=generator), torch.rand(n, 1, 1, 1500, generator=generator)
    got = run(ParameterFactors("w", (1500, 1500), [n], [[Outer(a, d)]]), "materialise", n, 1)
    truth = ghost(a, d, a, d)
    assert (got - truth).norm() < 3e-7 * truth.norm()
