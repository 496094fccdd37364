"""K += x yᵀ: float32 sums within a run on tensor cores, float64 across runs, one triangle, always the same bits.

Each program sums one run of features for one tile of K in float32; `fold` then adds the runs to K in float64, in order.
So long sums lose no digits, and few tiles still fill the device: their features are split among programs. A tile of one
run is added to K by the program that summed it: nothing is written and read in between.

Tensor cores cut off where float32 rounds: each addition loses half a unit of the last place, always downwards. Over a
run of half-precision features that is up to 2e-5 of a squared norm, far below what rounding the features costs.
Products of float32 grade therefore leave the tensor core after every step and are added in rounded float32.

Shape suffixes: M and N rows and columns of K, p features.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ntk_kernels import runtime
from ntk_kernels.fold import add_tile, fold, slabs
from ntk_kernels.planes import HALF, Planes, aligned, split
from ntk_kernels.runtime import Compilation, Launch, Limits, expect, fitted, jit, require, tile_order, tl
from ntk_kernels.signs import signs

RUN = {"half": 16_384, "planes": 8192}  # features summed in float32
PANEL_BYTES = 128 << 20  # of planes made from a float32 operand at a time

# The reasons are counts, not timings. A step of BM × BN × BK takes 2·BM·BN·BK flops and loads 2·(BM + BN)·BK bytes. An
# H100's multiprocessor does about 6 TFLOP/s and loads about 60 GB/ms from the second-level cache, 100 flops a byte:
# 128 × 256 has 85, 128 × 128 only 64, with two planes 96 (two accumulators of 128 × 256 do not fit in registers).
_LARGE, _MIDDLE, _SMALL = ({"BM": m, "BN": n, "BK": 64} for m, n in ((128, 256), (128, 128), (64, 64)))
LAUNCHES: dict[tuple[str, str, int], Launch] = {
    ("half", "large", 80): Launch({"BM": 128, "BN": 256, "BK": 32}, 8, 4, "96 of 163 KiB; 64 spills registers"),
    ("half", "large", 90): Launch(_LARGE, 8, 4, "192 of 227 KiB; the accumulator is 128 registers a thread"),
    ("half", "large", 100): Launch(_LARGE, 8, 4, "192 of 227 KiB; the accumulator is in tensor memory"),
    ("half", "middle", 80): Launch(_MIDDLE, 8, 4, "fewer than 512 columns: less padding, more programs"),
    ("half", "middle", 90): Launch(_MIDDLE, 8, 5, "fewer than 512 columns: less padding, more programs"),
    ("half", "middle", 100): Launch(_MIDDLE, 8, 5, "fewer than 512 columns: less padding, more programs"),
    ("half", "small", 80): Launch(_SMALL, 4, 4, "a single tile: bound by memory, several programs share a processor"),
    ("half", "small", 90): Launch(_SMALL, 4, 5, "a single tile: bound by memory, several programs share a processor"),
    ("half", "small", 100): Launch(_SMALL, 4, 5, "a single tile: bound by memory, several programs share a processor"),
    ("planes", "large", 80): Launch({"BM": 128, "BN": 128, "BK": 32}, 8, 3, "96 of 163 KiB; 64 spills registers"),
    ("planes", "large", 90): Launch(_MIDDLE, 8, 3, "192 of 227 KiB; step sum and total are 128 registers a thread"),
    ("planes", "large", 100): Launch(_MIDDLE, 8, 2, "Triton 3.6 buffers a stage more than asked for"),
    ("planes", "small", 80): Launch({"BM": 64, "BN": 64, "BK": 32}, 4, 4, "as above"),
    ("planes", "small", 90): Launch(_SMALL, 4, 3, "96 KiB: two programs share a processor"),
    ("planes", "small", 100): Launch(_SMALL, 4, 2, "as above"),
}


@jit
def _load(
    source: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    stride: tl.int64,
    DESCRIPTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """A tile, zero outside the matrix."""
    if DESCRIPTOR:
        return source.load([row, column])
    else:  # noqa: RET505 - the branch not taken must not be compiled
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        at = r.to(tl.int64)[:, None] * stride + c[None, :]
        return tl.load(source + at, mask=(r < rows)[:, None] & (c < columns)[None, :], other=0.0)


@jit
def _halves(x: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> tl.tensor:
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@jit
def _products(
    x_hi: tl.tensor,  # (M, p) float16 or bfloat16; a descriptor, or a pointer
    x_lo: tl.tensor,
    y_hi: tl.tensor,  # (N, p)
    y_lo: tl.tensor,
    order: tl.tensor,  # (tiles, 2) int32
    slab: tl.tensor,  # (splits, tiles, BM, BN) float32
    x_scale: tl.tensor,  # (M,) float32
    y_scale: tl.tensor,  # (N,) float32
    K: tl.tensor,  # (M, N) float64
    M: tl.tensor,
    N: tl.tensor,
    p: tl.tensor,
    stride_x: tl.int64,
    stride_y: tl.int64,
    stride_row: tl.int64,
    stride_column: tl.tensor,
    first: tl.tensor,  # first tile of this launch
    length: tl.tensor,  # features of a program, at most a run
    X_LO: tl.constexpr,
    Y_LO: tl.constexpr,
    DIRECT: tl.constexpr,  # one run: add it to K
    X_SCALE: tl.constexpr,
    Y_SCALE: tl.constexpr,
    LOWER: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    part = tl.program_id(1)
    row = tl.load(order + 2 * (first + tile)) * BM
    column = tl.load(order + 2 * (first + tile) + 1) * BN
    total = tl.zeros((BM, BN), dtype=tl.float32)
    start = part * length
    for k in range(start, tl.minimum(start + length, p), BK):
        x = _load(x_hi, row, k, M, p, stride_x, DESCRIPTOR, BM, BK)
        y = _load(y_hi, column, k, N, p, stride_y, DESCRIPTOR, BN, BK)
        if X_LO or Y_LO:
            # All loads come before the first product: the compiler then waits for them once, not once more in between.
            if X_LO:
                x_rest = _load(x_lo, row, k, M, p, stride_x, DESCRIPTOR, BM, BK)
            if Y_LO:
                y_rest = _load(y_lo, column, k, N, p, stride_y, DESCRIPTOR, BN, BK)
            step = tl.zeros((BM, BN), dtype=tl.float32)
            if X_LO:
                step = tl.dot(x_rest, y.T, step)
            if Y_LO:
                step = tl.dot(x, y_rest.T, step)
            total += tl.dot(x, y.T, step)
        else:
            total = tl.dot(x, y.T, total)
    if DIRECT:  # eighth by eighth: entries of K are twice as wide as sums, and registers are short
        left, right = _halves(total, BM, BN)
        for a in tl.static_range(2):
            upper, lower = _halves(left if a == 0 else right, BM, BN // 2)
            for b in tl.static_range(2):
                near, far = _halves(upper if b == 0 else lower, BM, BN // 4)
                for c in tl.static_range(2):
                    eighth = near if c == 0 else far
                    m = row + tl.arange(0, BM)
                    n = column + (4 * a + 2 * b + c) * (BN // 8) + tl.arange(0, BN // 8)
                    add_tile(
                        eighth.to(tl.float64),
                        m,
                        n,
                        x_scale,
                        y_scale,
                        K,
                        M,
                        N,
                        stride_row,
                        stride_column,
                        X_SCALE,
                        Y_SCALE,
                        LOWER,
                    )
    else:
        at = (part.to(tl.int64) * tl.num_programs(0) + tile) * (BM * BN)
        m = tl.arange(0, BM)
        n = tl.arange(0, BN)
        tl.store(slab + at + m[:, None] * BN + n[None, :], total)


def syrk(
    x: Tensor | Planes,
    K_MN: Tensor,
    y: Tensor | Planes | None = None,
    *,
    lower: bool | None = None,
    sign: str | None = None,
    floor_M: Tensor | None = None,
) -> None:
    """Add x yᵀ to K.

    Args:
        x: (M, p) bfloat16 or float16, exact products; float32, products of float32 grade; or planes. Any strides.
        K_MN: (M, N) float64, any strides.
        y: (N, p) like x; default x itself.
        lower: add to entries (m, n) with m ≥ n only; default: where y is x.
        sign: `"both"`: signs in place of values, taken as they are read; `"columns"`: of y only. Not for planes.
        floor_M: (M,) magnitudes at or below which an entry of x has no sign and counts as 0 (with y = x, of y too).

    Raises:
        ValueError: shapes, dtypes or devices that do not go together.
        UnavailableError: no Triton, or no device for it.

    Cost: 2·M·N·p flops (half with `lower`), three times that in float32 grade; `fold.SLAB_BYTES` of sums at most.
    """
    limit = require(K_MN.device)
    same = y is None
    lower = same if lower is None else lower
    other = x if y is None else y
    expect(x.shape[1] == other.shape[1], f"y: expected {x.shape[1]} features as in x, got {other.shape[1]}")
    runtime.expect_gram(K_MN, x.shape[0], other.shape[0])
    expect(sign in (None, "both", "columns"), f"sign: expected None, 'both' or 'columns', got {sign!r}")
    if isinstance(x, Planes) and isinstance(other, Planes):
        expect(sign is None, "sign: not for planes")
        _planes(x, other, K_MN, lower, limit)
        return
    if isinstance(x, Planes) or isinstance(other, Planes) or x.dtype != other.dtype:
        msg = "x, y: expected both planes, or both tensors of one dtype"
        raise ValueError(msg)
    expect(x.dtype in (*HALF, torch.float32), f"x: expected float32, float16 or bfloat16, got {x.dtype}")
    width = x.shape[1]
    if x.dtype == torch.float32 or sign is not None:  # panels of planes, whole runs
        run = max(RUN.values())
        rows = x.shape[0] if same and sign != "columns" else x.shape[0] + other.shape[0]
        width = max(1, PANEL_BYTES // (4 * run * max(1, rows))) * run
    for start in range(0, x.shape[1], max(1, width)):
        part = slice(start, min(start + width, x.shape[1]))
        right = _operand(other[:, part], sign is not None, floor_M if same else None)
        left = right if same and sign != "columns" else _operand(x[:, part], sign == "both", floor_M)
        _planes(left, right, K_MN, lower, limit)
        del left, right  # before the next panel's are made


def _operand(x: Tensor, signed: bool, floor: Tensor | None) -> Planes:
    """Return a matrix's planes: its signs, two halves of float32, or itself."""
    if signed:
        return Planes(signs(x, floor, torch.float16 if x.dtype == torch.float32 else x.dtype))
    if x.dtype == torch.float32:
        return split(x)
    return Planes(x.float() if runtime.INTERPRETED and x.dtype == torch.bfloat16 else x)


