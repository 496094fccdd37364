"""The Gram of an embedding table's gradients: samples meet only in the tokens they share.

`sum_rows` adds up each sample's output gradients by token, one row for each (sample, token). `lookup` then owns 16 Gram
rows in each program: for every token among them it multiplies their rows with those of all samples that have the token,
on tensor cores, and adds to K in the order of the tokens. No two programs touch one entry: no atomics, always the same
bits.

Shape suffixes: S samples, C outputs, T tokens, D width of a row, L rows (pairs of sample and token), M and N rows and
columns of K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ntk_kernels import runtime
from ntk_kernels.planes import HALF
from ntk_kernels.runtime import INTERPRETED, Compilation, Launch, expect, jit, require, tl

SAMPLES = 16  # Gram rows of a program; the least a matrix instruction takes
_SUM = Launch({"BLOCK": 1024}, 4, 1, "one pass over memory")
# 16 rows leave the widest instructions unused, but most tokens are shared by few samples.
LAUNCHES: dict[int, Launch] = {
    80: Launch({"B": 64, "BK": 64}, 4, 2, "rows come from the second-level cache"),
    90: Launch({"B": 64, "BK": 64}, 4, 3, "rows come from the second-level cache"),
    100: Launch({"B": 64, "BK": 64}, 4, 3, "rows come from the second-level cache"),
}


@jit
def _sum_rows(
    d: tl.tensor,  # (S, C, T, D)
    places: tl.tensor,  # (S · T,) int32 token places s·T + t, those of one row together
    starts: tl.tensor,  # (L + 1,) int32
    out: tl.tensor,  # (L, C, D) float32
    T: tl.tensor,
    D: tl.tensor,
    stride_ds: tl.int64,
    stride_dc: tl.int64,
    stride_dt: tl.int64,
    BLOCK: tl.constexpr,
) -> None:
    blocks = tl.cdiv(D, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(1)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for at in range(tl.load(starts + row), tl.load(starts + row + 1)):
        place = tl.load(places + at).to(tl.int64)
        source = d + place // T * stride_ds + c * stride_dc + place % T * stride_dt
        total += tl.load(source + k, mask=k < D, other=0.0).to(tl.float32)
    tl.store(out + (row * tl.num_programs(1) + c) * D + k, total, mask=k < D)


@jit
def _lookup(
    x: tl.tensor,  # (L, D)
    y: tl.tensor,  # (L, D)
    place: tl.tensor,  # (L,) int64 Gram rows
    table: tl.tensor,  # (entries, SAMPLES) int32 rows of x, −1 where a Gram row has not the token
    first: tl.tensor,  # (blocks + 1,) int32 entries of each program
    begin: tl.tensor,  # (entries,) int32 rows of y with that token
    end: tl.tensor,
    K: tl.tensor,  # (M, N) float64
    M: tl.tensor,
    N: tl.tensor,
    D: tl.tensor,
    column0: tl.tensor,
    stride_x: tl.int64,
    stride_y: tl.int64,
    stride_row: tl.int64,
    stride_column: tl.tensor,
    LOWER: tl.constexpr,
    SAMPLES: tl.constexpr,
    B: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    block = tl.program_id(0)
    m = block * SAMPLES + tl.arange(0, SAMPLES)
    for entry in range(tl.load(first + block), tl.load(first + block + 1)):
        rows = tl.load(table + entry * SAMPLES + tl.arange(0, SAMPLES))
        x_at = x + tl.maximum(rows, 0).to(tl.int64)[:, None] * stride_x
        last = tl.load(end + entry)
        for start in range(tl.load(begin + entry), last, B):
            other = start + tl.arange(0, B)
            there = other < last
            n = tl.load(place + other, mask=there, other=0) - column0
            there &= (n >= 0) & (n < N)
            if LOWER:
                there &= n < block * SAMPLES + SAMPLES
            y_at = y + other.to(tl.int64)[:, None] * stride_y
            total = tl.zeros((SAMPLES, B), dtype=tl.float32)
            for k0 in range(0, D, BK):
                k = k0 + tl.arange(0, BK)
                left = tl.load(x_at + k[None, :], mask=(rows >= 0)[:, None] & (k < D)[None, :], other=0.0)
                right = tl.load(y_at + k[None, :], mask=there[:, None] & (k < D)[None, :], other=0.0)
                total += tl.dot(left, right.T, input_precision="tf32x3")
            wanted = (rows >= 0)[:, None] & there[None, :] & (m < M)[:, None]
            if LOWER:
                wanted &= m[:, None] >= n[None, :]
            at = K + m.to(tl.int64)[:, None] * stride_row + n[None, :] * stride_column
            tl.debug_barrier()  # the last step's sums were stored by other threads
            tl.store(at, tl.load(at, mask=wanted, other=0.0) + total.to(tl.float64), mask=wanted)
            tl.debug_barrier()


def sum_rows(ids_ST: Tensor, d_SCTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (rows (L, C, D) float32, sample (L,), token (L,)), sorted by token, then sample.

    A row is the sum of d over the places of one sample that hold one token, in their order.

    Args:
        ids_ST: (S, T) tokens ≥ 0.
        d_SCTD: (S, C, T, D) float32, float16 or bfloat16, last stride 1.

    Raises:
        ValueError: shapes or dtypes that do not go together.
    """
    S, C, T, D = d_SCTD.shape
    expect(tuple(ids_ST.shape) == (S, T), f"ids: expected {(S, T)}, got {tuple(ids_ST.shape)}")
    expect(d_SCTD.dtype in (*HALF, torch.float32), f"d: expected float32 or half precision, got {d_SCTD.dtype}")
    require(d_SCTD.device)
    d = d_SCTD if d_SCTD.stride(3) == 1 else d_SCTD.contiguous()
    if INTERPRETED and d.dtype == torch.bfloat16:
        d = d.float()
    sample = torch.arange(S, device=d.device)[:, None].expand(S, T)
    keys, places = torch.sort((ids_ST.long() * S + sample).reshape(-1), stable=True)
    keys, counts = torch.unique_consecutive(keys, return_counts=True)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    rows = torch.empty(len(keys), C, D, dtype=torch.float32, device=d.device)
    if rows.numel():
        blocks = -(-D // _SUM.blocks["BLOCK"])
        strides = d.stride()[:3]
        _sum_rows[(len(keys) * blocks, C)](
            d, places.int(), starts, rows, T, D, strides[0], strides[1], strides[2], **_SUM.options()
        )
    return rows, keys % S, keys // S


def lookup(
    rows_LD: Tensor,
    place_L: Tensor,
    token_L: Tensor,
    K_MN: Tensor,
    row0: int = 0,
    column0: int = 0,
    *,
    columns_LD: Tensor | None = None,
    lower: bool = False,
) -> None:
    """Add to K the inner products of rows that have the same token: K[m, n] += Σ_token x_m·y_n.

    Args:
        rows_LD: (L, D) float32, x: one row for each Gram row and token it has.
        place_L: (L,) int64, its Gram row.
        token_L: (L,) its token, ascending.
        K_MN: (M, N) float64, any strides.
        row0: Gram row of K's first row; rows outside K are left out.
        column0: of K's first column.
        columns_LD: (L, D) float32, y; default x.
        lower: add to entries (m, n) with m ≥ n only.

    Raises:
        ValueError: shapes or dtypes that do not go together.

    Cost: about Σ_token (Gram rows with it)² · 2D flops, in tiles of 16 × 64.
    """
    limit = require(K_MN.device)
    (L, D), (M, N) = rows_LD.shape, K_MN.shape
    runtime.expect_gram(K_MN, M, N)
    y = rows_LD if columns_LD is None else columns_LD
    for name, given in (("rows", rows_LD), ("columns", y)):
        expect(given.dtype == torch.float32, f"{name}: expected float32, got {given.dtype}")
        expect(given.shape == rows_LD.shape and given.stride(1) == 1, f"{name}: expected {(L, D)} with last stride 1")
    expect(place_L.shape == token_L.shape == (L,), f"place, token: expected ({L},)")
    if not (L and M and N and D):
        return
    device = K_MN.device
    _, group, counts = torch.unique_consecutive(token_L, return_inverse=True, return_counts=True)
    stops = counts.cumsum(0)
    mine = ((place_L >= row0) & (place_L < row0 + M)).nonzero()[:, 0]
    if not len(mine):
        return
    m = place_L[mine] - row0
    keys, entry = torch.unique(m // SAMPLES * len(counts) + group[mine], return_inverse=True)
    table = torch.full((len(keys), SAMPLES), -1, dtype=torch.int32, device=device)
    table[entry, m % SAMPLES] = mine.int()
    blocks = -(-M // SAMPLES)
    first = torch.searchsorted(keys, torch.arange(blocks + 1, device=device) * len(counts)).int()
    of = keys % len(counts)
    launch = LAUNCHES[limit.family]
    _lookup[(blocks,)](
        rows_LD,
        y,
        place_L.long(),
        table,
        first,
        (stops - counts)[of].int(),
        stops[of].int(),
        K_MN,
        M,
        N,
        D,
        column0,
        rows_LD.stride(0),
        y.stride(0),
        K_MN.stride(0),
        K_MN.stride(1),
        LOWER=lower,
        SAMPLES=SAMPLES,
        **launch.options(),
    )


def compilations(family: int) -> list[Compilation]:
    """Return what this file's launchers launch."""
    strides = ("stride_x", "stride_y", "stride_row")
    signature = {"x": "*fp32", "y": "*fp32", "place": "*i64"}
    signature |= dict.fromkeys(("table", "first", "begin", "end"), "*i32") | {"K": "*fp64"}
    signature |= dict.fromkeys(("M", "N", "D", "column0"), "i32") | dict.fromkeys(strides, "i64")
    constants = {"stride_column": 1, "LOWER": True, "SAMPLES": SAMPLES}
    wide = ("D", "stride_x", "stride_y")
    found = [Compilation("lookup fp32", _lookup, family, signature, constants, LAUNCHES[family], "any", wide)]
    steps = ("stride_ds", "stride_dc", "stride_dt")
    for dtype in ("fp32", "bf16", "fp16"):
        signature = {"d": f"*{dtype}", "places": "*i32", "starts": "*i32", "out": "*fp32", "T": "i32", "D": "i32"}
        signature |= dict.fromkeys(steps, "i64")
        found.append(Compilation(f"sum rows {dtype}", _sum_rows, family, signature, {}, _SUM, "", ("D", *steps)))
    return found
