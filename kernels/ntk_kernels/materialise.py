"""Per-sample gradients Σ_t d_t a_tᵀ, a tile of the parameter for all samples, in the layout `syrk` reads.

Each gradient is summed in float32 and rounded once; the rounded value serves both sides of the product, so K stays
positive semi-definite.

Kept apart from `syrk`: a program that made its own features would make those of BM + BN samples for every tile of K,
2·2T·(BM + BN) flops for a feature that is then used 2·BM·BN times. That repays while 2T is small against 64, where
`ghost` needs no features at all. Written out, a feature is made once, and its traffic (4 bytes in bfloat16, 8 in
float32 grade) is small beside the N products it goes into once N is some hundreds.

Shape suffixes: S samples, C outputs, T tokens, R and I rows and columns of the parameter.
"""

from __future__ import annotations

import torch

from ntk_kernels.factors import Factors
from ntk_kernels.planes import Planes
from ntk_kernels.runtime import Compilation, Launch, expect, fitted, jit, require, tl

# A tile of 128 × 128 needs 2·T flops for each entry it writes: bound by writing until T is a few hundred, so shallow
# pipelines and two programs for each multiprocessor, which overlap one's writes with the other's products.
LAUNCHES: dict[tuple[str, int], Launch] = {
    ("half", 80): Launch({"BM": 128, "BN": 128, "BT": 32}, 8, 3, "48 KiB: several programs on a processor"),
    ("half", 90): Launch({"BM": 128, "BN": 128, "BT": 64}, 8, 3, "96 KiB: two programs on a processor"),
    ("half", 100): Launch({"BM": 128, "BN": 128, "BT": 64}, 8, 3, "96 KiB: two programs on a processor"),
    ("planes", 80): Launch({"BM": 128, "BN": 64, "BT": 32}, 8, 2, "48 KiB"),
    ("planes", 90): Launch({"BM": 128, "BN": 64, "BT": 64}, 8, 2, "96 KiB; 128 wide takes 165 registers"),
    ("planes", 100): Launch({"BM": 128, "BN": 64, "BT": 32}, 8, 3, "72 KiB; 64 tokens spill registers with Triton 3.6"),
}


