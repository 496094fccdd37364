"""K += Σ_{t,u} (a_it·a_ju)(d_it·d_ju): inner products of gradients that are never formed.

A program takes a block of rows (samples × tokens) against a block of columns, sums a·a over I and d·d over the outputs
and R in float32 on tensor cores, multiplies, and adds up each sample pair's tokens: no token × token matrix is ever in
memory. Samples of few tokens share a block: their tokens are padded to a power of two, and padding is zero. A sample of
many has several, each pair of blocks a program; `fold` adds them up in float64.

Shape suffixes: S samples, C outputs, T tokens, R and I rows and columns of the parameter, M and N those of K.
"""

from __future__ import annotations

from torch import Tensor

from ntk_kernels import runtime
from ntk_kernels.factors import Factors
from ntk_kernels.fold import fold, slabs
from ntk_kernels.runtime import Compilation, Launch, expect, fitted, jit, require, tile_order, tl

# Two float32 accumulators, with planes a third for the step: 128 × 128 with 8 warps is 64 registers a thread for each.
LAUNCHES: dict[tuple[str, int], Launch] = {
    ("half", 80): Launch({"B": 128, "BK": 32}, 8, 4, "64 of 163 KiB"),
    ("half", 90): Launch({"B": 128, "BK": 64}, 8, 4, "128 of 227 KiB"),
    ("half", 100): Launch({"B": 128, "BK": 64}, 8, 3, "96 of 227 KiB"),
    ("planes", 80): Launch({"B": 64, "BK": 32}, 8, 3, "48 KiB; 4 warps spill registers"),
    ("planes", 90): Launch({"B": 128, "BK": 32}, 8, 4, "128 of 227 KiB; 64 spills registers"),
    ("planes", 100): Launch({"B": 64, "BK": 32}, 8, 4, "64 KiB; 128 × 128 spills registers with Triton 3.6"),
}


@jit
def _inner(
    total: tl.tensor,
    hi: tl.tensor,
    lo: tl.tensor,
    at: tl.tensor,  # (B,) int64 offsets of rows
    bt: tl.tensor,  # (B,) of columns
    a_mask: tl.tensor,
    b_mask: tl.tensor,
    width: tl.tensor,
    LO: tl.constexpr,
    BK: tl.constexpr,
) -> tl.tensor:
    """Return total + x yᵀ over `width` contiguous entries."""
    for k0 in range(0, width, BK):
        k = k0 + tl.arange(0, BK)
        x_place = at[:, None] + k[None, :]
        y_place = bt[:, None] + k[None, :]
        x_mask = a_mask[:, None] & (k < width)[None, :]
        y_mask = b_mask[:, None] & (k < width)[None, :]
        x = tl.load(hi + x_place, mask=x_mask, other=0.0)
        y = tl.load(hi + y_place, mask=y_mask, other=0.0)
        if LO:
            step = tl.dot(tl.load(lo + x_place, mask=x_mask, other=0.0), y.T)
            step = tl.dot(x, tl.load(lo + y_place, mask=y_mask, other=0.0).T, step)
            total += tl.dot(x, y.T, step)
        else:
            total = tl.dot(x, y.T, total)
    return total


