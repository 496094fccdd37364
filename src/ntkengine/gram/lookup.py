"""Inner products of embedding tables' gradients: rows of equal tokens, summed by sample first.

Shape suffixes: S samples, C outputs, M rows, I entries of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ntkengine.gram.tiles import TILE_BYTES, Accumulator
from ntkengine.gram.transforms import SIGNS, signed
from ntkengine.tangents.factors import Lookup, ParameterFactors

_PAIR_BYTES = 4 << 20  # temporary products of a lookup
_COMMON = 4  # a token that one in so many samples has (a position, [CLS]) is summed as features: no scattered additions


def add_lookup(summed: tuple[Tensor, Tensor, Tensor], S: int, total: Accumulator, root: Tensor | None) -> None:
    """Take inner products of each sample's rows, summed by token, only between samples that share a token."""
    frame, w = total.frame, total.frame.width
    rows, samples, tokens = summed  # (M, C, I), sorted by token
    if root is not None:
        rows = rows * root[tokens][:, None]
    columns = signed(rows) if frame.transform in SIGNS else rows
    if frame.transform == "sign":
        rows = columns
    _, C, I = rows.shape  # noqa: E741
    _, counts = torch.unique_consecutive(tokens, return_counts=True)
    starts = counts.cumsum(0) - counts
    common = counts * _COMMON > S
    for part in common.nonzero()[:, 0].split(max(1, TILE_BYTES // (S * C * I * rows.element_size()))):
        spans = list(zip(starts[part].tolist(), counts[part].tolist(), strict=True))
        phi = _spread(rows, samples, spans, S)
        total.add_features(phi, None if columns is rows else _spread(columns, samples, spans, S))
    rare = (~common).repeat_interleave(counts)
    device = tokens.device
    mine = (rare & (samples >= frame.rows[0]) & (samples < frame.rows[1])).nonzero()[:, 0]
    theirs = (rare & (samples >= frame.columns[0]) & (samples < frame.columns[1])).nonzero()[:, 0]
    if not len(mine) or not len(theirs):
        return
    size = int(tokens[-1]) + 1
    row_bytes = C * I * rows.element_size()
    counts = torch.stack([torch.bincount(tokens[which], minlength=size) for which in (mine, theirs)], 1)
    starts = counts.cumsum(0) - counts
    shared = (counts > 0).all(1).nonzero()[:, 0]
    # Tokens that occur in equally many rows and in equally many columns go together.
    for m, n in counts[shared].unique(dim=0).tolist():
        first = starts[shared[(counts[shared] == torch.tensor([m, n], device=device)).all(1)]]
        together = min(_PAIR_BYTES // (8 * m * n * w**2), TILE_BYTES // ((m + n) * row_bytes))
        for part in first.split(max(1, together)):
            left, i = _runs_of(rows, samples, mine[part[:, :1] + torch.arange(m, device=device)], w)
            right, j = _runs_of(columns, samples, theirs[part[:, 1:] + torch.arange(n, device=device)], w)
            for layer in range(frame.layers):
                x, z = (y[:, :, layer] if frame.contraction == "per-output" else y.flatten(2) for y in (left, right))
                values = x @ z.transpose(1, 2)
                at = i[:, :, None].expand_as(values), j[:, None, :].expand_as(values)
                total.add_entries(layer, at[0].reshape(-1), at[1].reshape(-1), values.reshape(-1))


def _runs_of(rows: Tensor, samples: Tensor, index: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return rows at index (G, n) as (G, n, C, I), or (G, n·C, 1, I) for a full Gram, and their Gram rows."""
    x, s = rows[index], samples[index]
    if width == 1:
        return x, s
    C = x.shape[2]
    s = (s[:, :, None] * C + torch.arange(C, device=s.device)).flatten(1)
    return x.flatten(1, 2)[:, :, None], s


def _spread(rows: Tensor, samples: Tensor, spans: list[tuple[int, int]], S: int) -> Tensor:
    """Return tangent features (S, C, tokens·I) of some tokens' rows, zero for the samples that lack a token."""
    phi = rows.new_zeros(S, rows.shape[1], len(spans), rows.shape[2])
    for g, (start, count) in enumerate(spans):
        phi[:, :, g].index_add_(0, samples[start : start + count], rows[start : start + count])
    return phi.view(S, rows.shape[1], -1)


def summed_rows(factors: ParameterFactors) -> tuple[Tensor, Tensor, Tensor]:
    """Return (rows (M, C, I), sample (M,), token (M,)) with one row for each sample and token, sorted by token."""
    found = []
    at = 0
    for uses, n in zip(factors.chunks, factors.sizes, strict=True):
        for use in uses:
            if isinstance(use, Lookup) and use.ids.shape[1]:
                keys = use.ids.long() * n + torch.arange(n, device=use.d.device)[:, None]
                keys, inverse = torch.unique(keys.reshape(-1), return_inverse=True)
                found.append((use.d, inverse, keys % n + at, keys // n))
        at += n
    samples, tokens = (torch.cat([x[k] for x in found]) for k in (2, 3))
    order = tokens.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    like = found[0][0]
    dtype = torch.promote_types(like.dtype, torch.float32)
    # Written to where they belong: there is one copy of the rows, not one for each step.
    rows = torch.zeros(len(order), like.shape[1], like.shape[3], dtype=dtype, device=like.device)
    at = 0
    for d, inverse, own, _ in found:
        values = d.transpose(1, 2).reshape(-1, d.shape[1], d.shape[3]).to(dtype)
        rows.index_add_(0, place[at : at + len(own)][inverse], values)
        at += len(own)
    return rows, samples[order], tokens[order]