@jit
def _materialise(
    a_hi: tl.tensor,  # (S, T, I)
    a_lo: tl.tensor,
    d_hi: tl.tensor,  # (S, C, T, R)
    d_lo: tl.tensor,
    scale: tl.tensor,  # (S,) float32, what a sum is multiplied by
    lengths: tl.tensor,  # (S,) int32
    out_hi: tl.tensor,  # (S, C, rows, columns)
    out_lo: tl.tensor,
    row: tl.tensor,  # first row of the parameter
    column: tl.tensor,  # first column
    rows: tl.tensor,
    columns: tl.tensor,
    C: tl.tensor,
    stride_as: tl.int64,
    stride_at: tl.int64,
    stride_ds: tl.int64,
    stride_dc: tl.int64,
    stride_dt: tl.int64,
    stride_os: tl.int64,
    stride_oc: tl.int64,
    LO: tl.constexpr,
    OUT_LO: tl.constexpr,
    SCALE: tl.constexpr,
    SIGN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
) -> None:
    wide = tl.cdiv(columns, BN)
    high = tl.cdiv(rows, BM)
    pid = tl.program_id(0)
    j = pid % wide
    i = (pid // wide) % high
    c = (pid // (wide * high)) % C
    s = (pid // (wide * high * C)).to(tl.int64)
    r = i * BM + tl.arange(0, BM)
    k = j * BN + tl.arange(0, BN)
    d_at = s * stride_ds + c * stride_dc + row + r
    a_at = s * stride_as + column + k
    length = tl.load(lengths + s)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for t0 in range(0, length, BT):
        t = t0 + tl.arange(0, BT)
        d_mask = (t < length)[:, None] & (r < rows)[None, :]
        a_mask = (t < length)[:, None] & (k < columns)[None, :]
        d_place = d_at[None, :] + t.to(tl.int64)[:, None] * stride_dt
        a_place = a_at[None, :] + t.to(tl.int64)[:, None] * stride_at
        d = tl.load(d_hi + d_place, mask=d_mask, other=0.0)
        a = tl.load(a_hi + a_place, mask=a_mask, other=0.0)
        if LO:
            step = tl.dot(tl.load(d_lo + d_place, mask=d_mask, other=0.0).T, a)
            step = tl.dot(d.T, tl.load(a_lo + a_place, mask=a_mask, other=0.0), step)
            total += tl.dot(d.T, a, step)
        else:
            total = tl.dot(d.T, a, total)
    if SCALE:
        total *= tl.load(scale + s)
    if SIGN:
        total = tl.where(total > 0, 1.0, tl.where(total < 0, -1.0, 0.0)) + (total - total)
    place = s * stride_os + c * stride_oc + r.to(tl.int64)[:, None] * columns + k[None, :]
    inside = (r < rows)[:, None] & (k < columns)[None, :]
    high_part = total.to(out_hi.dtype.element_ty)
    tl.store(out_hi + place, high_part, mask=inside)
    if OUT_LO:
        tl.store(out_lo + place, (total - high_part.to(tl.float32)).to(out_lo.dtype.element_ty), mask=inside)


def buffer(factors: Factors, entries: int, *, separate: bool = False, sign: bool = False) -> Planes:
    """Return planes that `materialise` may write tiles of up to `entries` parameters into, again and again.

    Args:
        factors: of all samples.
        entries: rows times columns of a tile.
        separate: a row for each sample and output, else for each sample.
        sign: for signs: one plane.
    """
    S, C = factors.d_hi.shape[:2]
    count, width = (S * C, entries) if separate else (S, C * entries)
    hi = torch.empty(count, -(-width // 64) * 64, dtype=factors.a_hi.dtype, device=factors.a_hi.device)
    return Planes(hi, None if factors.a_lo is None or sign else torch.empty_like(hi))


def materialise(
    factors: Factors,
    rows: tuple[int, int],
    columns: tuple[int, int],
    out: Planes,
    *,
    separate: bool = False,
    sign: bool = False,
) -> Planes:
    """Return features (S, C·p) of a tile of p = rows × columns of the parameter's gradient, or (S·C, p) if separate.

    Args:
        factors: of all samples.
        rows: [start, stop) of the parameter. Multiples of 16 keep loads wide.
        columns: [start, stop) likewise.
        out: from `buffer` with the same options; it is overwritten.
        separate: outputs are rows of their own, n·C + c; else one after another in their sample's row.
        sign: signs in place of values, one plane.

    Returns:
        Planes over the buffer: with two planes, float32-grade values; else rounded once to the factors' dtype.

    Raises:
        ValueError: a tile outside the parameter, or a buffer too small.

    Cost: 2·S·C·T·p flops, three times that with planes; the features are written once.
    """
    S, C, _, R = factors.d_hi.shape
    for name, (start, stop), most in (("rows", rows, R), ("columns", columns, factors.a_hi.shape[2])):
        expect(0 <= start < stop <= most, f"{name}: expected 0 ≤ start < stop ≤ {most}, got {start}, {stop}")
    high, wide = rows[1] - rows[0], columns[1] - columns[0]
    count, width = (S * C, high * wide) if separate else (S, C * high * wide)
    expect(out.shape[0] == count and out.shape[1] >= width, f"out: expected ({count}, ≥ {width}), got {out.shape}")
    expect(out.hi.is_contiguous() and out.hi.dtype == factors.a_hi.dtype, "out: expected what buffer() returns")
    limit = require(factors.a_hi.device)
    planes = factors.a_lo is not None
    two = planes and not sign
    expect(not two or out.lo is not None, "out: expected two planes, as buffer() returns for such factors")
    launch = LAUNCHES["planes" if planes else "half", limit.family]
    bm, bn, bt = (launch.blocks[b] for b in ("BM", "BN", "BT"))
    launch = fitted(launch, 2 * (bm + bn) * bt * (1 + planes), limit)
    scale = None
    if not sign and factors.out_scale is not None:  # for signs a positive factor is none
        scale = (1.0 if factors.scale is None else factors.scale) / factors.out_scale
    a_lo = factors.a_hi if factors.a_lo is None else factors.a_lo
    d_lo = factors.d_hi if factors.d_lo is None else factors.d_lo
    out_lo = out.hi if out.lo is None else out.lo
    _materialise[(S * C * -(-high // bm) * -(-wide // bn),)](
        factors.a_hi,
        a_lo,
        factors.d_hi,
        d_lo,
        factors.lengths if scale is None else scale,
        factors.lengths,
        out.hi,
        out_lo,
        rows[0],
        columns[0],
        high,
        wide,
        C,
        factors.a_hi.stride(0),
        factors.a_hi.stride(1),
        factors.d_hi.stride(0),
        factors.d_hi.stride(1),
        factors.d_hi.stride(2),
        out.hi.stride(0) * (C if separate else 1),
        out.hi.stride(0) if separate else high * wide,
        LO=planes,
        OUT_LO=two,
        SCALE=scale is not None,
        SIGN=sign,
        **launch.options(),
    )
    if scale is not None:
        scale = factors.out_scale
        scale = scale.repeat_interleave(C) if separate and scale is not None else scale
    return Planes(out.hi[:, :width], out_lo[:, :width] if two else None, scale)


def compilations(family: int) -> list[Compilation]:
    """Return what this file's launchers launch."""
    found = []
    strides = ("stride_as", "stride_at", "stride_ds", "stride_dc", "stride_dt", "stride_os", "stride_oc")
    for kind, dtype, sign in (("half", "bf16", False), ("half", "bf16", True), ("half", "fp16", False)) + (
        ("planes", "fp16", False),
        ("planes", "fp16", True),
    ):
        planes = kind == "planes"
        pointers = ("a_hi", "a_lo", "d_hi", "d_lo", "out_hi", "out_lo")
        signature = dict.fromkeys(pointers, f"*{dtype}") | {"scale": "*fp32", "lengths": "*i32"}
        signature |= dict.fromkeys(("row", "column", "rows", "columns", "C"), "i32") | dict.fromkeys(strides, "i64")
        constants = {"LO": planes, "OUT_LO": planes and not sign, "SCALE": dtype == "fp16" and not sign, "SIGN": sign}
        name = f"materialise {dtype}{'x3' if planes else ''}{' signs' if sign else ''}"
        launch = LAUNCHES[kind, family]
        found.append(
            Compilation(
                name,
                _materialise,
                family,
                signature,
                constants,
                launch,
                "wide",
                ("row", "column", "rows", "columns", *strides),
            )
        )
    return found
