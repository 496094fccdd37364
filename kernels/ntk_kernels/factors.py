"""Gradient factors of all samples in one piece, as `materialise` and `ghost` read them.

The gradient of output c of sample s is G_sc = Σ_t d_sct a_stᵀ. Shape suffixes: S samples, C outputs, T tokens, R and I
rows and columns of the parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ntk_kernels.planes import HALF, Planes, row_scale, split
from ntk_kernels.runtime import INTERPRETED, expect

_TOP = 13  # room for the rounding of a bound
_PIECE_BYTES = 128 << 20


@dataclass(frozen=True)
class Factors:
    """a (S, T, I) and d (S, C, T, R): in bfloat16 or float16, or as two float16 planes with a scale for each sample.

    Attributes:
        a_hi: (S, T, I).
        d_hi: (S, C, T, R).
        lengths: (S,) int32: tokens of each sample; factors are zero beyond.
        a_lo: like a_hi, or None.
        d_lo: like d_hi, or None.
        scale: (S,) float32 powers of two: what products of a and d are to be multiplied by; None for 1.
        out_scale: (S,) float32 powers of two that, divided out, keep a sample's gradients within float16; None where
            they need not.
    """

    a_hi: Tensor
    d_hi: Tensor
    lengths: Tensor
    a_lo: Tensor | None = None
    d_lo: Tensor | None = None
    scale: Tensor | None = None
    out_scale: Tensor | None = None


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
    counts = [(len(a), a.shape[1]) for a, _ in chunks]
    lengths = torch.tensor([t for n, t in counts for _ in range(n)], dtype=torch.int32, device=first_a.device)
    pieces = list(_joined(chunks))
    if first_a.dtype == torch.float32:
        return _planes(pieces, (S, C, T, R, I), lengths)
    if INTERPRETED and first_a.dtype == torch.bfloat16:
        pieces = [(a.float(), d.float()) for a, d in pieces]
    whole_a, whole_d = (x.contiguous() for x in pieces[0])
    if len(pieces) > 1:
        whole_a, whole_d = whole_a.new_zeros(S, T, I), whole_d.new_zeros(S, C, T, R)
        at = 0
        for a, d in pieces:
            whole_a[at : at + len(a), : a.shape[1]] = a
            whole_d[at : at + len(a), :, : a.shape[1]] = d
            at += len(a)
    if first_a.dtype == torch.bfloat16:
        return Factors(whole_a, whole_d, lengths)
    return Factors(whole_a, whole_d, lengths, out_scale=row_scale(_bound(whole_a, whole_d), _TOP))


def _joined(chunks: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the chunks with neighbours of one length joined, up to `_PIECE_BYTES`: fewer launches."""
    held: list[tuple[Tensor, Tensor]] = []
    size = 0
    for a, d in chunks:
        more = a.numel() * a.element_size() + d.numel() * d.element_size()
        if held and (a.shape[1] != held[0][0].shape[1] or size + more > _PIECE_BYTES):
            yield _cat(held)
            held, size = [], 0
        held.append((a, d))
        size += more
    yield _cat(held)


def _cat(held: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(held) == 1:
        return held[0]
    return torch.cat([a for a, _ in held]), torch.cat([d for _, d in held])


def _planes(pieces: list[tuple[Tensor, Tensor]], shape: tuple[int, int, int, int, int], lengths: Tensor) -> Factors:
    """Return float32 factors as two float16 planes, with a scale for each sample's a and d."""
    S, C, T, R, I = shape  # noqa: E741
    ragged = len({a.shape[1] for a, _ in pieces}) > 1
    new = torch.zeros if ragged else torch.empty
    a_hi, a_lo = (new(S, T, I, dtype=torch.float16, device=lengths.device) for _ in range(2))
    d_hi, d_lo = (new(S, C, T, R, dtype=torch.float16, device=lengths.device) for _ in range(2))
    scales, bounds, at = [], [], 0
    for a, d in pieces:
        n, t, _ = a.shape
        rows, outputs = slice(at, at + n), slice(at * C, (at + n) * C)
        a_scale, d_scale = (row_scale(_largest(x.reshape(n, -1))) for x in (a, d))
        to_a = Planes(a_hi.view(S, -1)[rows, : t * I], a_lo.view(S, -1)[rows, : t * I])
        split(a.reshape(n, -1), a_scale, to_a)
        to_d = Planes(d_hi.view(S * C, -1)[outputs, : t * R], d_lo.view(S * C, -1)[outputs, : t * R])
        split(d.reshape(n * C, -1), d_scale.repeat_interleave(C), to_d)
        scales.append(a_scale * d_scale)
        bounds.append(_bound(a, d))
        at += n
    out_scale = row_scale(torch.cat(bounds), _TOP)
    return Factors(a_hi, d_hi, lengths, a_lo, d_lo, torch.cat(scales), out_scale)


def _largest(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, torch.inf, dim=-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])


def _bound(a: Tensor, d: Tensor) -> Tensor:
    """Return (n,): the largest of Σ_t max|a_t|·max|d_ct| over outputs, which bounds every entry of the gradients."""
    return (_largest(a).float()[:, None] * _largest(d).float()).sum(2).amax(1)
