"""K += Σ of float32 tiles that programs left behind, in float64 and always in one order.

A matrix kernel writes each tile's sums over one run to a slab of its own. Nothing is added by two programs at once, so
no result depends on which came first: there are no atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ntk_kernels.runtime import Compilation, Launch, jit, tl

SLAB_BYTES = 256 << 20  # of float32 sums held between the two kernels
ROWS = 16
_FOLD = Launch({}, 4, 1, "bound by memory: 16 rows of a tile keep their float64 sums in registers")


@jit
def add_tile(
    total: tl.tensor,  # (rows, columns) float64
    m: tl.tensor,
    n: tl.tensor,
    x_scale: tl.tensor,  # (M,) float32
    y_scale: tl.tensor,  # (N,) float32
    K: tl.tensor,  # (M, N) float64
    M: tl.tensor,
    N: tl.tensor,
    stride_row: tl.int64,
    stride_column: tl.tensor,
    X_SCALE: tl.constexpr,
    Y_SCALE: tl.constexpr,
    LOWER: tl.constexpr,
) -> None:
    """Add sums to rows m and columns n of K, scaled, and below the diagonal alone if asked."""
    if X_SCALE:
        total *= tl.load(x_scale + m, mask=m < M, other=0.0).to(tl.float64)[:, None]
    if Y_SCALE:
        total *= tl.load(y_scale + n, mask=n < N, other=0.0).to(tl.float64)[None, :]
    wanted = (m < M)[:, None] & (n < N)[None, :]
    if LOWER:
        wanted &= m[:, None] >= n[None, :]
    place = K + m.to(tl.int64)[:, None] * stride_row + n.to(tl.int64)[None, :] * stride_column
    tl.store(place, tl.load(place, mask=wanted, other=0.0) + total, mask=wanted)


@jit
def _fold(
    slab: tl.tensor,  # (splits, tiles, BM, BN) float32
    x_scale: tl.tensor,  # (M,) float32
    y_scale: tl.tensor,  # (N,) float32
    K: tl.tensor,  # (M, N) float64
    order: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    first: tl.tensor,
    splits: tl.tensor,
    stride_row: tl.int64,
    stride_column: tl.tensor,
    X_SCALE: tl.constexpr,
    Y_SCALE: tl.constexpr,
    LOWER: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    within = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    m = tl.load(order + 2 * (first + tile)) * BM + within
    n = tl.load(order + 2 * (first + tile) + 1) * BN + tl.arange(0, BN)
    at = tile.to(tl.int64) * (BM * BN) + within[:, None] * BN + tl.arange(0, BN)[None, :]
    step = tl.num_programs(0).to(tl.int64) * (BM * BN)
    total = tl.zeros((ROWS, BN), dtype=tl.float64)
    for _ in range(splits):
        total += tl.load(slab + at).to(tl.float64)
        at += step
    add_tile(total, m, n, x_scale, y_scale, K, M, N, stride_row, stride_column, X_SCALE, Y_SCALE, LOWER)


def slabs(tiles: int, runs: int, tile: tuple[int, int], device: torch.device) -> tuple[Tensor, int]:
    """Return an uninitialised slab and how many tiles, at most all, have room in it.

    Args:
        tiles: of K.
        runs: sums for each tile.
        tile: its rows and columns.
        device: of K.
    """
    size = runs * tile[0] * tile[1]
    at_once = min(tiles, max(1, SLAB_BYTES // (4 * size)))
    return torch.empty(at_once * size, dtype=torch.float32, device=device), at_once


def fold(
    slab: Tensor,
    runs: int,
    tile: tuple[int, int],
    order: Tensor,
    first: int,
    count: int,
    K_MN: Tensor,
    scale_M: Tensor | None,
    scale_N: Tensor | None,
    *,
    lower: bool,
) -> None:
    """Add the runs of some tiles, scaled by row and column, to K.

    Args:
        slab: (runs, count, tile rows, tile columns) float32, contiguous.
        runs: sums for each tile.
        tile: its rows and columns, powers of two.
        order: (tiles, 2) from `runtime.tile_order`.
        first: the first tile.
        count: how many.
        K_MN: (M, N) float64, any strides.
        scale_M: (M,) float32, or None for 1.
        scale_N: (N,) likewise.
        lower: add to entries (m, n) with m ≥ n only.
    """
    rows = min(ROWS, tile[0])
    _fold[(count, tile[0] // rows)](
        slab,
        slab if scale_M is None else scale_M.contiguous(),
        slab if scale_N is None else scale_N.contiguous(),
        K_MN,
        order,
        K_MN.shape[0],
        K_MN.shape[1],
        first,
        runs,
        K_MN.stride(0),
        K_MN.stride(1),
        X_SCALE=scale_M is not None,
        Y_SCALE=scale_N is not None,
        LOWER=lower,
        BM=tile[0],
        BN=tile[1],
        ROWS=rows,
        **_FOLD.options(),
    )


def compilations(family: int) -> list[Compilation]:
    """Return what this file's launcher launches, for the tiles of `syrk` and some of `ghost`."""
    found = []
    for bm, bn in ((128, 256), (128, 128), (64, 64), (8, 8), (1, 1)):
        signature = dict.fromkeys(("slab", "x_scale", "y_scale"), "*fp32") | {"K": "*fp64", "order": "*i32"}
        signature |= dict.fromkeys(("M", "N", "first", "splits"), "i32")
        signature |= {"stride_row": "i64"}
        constants = {
            "stride_column": 1,
            "X_SCALE": True,
            "Y_SCALE": True,
            "LOWER": True,
            "BM": bm,
            "BN": bn,
            "ROWS": min(ROWS, bm),
        }
        found.append(Compilation(f"fold {bm}×{bn}", _fold, family, signature, constants, _FOLD))
    return found
