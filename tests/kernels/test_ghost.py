"""Inner products of factored gradients, and their features, against float64."""

from __future__ import annotations

import pytest
import torch
from ntk_kernels import naive
from ntk_kernels.factors import pack
from ntk_kernels.ghost import ghost
from ntk_kernels.materialise import buffer, materialise
from ntk_kernels.syrk import syrk

from tests.kernels.common import DEVICE, close, randn

# samples of each chunk, tokens of each, C, R, I
RAGGED = [
    ([1], [1], 1, 1, 1),
    ([3, 2], [2, 7], 2, 63, 33),
    ([8, 3], [1, 1], 2, 2, 129),
    ([1, 1], [40, 130], 2, 9, 20),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Features of float16 and bfloat16 are rounded once, of float32 held in two planes.
ROUNDED = {torch.float32: 5e-7, torch.float16: 4e-4, torch.bfloat16: 3e-3}


def factors(sizes, tokens, C, R, I, dtype):  # noqa: E741
    """Return (chunks, a, d): the same factors chunk by chunk and whole, padded with zeros."""
    chunks = [
        (randn(n, t, I, dtype=dtype, seed=i), randn(n, C, t, R, dtype=dtype, seed=9 + i))
        for i, (n, t) in enumerate(zip(sizes, tokens, strict=True))
    ]
    S, T = sum(sizes), max(tokens)
    a, d = randn(S, T, I).zero_(), randn(S, C, T, R).zero_()
    at = 0
    for (x, y), n, t in zip(chunks, sizes, tokens, strict=True):
        a[at : at + n, :t], d[at : at + n, :, :t] = x, y
        at += n
    return chunks, a, d


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", RAGGED, ids=str)
def test_ghost_of_ragged_tokens(case, dtype):
    chunks, a, d = factors(*case, dtype)
    truth = naive.ghost(a, d, a, d)
    K = torch.ones_like(truth)
    ghost(pack(chunks), K)
    close(K - 1, truth, dtype, a.shape[2])


def test_ghost_of_a_part_of_each_contraction():
    chunks, a, d = factors([5, 6], [3, 2], 2, 17, 10, torch.float32)
    packed = pack(chunks)
    S, C = d.shape[:2]
    K = torch.zeros(6, 4, dtype=torch.float64, device=DEVICE)
    ghost(packed, K, 4, 4, lower=True)
    close(K, naive.ghost(a, d, a, d)[4:10, 4:8].tril())
    K = torch.zeros(4, 7, dtype=torch.float64, device=DEVICE).T  # strided
    ghost(packed, K, 0, 3, output=1)
    close(K, naive.ghost(a, d[:, 1:], a, d[:, 1:])[:7, 3:7])
    wide_a, wide_d = a.repeat_interleave(C, 0), d.reshape(S * C, 1, *d.shape[2:])
    K = torch.zeros(9, 22, dtype=torch.float64, device=DEVICE)
    ghost(packed, K, 3, 0, full=True)
    close(K, naive.ghost(wide_a, wide_d, wide_a, wide_d)[3:12])


def test_ghost_samples_of_very_different_size():
    sizes = torch.logspace(-8, 8, 6, device=DEVICE)
    a, d = randn(6, 4, 30) * sizes[:, None, None], randn(6, 1, 4, 20) * sizes[:, None, None, None]
    truth = naive.ghost(a, d, a, d)
    K = torch.zeros_like(truth)
    ghost(pack([(a, d)]), K)
    norms = truth.diagonal().sqrt()
    assert float(((K - truth).abs() / (norms[:, None] * norms)).max()) < 2e-6


def test_ghost_refuses_rows_beyond_the_samples():
    packed = pack([(randn(3, 2, 4), randn(3, 2, 2, 5))])
    with pytest.raises(ValueError, match="within 3"):
        ghost(packed, torch.zeros(3, 2, dtype=torch.float64, device=DEVICE), 1)
    with pytest.raises(ValueError, match="expected 0"):
        ghost(packed, torch.zeros(3, 2, dtype=torch.float64, device=DEVICE), output=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*RAGGED[:3], ([2, 1], [3, 70], 1, 140, 130)], ids=str)
def test_materialise(case, dtype):
    chunks, a, d = factors(*case, dtype)
    packed = pack(chunks)
    S, C, _, R = d.shape
    I = a.shape[2]  # noqa: E741
    G = naive.materialise(a, d)
    out = buffer(packed, R * I)
    for rows, columns in (((0, R), (0, I)), ((R // 2, R), (I // 3, I))):
        truth = G[:, :, slice(*rows), slice(*columns)].reshape(S, -1)
        phi = materialise(packed, rows, columns, out)
        assert (phi.value().double() - truth).norm() < ROUNDED[dtype] * truth.norm()
        K = torch.zeros(S, S, dtype=torch.float64, device=DEVICE)
        syrk(phi, K)
        close(K, naive.syrk(phi.value()).tril(), dtype, phi.shape[1])  # of the rounded features, on both sides
        apart = materialise(packed, rows, columns, buffer(packed, R * I, separate=True), separate=True)
        assert torch.equal(apart.value().reshape(S, -1), phi.value())
        signs = materialise(packed, rows, columns, buffer(packed, R * I, sign=True), sign=True)
        differ = signs.value().double() != truth.sign()
        assert float(truth.abs()[differ].sum()) < 1e-6 * float(truth.abs().sum())


def test_materialise_keeps_small_gradients():
    # Gradients of 1e-9 vanish in float16 unless a row is scaled.
    a, d = randn(4, 3, 20), 1e-9 * randn(4, 1, 3, 16)
    truth = naive.materialise(a, d).reshape(4, -1)
    packed = pack([(a, d)])
    phi = materialise(packed, (0, 16), (0, 20), buffer(packed, 320))
    assert (phi.value().double() - truth).norm() < 5e-7 * truth.norm()


def test_materialise_without_tokens_is_zero():
    packed = pack([(randn(2, 0, 5), randn(2, 1, 0, 4)), (randn(1, 3, 5), randn(1, 1, 3, 4))])
    phi = materialise(packed, (0, 4), (0, 5), buffer(packed, 20))
    assert not phi.value()[:2].any()
    assert phi.value()[2].any()


def test_pack_refuses_factors_that_do_not_match():
    with pytest.raises(ValueError, match="expected"):
        pack([(randn(2, 3, 4), randn(2, 1, 2, 5))])
    with pytest.raises(ValueError, match="one dtype"):
        pack([(randn(2, 3, 4), randn(2, 1, 3, 5).half())])
