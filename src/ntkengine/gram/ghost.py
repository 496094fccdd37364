"""Inner products of gradients from inner products of their factors: Σ_{t,s} (a_t·a_s)(d_t·d_s), no gradient made.

Shape suffixes: S samples, C outputs, T tokens, R and I rows and columns of the parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ntkengine.gram.frame import Frame
from ntkengine.gram.tiles import Accumulator, product
from ntkengine.tangents.factors import Outer, ParameterFactors

_PAIR_BYTES = 4 << 20  # products of token pairs at once: they stay in the second-level cache
_TOKENS = 64  # rows from which a product runs at its full rate
KEPT_BYTES = 16 << 20  # products of inputs kept for the next parameter that reads the same: a key's after a query's


def ghost(factors: ParameterFactors, totals: Sequence[Accumulator], poll: Callable[[], None]) -> None:
    """Add a linear map's inner products to Grams, block by block; sums over one token axis, then float64.

    Args:
        factors: of outer uses, one for each microbatch or none.
        totals: where to add: Grams of the same samples and outputs.
        poll: called now and then.

    Cost: pairs·T²·2(I + C·R) flops.
    """
    a_STI, d_STCR = _joined(factors)
    frame = totals[0].frame
    S, T, C, R = d_STCR.shape
    w = frame.width
    if frame.contraction == "per-output":
        layers = [d_STCR[:, :, c].reshape(S * T, R) for c in range(C)]
    elif frame.contraction == "full":  # one Gram row for each sample and output
        layers = [d_STCR.transpose(1, 2).reshape(S * C * T, R)]
    else:
        layers = [d_STCR.reshape(S * T, C * R)]
    a = (a_STI.repeat_interleave(w, 0) if w > 1 else a_STI).reshape(S * w * T, -1)
    inputs = [use.a for uses in factors.chunks for use in uses if isinstance(use, Outer)]
    for total in totals:
        known = total.workspace.pairs_of(inputs, total.frame)
        for rows, columns in _blocks(total.frame, T):
            left, right = (slice(x.start * T, x.stop * T) for x in (rows, columns))
            place = rows.start, columns.start
            if (pairs := known.get(place)) is None:
                pairs = product(a[left], a[right])
                if len(a) ** 2 * pairs.element_size() <= KEPT_BYTES:
                    known[place] = pairs
            m, q = rows.stop - rows.start, columns.stop - columns.start
            r, c = rows.start - total.r0, columns.start - total.c0
            for layer, d in zip(total.K, layers, strict=True):
                values = product(d[left], d[right]).to(torch.promote_types(d.dtype, torch.float32)).mul_(pairs)
                layer[r : r + m, c : c + q] += values.view(m, T, q, T).sum(3).sum(1, dtype=torch.float64)
            poll()


def _blocks(frame: Frame, T: int) -> list[tuple[slice, slice]]:
    """Return blocks of Gram rows and columns, of few shapes: oneDNN makes a kernel for every one, and keeps it."""
    total = (frame.rows[1] - frame.rows[0]) * frame.width
    area = max(1, _PAIR_BYTES // (8 * T * T))
    # Of few samples an eighth, or what fills a product: else there is no triangle to save.
    most = max(1, min(math.isqrt(area), max(-(-total // 8), -(-_TOKENS // T))))
    rows = -(-total // -(-total // most))  # almost equal ones
    columns = max(1, area // rows // rows) * rows
    return [
        (slice(start, stop), slice(at, min(at + columns, last)))
        for start, stop, last in frame.panels(rows)
        for at in range(frame.columns[0] * frame.width, last, columns)
    ]


def _joined(factors: ParameterFactors) -> tuple[Tensor, Tensor]:
    """Return all samples' factors with one token axis: a (S, T, I), d (S, T, C, R), zero where there is none."""
    if len(factors.chunks) == 1 and len(factors.chunks[0]) == 1:
        use = factors.chunks[0][0]
        if isinstance(use, Outer):
            return use.a, use.d.transpose(1, 2)
    like = next(u for uses in factors.chunks for u in uses if isinstance(u, Outer))
    S, T = sum(factors.sizes), factors.tokens
    R, I = factors.shape  # noqa: E741
    a = like.a.new_zeros(S, T, I)
    d = like.d.new_zeros(S, T, like.d.shape[1], R)
    at = 0
    for uses, n in zip(factors.chunks, factors.sizes, strict=True):
        for use in uses:
            if isinstance(use, Outer):
                t = use.d.shape[2]
                a[at : at + n, :t] = use.a
                d[at : at + n, :t] = use.d.transpose(1, 2)
        at += n
    return a, d