@jit
def _ghost(
    a_hi: tl.tensor,  # (S, T, I)
    a_lo: tl.tensor,
    d_hi: tl.tensor,  # (S, C, T, R)
    d_lo: tl.tensor,
    lengths: tl.tensor,  # (S,) int32
    slab: tl.tensor,  # (T blocks², tiles, SAMPLES, SAMPLES) float32
    order: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    row0: tl.tensor,  # Gram row of K's first row, on the axis of S · WIDTH
    column0: tl.tensor,
    T: tl.tensor,
    I: tl.tensor,  # noqa: E741
    R: tl.tensor,
    stride_as: tl.int64,
    stride_at: tl.int64,
    stride_ds: tl.int64,
    stride_dc: tl.int64,
    stride_dt: tl.int64,
    first: tl.tensor,  # first tile of this launch
    output: tl.tensor,  # first output of the inner product, beside the Gram row's own
    WIDTH: tl.constexpr,  # Gram rows for each sample: its outputs, or 1
    FOLDED: tl.constexpr,  # outputs summed in one inner product
    LO: tl.constexpr,
    TOKENS: tl.constexpr,  # of one sample in a block, a power of two
    B: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    SAMPLES: tl.constexpr = B // TOKENS
    tile = tl.program_id(0)
    pair = tl.program_id(1)
    row = tl.load(order + 2 * (first + tile)) * SAMPLES
    column = tl.load(order + 2 * (first + tile) + 1) * SAMPLES
    m = row + tl.arange(0, B) // TOKENS
    n = column + tl.arange(0, B) // TOKENS
    m_sample = tl.minimum((row0 + m) // WIDTH, (row0 + M - 1) // WIDTH)
    n_sample = tl.minimum((column0 + n) // WIDTH, (column0 + N - 1) // WIDTH)
    m_length = tl.where(m < M, tl.load(lengths + m_sample), 0)
    n_length = tl.where(n < N, tl.load(lengths + n_sample), 0)
    m_output = output + (row0 + m) % WIDTH
    n_output = output + (column0 + n) % WIDTH
    blocks = tl.cdiv(T, TOKENS)
    t = pair // blocks * TOKENS + tl.arange(0, B) % TOKENS
    u = pair % blocks * TOKENS + tl.arange(0, B) % TOKENS
    x_mask = t < m_length
    y_mask = u < n_length
    x_at = m_sample.to(tl.int64) * stride_as + t.to(tl.int64) * stride_at
    y_at = n_sample.to(tl.int64) * stride_as + u.to(tl.int64) * stride_at
    a = tl.zeros((B, B), dtype=tl.float32)
    a = _inner(a, a_hi, a_lo, x_at, y_at, x_mask, y_mask, I, LO, BK)
    x_at = m_sample.to(tl.int64) * stride_ds + m_output.to(tl.int64) * stride_dc + t.to(tl.int64) * stride_dt
    y_at = n_sample.to(tl.int64) * stride_ds + n_output.to(tl.int64) * stride_dc + u.to(tl.int64) * stride_dt
    d = tl.zeros((B, B), dtype=tl.float32)
    for _ in range(FOLDED):
        d = _inner(d, d_hi, d_lo, x_at, y_at, x_mask, y_mask, R, LO, BK)
        x_at += stride_dc
        y_at += stride_dc
    sums = tl.sum(tl.sum(tl.reshape(a * d, (SAMPLES, TOKENS, SAMPLES, TOKENS)), 3), 1)
    at = (pair.to(tl.int64) * tl.num_programs(0) + tile) * (SAMPLES * SAMPLES)
    i = tl.arange(0, SAMPLES)
    tl.store(slab + at + i[:, None] * SAMPLES + i[None, :], sums)


def ghost(
    factors: Factors,
    K_MN: Tensor,
    row0: int = 0,
    column0: int = 0,
    *,
    lower: bool = False,
    full: bool = False,
    output: int | None = None,
) -> None:
    """Add the inner products of gradients to K.

    K[m, n] += Σ_c Σ_{t,u} (a_it·a_ju)(d_ict·d_jcu) with i = row0 + m and j = column0 + n.

    Args:
        factors: of all samples.
        K_MN: (M, N) float64, any strides.
        row0: Gram row, on the whole sample axis, of K's first row.
        column0: of K's first column.
        lower: add to entries (m, n) with m ≥ n only.
        full: a Gram row for each sample and output, n·C + c, no sum over outputs.
        output: of this output alone.

    Raises:
        ValueError: a K that reaches beyond the samples.

    Cost: M·N·T²·2(I + C·R) flops with T rounded up to a power of two (half with `lower`), three times that with planes.
    """
    limit = require(K_MN.device)
    S, C, T, R = factors.d_hi.shape
    I = factors.a_hi.shape[2]  # noqa: E741
    M, N = K_MN.shape
    width = C if full else 1
    runtime.expect_gram(K_MN, M, N)
    expect(
        min(row0, column0) >= 0 and max(row0 + M, column0 + N) <= S * width,
        f"K: expected rows and columns within {S * width}, got {row0} + {M} and {column0} + {N}",
    )
    expect(not (full and output is not None), "output: not with full")
    expect(output is None or 0 <= output < C, f"output: expected 0 … {C - 1}, got {output}")
    if not (M and N and T):
        return
    planes = factors.a_lo is not None
    launch = LAUNCHES["planes" if planes else "half", limit.family]
    launch = fitted(launch, 4 * launch.blocks["B"] * launch.blocks["BK"] * (1 + planes), limit)
    block = launch.blocks["B"]
    tokens = min(block, 1 << (T - 1).bit_length())
    order, tiles = tile_order(M, N, block // tokens, block // tokens, lower, K_MN.device)
    pairs = (-(-T // tokens)) ** 2
    tile = (block // tokens, block // tokens)
    slab, at_once = slabs(tiles, pairs, tile, K_MN.device)
    scale = None if factors.scale is None else factors.scale.repeat_interleave(width)
    for first in range(0, tiles, at_once):
        count = min(at_once, tiles - first)
        _ghost[(count, pairs)](
            factors.a_hi,
            factors.a_hi if factors.a_lo is None else factors.a_lo,
            factors.d_hi,
            factors.d_hi if factors.d_lo is None else factors.d_lo,
            factors.lengths,
            slab,
            order,
            M,
            N,
            row0,
            column0,
            T,
            I,
            R,
            factors.a_hi.stride(0),
            factors.a_hi.stride(1),
            factors.d_hi.stride(0),
            factors.d_hi.stride(1),
            factors.d_hi.stride(2),
            first,
            output or 0,
            WIDTH=width,
            FOLDED=C if not full and output is None else 1,
            LO=planes,
            TOKENS=tokens,
            **launch.options(),
        )
        rows, columns = (None if scale is None else scale[s : s + n] for s, n in ((row0, M), (column0, N)))
        fold(slab, pairs, tile, order, first, count, K_MN, rows, columns, lower=lower)


def compilations(family: int) -> list[Compilation]:
    """Return what this file's launchers launch."""
    found = []
    integers = ("M", "N", "row0", "column0", "T", "I", "R", "first", "output")
    strides = ("stride_as", "stride_at", "stride_ds", "stride_dc", "stride_dt")
    for kind, dtype in (("half", "bf16"), ("half", "fp16"), ("planes", "fp16")):
        planes = kind == "planes"
        launch = LAUNCHES[kind, family]
        for tokens in (1, 16, launch.blocks["B"]):
            signature = dict.fromkeys(("a_hi", "a_lo", "d_hi", "d_lo"), f"*{dtype}")
            signature |= {"lengths": "*i32", "slab": "*fp32", "order": "*i32"}
            signature |= dict.fromkeys(integers, "i32") | dict.fromkeys(strides, "i64")
            constants = {"WIDTH": 1, "FOLDED": 2, "LO": planes, "TOKENS": tokens}
            name = f"ghost {dtype}{'x3' if planes else ''} T={tokens}"
            aligned = ("I", "R", *strides)
            found.append(Compilation(name, _ghost, family, signature, constants, launch, "wide", aligned))
    return found
