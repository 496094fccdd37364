"""Inner products of gradients from inner products of their factors: Σ_{t,s} (a_t·a_s)(d_t·d_s), no gradient made.

Shape suffixes: S samples, C outputs, T tokens, R and I rows and columns of the parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ntkengine.gram.tiles import Accumulator, Frame, product
from ntkengine.tangents.factors import Outer, ParameterFactors

_PAIR_BYTES = 4 << 20  # products of token pairs at once: they stay in the second-level cache
_TOKENS = 64  # rows from which a product runs at its full rate
_KEPT_BYTES = 16 << 20  # products of inputs kept for the next parameter that reads the same: a key's after a query's


def ghost(factors: ParameterFactors, totals: Sequence[Accumulator], poll: Callable[[], None]) -> None:
    """Add a linear map's inner products to Grams, row panel by row panel; sums over one token axis, then float64.

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
        for start, stop, last in _panels(total.frame, T):
            left, right = slice(start * T, stop * T), slice(total.c0 * T, last * T)
            q = last - total.c0
            if (pairs := known.get(start)) is None:
                pairs = product(a[left], a[right])
                if len(a) ** 2 * pairs.element_size() <= _KEPT_BYTES:
                    known[start] = pairs
            for layer, d in zip(total.K, layers, strict=True):
                values = product(d[left], d[right]).to(torch.promote_types(d.dtype, torch.float32)).mul_(pairs)
                sums = values.view(stop - start, T, q, T).sum(3).sum(1, dtype=torch.float64)
                layer[start - total.r0 : stop - total.r0, :q] += sums
            poll()


def _panels(frame: Frame, T: int) -> list[tuple[int, int, int]]:
    rows, columns = ((stop - start) * frame.width for start, stop in (frame.rows, frame.columns))
    # Of few samples an eighth, or what fills a product: else there is no triangle to save.
    return frame.panels(max(1, min(_PAIR_BYTES // (8 * T * T * max(1, columns)), max(-(-rows // 8), -(-_TOKENS // T)))))


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
