"""Ghost products against gradients written out: layouts of factors, contractions, inputs that are read twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ntkengine.gram import ghost as room
from ntkengine.gram import tiles
from ntkengine.gram.frame import Frame
from ntkengine.gram.ghost import ghost
from ntkengine.gram.strategies import choose, copied
from ntkengine.gram.tiles import Accumulator
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


FRAMES = [
    Frame((0, 40), (0, 40), C, "trace"),
    Frame((0, 40), (0, 25), C, "full"),
    Frame((0, 24), (24, 40), C, "per-output"),
]


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: frame.contraction)
@pytest.mark.parametrize("area", [1, 40, 10**6])
def test_blocks_cover_every_pair_once_in_few_shapes(frame, area, monkeypatch):
    T = 3
    monkeypatch.setattr(room, "_PAIR_BYTES", 8 * T * T * area)
    rows, columns = frame.rows[1] * frame.width, frame.columns[1] * frame.width
    met = np.zeros((rows, columns), dtype=int)
    blocks = room._blocks(frame, T)
    for r, c in blocks:
        met[r, c] += 1
        assert (r.stop - r.start) * (c.stop - c.start) <= max(area, 1)
    wanted = np.zeros_like(met)
    wanted[frame.rows[0] * frame.width :, frame.columns[0] * frame.width :] = 1
    if frame.symmetric:
        wanted[:, :columns] = np.tril(wanted[:, :columns])
    assert (met <= 1).all()
    assert (met[wanted == 1] == 1).all()
    assert len({(r.stop - r.start, c.stop - c.start) for r, c in blocks}) <= 2 * 8 + 2


@pytest.mark.parametrize("contraction", ["trace", "full", "per-output"])
def test_blocks_of_any_size_give_the_same_sums(contraction, monkeypatch):
    torch.manual_seed(0)
    factors = drawn(
        (4, 3), [torch.randn(n, t, WIDTH, dtype=torch.float64) for n, t in ((3, 4), (2, 3))], token_by_token=False
    )
    found = []
    for area in (1, 2, 7, 10**6):
        monkeypatch.setattr(room, "_PAIR_BYTES", 8 * 16 * area)
        total = Accumulator(Frame((0, 5), (0, 5), C, contraction), torch.device("cpu"))
        ghost(factors, [total], lambda: None)
        found.append(total.finish())
    for K in found:
        torch.testing.assert_close(K, written_out(factors, contraction), rtol=1e-12, atol=1e-12)


def test_products_in_blocks_of_columns(monkeypatch):
    phi = torch.randn(70, 2, 300)
    whole = Accumulator(Frame((0, 70), (0, 50), 2, "full"), torch.device("cpu"))
    whole.add_features(phi)
    monkeypatch.setattr(tiles, "_COLUMNS", 32)
    cut = Accumulator(Frame((0, 70), (0, 50), 2, "full"), torch.device("cpu"))
    cut.add_features(phi)
    torch.testing.assert_close(cut.finish(), whole.finish(), rtol=1e-5, atol=1e-4)


def test_ghost_products_only_where_their_copies_have_room():
    frame = Frame((0, 100), (0, 100), 8, "trace")
    shape, tokens = (64, 64), 2
    assert choose("outer", shape, tokens, 100, frame)[0] == "ghost"
    takes = copied(shape, tokens, 100, frame, 4)
    assert takes >= 4 * 100 * tokens * (64 + 8 * 64)
    assert choose("outer", shape, tokens, 100, frame, room=takes)[0] == "ghost"
    assert choose("outer", shape, tokens, 100, frame, room=takes - 1)[0] == "materialise"