def _planes(x: Planes, y: Planes, K: Tensor, lower: bool, limit: Limits) -> None:
    (M, p), N = x.shape, y.shape[0]
    if not (M and N and p):
        return
    kind = "half" if x.lo is None and y.lo is None else "planes"
    launch = choose(M, N, kind, limit)
    bm, bn, bk = (launch.blocks[b] for b in ("BM", "BN", "BK"))
    # An operand without lo is passed twice; the kernel does not look.
    sources = [aligned(t, whole=not limit.descriptors) for t in (x.hi, _lo(x), y.hi, _lo(y))]
    expect(len({s.dtype for s in sources}) == 1, f"y: expected {x.hi.dtype} as x, got {y.hi.dtype}")
    for hi, lo in (sources[:2], sources[2:]):
        expect(lo.stride() == hi.stride(), "planes: expected one row stride for hi and lo")
    # Descriptors know the matrix's width and strides: of those a kernel then gets what does not change.
    width, stride_x, stride_y = sources[0].shape[1], sources[0].stride(0), sources[2].stride(0)
    if limit.descriptors:
        width, stride_x, stride_y = -(-width // 16) * 16, 0, 0
    order, tiles = tile_order(M, N, bm, bn, lower, K.device)
    splits, steps = division(tiles, -(-p // bk), RUN[kind] // bk, limit.processors)
    direct = splits == 1
    slab, at_once = slabs(0 if direct else tiles, splits, (bm, bn), K.device)
    scales = [slab if of.scale is None else of.scale.contiguous() for of in (x, y)]
    operands: list[Any] = list(sources)
    if limit.descriptors:
        operands = [_described(s, b, bk) for s, b in zip(sources, (bm, bm, bn, bn), strict=True)]
    for first in range(0, tiles, tiles if direct else at_once):
        count = tiles if direct else min(at_once, tiles - first)
        _products[(count, splits)](
            *operands,
            order,
            slab,
            *scales,
            K,
            M,
            N,
            width,
            stride_x,
            stride_y,
            K.stride(0),
            K.stride(1),
            first,
            steps * bk,
            X_LO=x.lo is not None,
            Y_LO=y.lo is not None,
            DIRECT=direct,
            X_SCALE=direct and x.scale is not None,
            Y_SCALE=direct and y.scale is not None,
            LOWER=direct and lower,
            DESCRIPTOR=limit.descriptors,
            **launch.options(),
        )
        if not direct:
            fold(slab, splits, (bm, bn), order, first, count, K, x.scale, y.scale, lower=lower)


def _lo(x: Planes) -> Tensor:
    return x.hi if x.lo is None else x.lo


def _described(x: Tensor, rows: int, columns: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


def choose(M: int, N: int, kind: str, limit: Limits) -> Launch:
    """Return the launch for K (M, N) from `"half"` or two `"planes"`."""
    size = "small" if max(M, N) <= 64 else "middle" if kind == "half" and N < 512 else "large"
    launch = LAUNCHES[kind, size, limit.family]
    stage = 2 * (launch.blocks["BM"] + launch.blocks["BN"]) * launch.blocks["BK"] * (2 if kind == "planes" else 1)
    return fitted(launch, stage, limit)


@lru_cache(maxsize=1024)
def division(tiles: int, steps: int, longest: int, processors: int) -> tuple[int, int]:
    """Return (programs for each tile, steps of each): the division of a sum that ends soonest, counted in steps.

    A program costs 12 steps to begin and end, and its slab is written and read: 10 steps' time on a full device.

    Args:
        tiles: tiles of K.
        steps: of the whole sum.
        longest: steps that one program may take.
        processors: multiprocessors.
    """
    least = -(-steps // longest)
    best, found = float("inf"), least
    for splits in range(least, max(least, min(2 * processors, steps // 8)) + 1):
        waves = -(-tiles * splits // processors)
        cost = waves * (-(-steps // splits) + 12) + 10 * tiles * splits / processors
        if cost < best:
            best, found = cost, splits
    each = -(-steps // found)
    return -(-steps // each), each


def compilations(family: int) -> list[Compilation]:
    """Return what this file's launchers launch."""
    names = ["M", "N", "p", "first", "length"]
    found = []
    for (kind, size, of), launch in LAUNCHES.items():
        if of != family:
            continue
        bm, bn, bk = (launch.blocks[b] for b in ("BM", "BN", "BK"))
        for dtype in ("fp16", "bf16") if kind == "half" else ("fp16",):
            variants = [(False, False)] if kind == "half" else [(True, True), (True, False), (False, True)]
            for x_lo, y_lo in variants:
                shapes = {"x_hi": bm, "x_lo": bm, "y_hi": bn, "y_lo": bn}
                signature = {
                    n: f"tensordesc<{dtype}[{b},{bk}]>" if family >= 90 else f"*{dtype}" for n, b in shapes.items()
                }
                signature |= {"order": "*i32", "slab": "*fp32", "x_scale": "*fp32", "y_scale": "*fp32", "K": "*fp64"}
                signature |= dict.fromkeys(names, "i32") | dict.fromkeys(("stride_x", "stride_y", "stride_row"), "i64")
                name = f"syrk {dtype}{'x3' if x_lo and y_lo else 'x2' if x_lo or y_lo else ''} {size}"
                wide = ("p", "stride_x", "stride_y", "length")
                for direct in (False, True):
                    constants = {"X_LO": x_lo, "Y_LO": y_lo, "DESCRIPTOR": family >= 90, "stride_column": 1}
                    constants |= {"DIRECT": direct, "LOWER": direct}
                    constants |= dict.fromkeys(("X_SCALE", "Y_SCALE"), direct and kind == "planes")
                    told = f"{name} whole" if direct else name
                    found.append(Compilation(told, _products, family, signature, constants, launch, "wide", wide))
    return found
