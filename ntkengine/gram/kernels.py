"""Contractions in Triton kernels: the strategies that have one, factors packed into what it reads.

Shape suffixes: S samples, C outputs, T tokens, R and I rows and columns of the parameter, L rows of a lookup.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from ntk_kernels.factors import Factors, pack
from ntk_kernels.ghost import ghost
from ntk_kernels.lookup import lookup, sum_rows
from ntk_kernels.materialise import buffer, materialise, row_width
from torch import Tensor

from ntkengine.gram.transforms import SIGNS, signed
from ntkengine.tangents.factors import Lookup, Outer, ParameterFactors

if TYPE_CHECKING:
    from ntkengine.gram.tiles import Accumulator

# A tile of features is written once and read once, 16 bytes of traffic for 4 of float32 grade: under 0.2 ms on an H100,
# where launching its kernels takes about 0.1 ms. Tiles that fit in the second-level cache would be all launches.
FEATURE_BYTES = 128 << 20


def contract(factors: ParameterFactors, strategy: str, total: Accumulator, root: Tensor | None) -> bool:
    """Add one parameter's inner products to the Gram; return False, and do nothing, where no kernel does that.

    Args:
        factors: all samples' gradient of the parameter.
        strategy: from `strategies.choose`.
        total: where to add.
        root: (R, I), what gradients are multiplied by first, or None.
    """
    if strategy == "lookup":
        _lookup(factors, total, root)
        return True
    if factors.kind != "outer" or root is not None or strategy not in ("ghost", "materialise"):
        return False
    packed = pack(_chunks(factors))
    if strategy == "ghost":
        _ghost(packed, total)
    else:
        _materialise(packed, factors.shape, total)
    return True


def _chunks(factors: ParameterFactors) -> list[tuple[Tensor, Tensor]]:
    """Return each microbatch's a (n, T, I) and d (n, C, T, R); no tokens where a gradient is zero."""
    like = next(u for uses in factors.chunks for u in uses if isinstance(u, Outer))
    R, I = factors.shape  # noqa: E741
    C = like.d.shape[1]
    found = []
    for uses, n in zip(factors.chunks, factors.sizes, strict=True):
        use = uses[0] if uses else None
        if isinstance(use, Outer):
            found.append((use.a, use.d))
        else:
            found.append((like.a.new_zeros(n, 0, I), like.d.new_zeros(n, C, 0, R)))
    return found


def _ghost(packed: Factors, total: Accumulator) -> None:
    frame = total.frame
    for layer in range(frame.layers):
        ghost(
            packed,
            total.K[layer],
            total.r0,
            total.c0,
            lower=frame.symmetric,
            full=frame.contraction == "full",
            output=layer if frame.contraction == "per-output" else None,
        )


def _materialise(packed: Factors, shape: tuple[int, int], total: Accumulator) -> None:
    frame = total.frame
    R = shape[0]
    separate = frame.contraction in ("full", "per-output")
    sign = frame.transform == "sign"
    entry = packed.a_hi.element_size() * (1 if sign or packed.a_lo is None else 2)
    gram_rows = len(packed.lengths) * (packed.d_hi.shape[1] if separate else 1)
    fit = FEATURE_BYTES // (gram_rows * entry * row_width(packed, 16, separate=separate))
    rows = min(R, 16 * max(1, fit))  # whole blocks of 16: loads stay wide
    out = buffer(packed, rows, separate=separate, sign=sign)
    other = buffer(packed, rows, separate=separate, sign=True) if frame.transform == "asymmetric-sign" else None
    for start in range(0, R, rows):
        stop = min(start + rows, R)
        phi = materialise(packed, start, stop, out, separate=separate, sign=sign)
        columns = None
        if other is not None:
            columns = materialise(packed, start, stop, other, separate=separate, sign=True)
        total.add_planes(phi, columns)


def _lookup(factors: ParameterFactors, total: Accumulator, root: Tensor | None) -> None:
    frame = total.frame
    found = []
    at = 0
    for uses, n in zip(factors.chunks, factors.sizes, strict=True):
        for use in uses:
            if isinstance(use, Lookup) and use.ids.shape[1]:
                rows, sample, token = sum_rows(use.ids, use.d)
                found.append((rows, sample + at, token))
        at += n
    rows, samples, tokens = (torch.cat(parts) for parts in zip(*found, strict=True))
    tokens, order = tokens.sort(stable=True)
    rows, samples = rows[order], samples[order]  # (L, C, I)
    if root is not None:
        rows = rows * root[tokens][:, None]
    columns = signed(rows) if frame.transform in SIGNS else None
    if frame.transform == "sign" and columns is not None:
        rows, columns = columns, None
    C = rows.shape[1]
    if frame.contraction == "full":  # one Gram row for each sample and output
        samples = (samples[:, None] * C + torch.arange(C, device=samples.device)).reshape(-1)
        tokens = tokens.repeat_interleave(C)

    def rows_of(x: Tensor, layer: int) -> Tensor:
        return x[:, layer] if frame.contraction == "per-output" else x.reshape(len(samples), -1)

    for layer in range(frame.layers):
        right = None if columns is None else rows_of(columns, layer)
        K = total.K[layer]
        left = rows_of(rows, layer)
        lookup(left, samples, tokens, K, total.r0, total.c0, columns_LD=right, lower=frame.symmetric)
