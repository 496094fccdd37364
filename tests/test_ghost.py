"""Ghost products against gradients written out: layouts of factors, contractions, inputs that are read twice."""

from __future__ import annotations

import pytest
import torch

from ntkengine.gram.ghost import ghost
from ntkengine.gram.tiles import Accumulator, Frame
from ntkengine.tangents.factors import Outer, ParameterFactors

SIZES, C, R, WIDTH = (3, 2), 2, 5, 7


def drawn(tokens, inputs, *, token_by_token):
    chunks = []
    for n, t, a in zip(SIZES, tokens, inputs, strict=True):
        d = torch.randn(n, t, C, R, dtype=torch.float64).transpose(1, 2)
        chunks.append([Outer(a, d if token_by_token else d.contiguous())])
    return ParameterFactors("w", (R, WIDTH), list(SIZES), chunks)


def written_out(factors, contraction):
    G = torch.cat([factors.dense(i, C, torch.empty(0, dtype=torch.float64)) for i in range(len(factors.chunks))])
    G = G.flatten(2)
    if contraction == "per-output":
        return torch.einsum("ncp,mcp->cnm", G, G)
    G = G.flatten(0, 1) if contraction == "full" else G.flatten(1)
    return (G @ G.T)[None]


@pytest.mark.parametrize("contraction", ["trace", "full", "per-output"])
@pytest.mark.parametrize("tokens", [(4, 4), (4, 3)])
def test_inputs_that_are_read_twice_are_multiplied_once(contraction, tokens, monkeypatch):
    torch.manual_seed(0)
    made = []
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda x, y: made.append(x.shape[1]) or product(x, y))
    shapes = [(n, t, WIDTH) for n, t in zip(SIZES, tokens, strict=True)]
    inputs, others = ([torch.randn(shape, dtype=torch.float64) for shape in shapes] for _ in range(2))
    frame = Frame((0, sum(SIZES)), (0, sum(SIZES)), C, contraction)
    total = Accumulator(frame, torch.device("cpu"))
    wanted = torch.zeros_like(total.K)
    for given, again in ((inputs, False), (inputs, True), (others, False), (inputs, False)):
        factors = drawn(tokens, given, token_by_token=again)
        made.clear()
        ghost(factors, [total], lambda: None)
        assert (WIDTH in made) is not again
        wanted += written_out(factors, contraction)
    torch.testing.assert_close(total.finish(), wanted)
