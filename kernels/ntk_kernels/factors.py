"""Gradient factors of all samples in one piece, as `materialise` and `ghost` read them.

The gradient of output c of sample s is G_sc = Σ_t d_sct a_stᵀ. Shape suffixes: S samples, C outputs, T tokens, R and I
rows and columns of the parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ntk_kernels.planes import HALF, Planes, row_scale, split
from ntk_kernels.runtime import INTERPRETED, expect

_TOP = 13  # room for the rounding of a bound


@dataclass(frozen=True)
class Factors:
    """a (S, T, I) and d (S, C, T, R): in bfloat16 or float16, or as two float16 planes with a scale for each sample.

    Attributes:
        a_hi: (S, T, I).
        d_hi: (S, C, T, R).
        a_lo: like a_hi, or None.
        d_lo: like d_hi, or None.
        a_scale: (S,) float32 powers of two, with planes.
        d_scale: (S,) likewise.
        bound: (S,) float32: no entry of a sample's gradients is larger.
        lengths: (S,) int32: tokens of each sample; factors are zero beyond.
    """

    a_hi: Tensor
    d_hi: Tensor
    a_lo: Tensor | None
    d_lo: Tensor | None
    a_scale: Tensor | None
    d_scale: Tensor | None
    bound: Tensor
    lengths: Tensor


def pack(chunks: Sequence[tuple[Tensor, Tensor]]) -> Factors:
    """Return the factors of consecutive samples as one, zero beyond each chunk's tokens.

    Args:
        chunks: (a (n, T, I), d (n, C, T, R)) of n samples each, T its own: float32 (becomes planes), or bfloat16 or
            float16.

    Raises:
        ValueError: shapes or dtypes that do not go together.
    """
    expect(bool(chunks), "chunks: expected at least one")
    first_a, first_d = chunks[0]
    C, R, I = first_d.shape[1], first_d.shape[3], first_a.shape[2]  # noqa: E741
    for a, d in chunks:
        n, t, _ = a.shape
        expect(tuple(d.shape) == (n, C, t, R), f"d: expected {(n, C, t, R)}, got {tuple(d.shape)}")
        expect(a.shape[2] == I, f"a: expected {I} columns in every chunk, got {a.shape[2]}")
        expect(
            a.dtype == d.dtype == first_a.dtype and a.dtype in (*HALF, torch.float32),
            f"a, d: expected one dtype, float32, float16 or bfloat16, got {a.dtype} and {d.dtype}",
        )
    S, T = sum(len(a) for a, _ in chunks), max(a.shape[1] for a, _ in chunks)
    device, planes = first_a.device, first_a.dtype == torch.float32
    lengths = torch.cat([torch.full((len(a),), a.shape[1], dtype=torch.int32, device=device) for a, _ in chunks])
    if not planes:
        bound = torch.cat([_bound(a, d) for a, d in chunks])
        if INTERPRETED and first_a.dtype == torch.bfloat16:
            chunks = [(a.float(), d.float()) for a, d in chunks]
        whole_a, whole_d = (x if x.is_contiguous() else x.contiguous() for x in chunks[0])
        if len(chunks) > 1:
            whole_a = whole_a.new_zeros(S, T, I)
            whole_d = whole_d.new_zeros(S, C, T, R)
            at = 0
            for a, d in chunks:
                whole_a[at : at + len(a), : a.shape[1]] = a
                whole_d[at : at + len(a), :, : a.shape[1]] = d
                at += len(a)
        return Factors(whole_a, whole_d, None, None, None, None, bound, lengths)
    ragged = len({a.shape[1] for a, _ in chunks}) > 1
    new = torch.zeros if ragged else torch.empty
    a_hi, a_lo = (new(S, T, I, dtype=torch.float16, device=device) for _ in range(2))
    d_hi, d_lo = (new(S, C, T, R, dtype=torch.float16, device=device) for _ in range(2))
    scales, bounds, at = [], [], 0
    for a, d in chunks:
        n, t, _ = a.shape
        rows = slice(at, at + n)
        a_scale, d_scale = (row_scale(_largest(x.reshape(n, -1))) for x in (a, d))
        to_a = Planes(a_hi.view(S, -1)[rows, : t * I], a_lo.view(S, -1)[rows, : t * I])
        split(a.reshape(n, -1), a_scale, to_a)
        outputs = slice(at * C, (at + n) * C)
        to_d = Planes(d_hi.view(S * C, -1)[outputs, : t * R], d_lo.view(S * C, -1)[outputs, : t * R])
        split(d.reshape(n * C, -1), d_scale.repeat_interleave(C), to_d)
        scales.append((a_scale, d_scale))
        bounds.append(_bound(a, d))
        at += n
    a_scale, d_scale = (torch.cat(s) for s in zip(*scales, strict=True))
    return Factors(a_hi, d_hi, a_lo, d_lo, a_scale, d_scale, torch.cat(bounds), lengths)


def _largest(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, torch.inf, dim=-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])


def _bound(a: Tensor, d: Tensor) -> Tensor:
    """Return (n,): the largest of Σ_t max|a_t|·max|d_ct| over outputs, which bounds every entry of the gradients."""
    return (_largest(a).float()[:, None] * _largest(d).float()).sum(2).amax(1)


def output_scale(factors: Factors) -> Tensor:
    """Return (S,) float32 powers of two that, divided out, keep a sample's gradients within float16."""
    return row_scale(factors.bound, _TOP)
