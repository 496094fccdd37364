"""Matrices as tensor cores want them: half-precision planes whose sum, row by row scaled, is a float32 matrix.

A float32 number has 24 binary digits, float16 has 11: x·2^e = hi + lo holds 22 of them, and three products
hi·hi + hi·lo + lo·hi on float16 tensor cores are as good as a float32 product: what they leave out, lo·lo, is below
2^-22 of it. Planes of bfloat16 hold only 16 digits, and three of their products leave out 2e-6 of a squared norm; tf32
holds as much as float16 at half its rate. The exponent e of a row keeps its largest entry near float16's limit, so that
an entry 2^-24 of that is still held to 2^-14 of itself.

Shape suffixes: N rows, p columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ntk_kernels.runtime import Compilation, Launch, expect, jit, require, tl

HALF = (torch.bfloat16, torch.float16)
TOP = 14  # exponent of a row's largest entry: float16 ends below 2^16
_SPLIT = Launch({"BLOCK": 2048}, 4, 1, "one pass over memory: 16-byte accesses, nothing to reuse")


@dataclass(frozen=True)
class Planes:
    """Rows x_n = scale_n · (hi_n + lo_n).

    Attributes:
        hi: (N, p) bfloat16 or float16; float32 in the interpreter, which has no bfloat16.
        lo: (N, p) float16, or None.
        scale: (N,) float32 powers of two, or None for 1.
    """

    hi: Tensor
    lo: Tensor | None = None
    scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, p)."""
        return self.hi.shape[0], self.hi.shape[1]

    def part(self, rows: slice, columns: slice = slice(None)) -> Planes:
        """Return some rows and columns, without a copy."""
        lo = None if self.lo is None else self.lo[rows, columns]
        return Planes(self.hi[rows, columns], lo, None if self.scale is None else self.scale[rows])

    def value(self) -> Tensor:
        """Return (N, p) float32, what the planes stand for; for tests."""
        whole = self.hi.float() if self.lo is None else self.hi.float() + self.lo.float()
        return whole if self.scale is None else whole * self.scale[:, None]


@jit
def _split(
    x: tl.tensor,  # (N, p) float32
    inverse: tl.tensor,  # (N,) float32, 1 / scale
    hi: tl.tensor,  # (N, p) float16
    lo: tl.tensor,
    p: tl.tensor,
    stride_x: tl.int64,
    stride_out: tl.int64,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < p
    value = tl.load(x + row * stride_x + column, mask=inside, other=0.0) * tl.load(inverse + row)
    high = value.to(tl.float16)
    tl.store(hi + row * stride_out + column, high, mask=inside)
    tl.store(lo + row * stride_out + column, (value - high.to(tl.float32)).to(tl.float16), mask=inside)


def row_scale(largest_N: Tensor, top: int = TOP) -> Tensor:
    """Return (N,) float32 powers of two that, divided out, leave rows below 2^top; 1 for a row of zeros or NaN.

    Args:
        largest_N: a bound on each row's largest magnitude.
        top: the exponent.
    """
    exponent = torch.frexp(largest_N.float()).exponent - top
    usual = torch.isfinite(largest_N) & (largest_N > 0)
    return torch.where(usual, torch.exp2(exponent.clamp(-120, 120).float()), 1.0)


def split(x_Np: Tensor, scale_N: Tensor | None = None, out: Planes | None = None) -> Planes:
    """Return a float32 matrix as two float16 planes, right to 2^-22 of an entry or 2^-38 of its row's bound.

    Args:
        x_Np: (N, p) float32, last stride 1.
        scale_N: from `row_scale`; default, from each row's largest entry.
        out: where to write: planes of that shape with one row stride; its scale is not looked at.

    Raises:
        ValueError: another dtype or shape.
    """
    N, p = x_Np.shape
    expect(x_Np.dtype == torch.float32, f"x: expected float32, got {x_Np.dtype}")
    require(x_Np.device)
    x = x_Np if x_Np.stride(1) == 1 else x_Np.contiguous()
    if scale_N is None:
        scale_N = row_scale(torch.linalg.vector_norm(x, torch.inf, dim=1)) if p else x.new_ones(N)
    if out is None:
        hi, lo = (padded(N, p, torch.float16, x.device) for _ in range(2))
        out = Planes(hi, lo)
    hi, lo = out.hi, out.hi if out.lo is None else out.lo
    expect(out.lo is not None and hi.shape == lo.shape == x.shape, f"out: expected two planes of shape {(N, p)}")
    expect(hi.stride() == lo.stride() and hi.stride(1) == 1, "out: expected one row stride and last stride 1")
    inverse = scale_N.reciprocal()
    for start in range(0, N if p else 0, 32_768):  # what a grid's second axis may have
        rows = slice(start, min(start + 32_768, N))
        grid = (-(-p // _SPLIT.blocks["BLOCK"]), rows.stop - rows.start)
        _split[grid](x[rows], inverse[rows], hi[rows], lo[rows], p, x.stride(0), hi.stride(0), **_SPLIT.options())
    return Planes(hi, lo, scale_N)


def padded(N: int, p: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an empty (N, p) matrix whose rows start at multiples of 64 entries, as `aligned` asks."""
    return torch.empty(N, -(-p // 64) * 64, dtype=dtype, device=device)[:, :p]


def aligned(x_Np: Tensor, *, whole: bool) -> Tensor:
    """Return the matrix itself if rows start at 16-byte steps and entries follow one another, else such a copy.

    Args:
        x_Np: the matrix.
        whole: also have its width a multiple of 16 entries, zeros added: loads without descriptors then stay wide.
    """
    N, p = x_Np.shape
    step = 16 // x_Np.element_size()
    usual = x_Np.stride(1) == 1 and x_Np.stride(0) % step == 0 and x_Np.stride(0) >= p and x_Np.data_ptr() % 16 == 0
    if usual and not (whole and (p % 16 or x_Np.stride(0) % 16)):
        return x_Np
    width = -(-p // 16) * 16 if whole else p
    copy = padded(N, width, x_Np.dtype, x_Np.device)
    copy[:, :p] = x_Np
    copy[:, p:] = 0
    return copy


def compilations(family: int) -> list[Compilation]:
    """Return what this file's launchers launch."""
    signature: dict[str, Any] = {"x": "*fp32", "inverse": "*fp32", "hi": "*fp16", "lo": "*fp16"}
    signature |= {"p": "i32", "stride_x": "i64", "stride_out": "i64"}
    aligned_names = ("p", "stride_x", "stride_out")
    return [Compilation("split", _split, family, signature, {}, _SPLIT, aligned=aligned_names)]
