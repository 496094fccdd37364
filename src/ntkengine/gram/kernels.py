"""Contractions in Triton kernels: the strategies that have one, factors packed into what it reads.

Shape suffixes: S samples, C outputs, T tokens, R and I rows and columns of the parameter, L rows of a lookup.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from ntk_kernels.factors import Factors, pack
from ntk_kernels.ghost import ghost
from ntk_kernels.lookup import lookup, sum_rows
from ntk_kernels.materialise import buffer, materialise
from torch import Tensor

from ntkengine.gram.transforms import SIGNS, signed
from ntkengine.tangents.factors import Lookup, Outer, ParameterFactors

if TYPE_CHECKING:
    from ntkengine.gram.tiles import Accumulator

# A count, not a measurement: the three launches of a tile take about 0.2 ms of the host's time, and at this size its
# products take an H100 as long or longer; a tile that stays in the second-level cache would wait for launches. Its
# traffic, 8 bytes for an entry of float32 grade, is small beside the 3·N products the entry goes into.
FEATURE_BYTES = 256 << 20
BLOCK = 128  # of rows and columns that a tile has at least: what a program makes


def contract(
    factors: ParameterFactors,
    strategy: str,
    totals: Sequence[Accumulator],
    root: Tensor | None,
    poll: Callable[[], None],
) -> bool:
    """Add one parameter's inner products to Grams; return False, and do nothing, where no kernel does that.

    Args:
        factors: all samples' gradient of the parameter.
        strategy: from `strategies.choose`.
        totals: where to add: Grams of the same samples, outputs and inner product.
        root: (R, I), what gradients are multiplied by first, or None.
        poll: called now and then.
    """
    if strategy == "lookup":
        _lookup(factors, totals, root)
        return True
    if factors.kind != "outer" or root is not None or strategy not in ("ghost", "materialise"):
        return False
    packed = pack(_chunks(factors))
    if strategy == "ghost":
        for total in totals:
            _ghost(packed, total)
            poll()
    else:
        _materialise(packed, factors.shape, totals, poll)
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


def _materialise(
    packed: Factors, shape: tuple[int, int], totals: Sequence[Accumulator], poll: Callable[[], None]
) -> None:
    frame = totals[0].frame
    R, I = shape  # noqa: E741
    S, C = packed.d_hi.shape[:2]
    separate = frame.contraction in ("full", "per-output")
    sign = frame.transform == "sign"
    entry = packed.a_hi.element_size() * (1 if sign or packed.a_lo is None else 2)
    high, wide = tile_shape(R, I, FEATURE_BYTES // (S * C * entry))
    out = buffer(packed, high * wide, separate=separate, sign=sign)
    signs = buffer(packed, high * wide, separate=separate, sign=True) if frame.transform == "asymmetric-sign" else None
    for row in range(0, R, high):
        for column in range(0, I, wide):
            rows, columns = (row, min(row + high, R)), (column, min(column + wide, I))
            phi = materialise(packed, rows, columns, out, separate=separate, sign=sign)
            other = None
            if signs is not None:
                other = materialise(packed, rows, columns, signs, separate=separate, sign=True)
            for total in totals:
                total.add_planes(phi, other)
            poll()


def tile_shape(R: int, I: int, entries: int) -> tuple[int, int]:  # noqa: E741
    """Return a tile's rows and columns: about `entries` parameters, whole blocks, as wide as may be.

    Args:
        R: rows of the parameter.
        I: its columns.
        entries: parameters that a tile may have; it has a block at least.
    """
    high = min(R, BLOCK)
    wide = min(I, max(1, entries // (high * BLOCK)) * BLOCK)
    return (min(R, max(1, entries // (I * BLOCK)) * BLOCK) if wide == I else high), wide


def _lookup(factors: ParameterFactors, totals: Sequence[Accumulator], root: Tensor | None) -> None:
    frame = totals[0].frame
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
        left = rows_of(rows, layer)
        for total in totals:
            K, lower = total.K[layer], total.frame.symmetric
            lookup(left, samples, tokens, K, total.r0, total.c0, columns_LD=right, lower=lower)
