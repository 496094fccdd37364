"""How one parameter's factors become Gram entries: materialise, ghost, lookup, or explicit. The only kernel dispatch.

| strategy | flops (S rows, C outputs folded in, T tokens) | best when |
|---|---|---|
| materialise: tiles Φ (S × p) of the gradient, then Φ Φᵀ | 2STRI + pairs·2RI | T ≳ √(d/2) |
| ghost: Σ_{t,s} (a_t·a_s)(d_t·d_s) | pairs·T²·2(R + I) | heads, short T |
| lookup: summed rows of equal tokens | Σ_token n_token²·2I | embeddings |
| explicit: the stored gradient, tile by tile | pairs·2RI | norms, biases |

Shape suffixes: S samples, C outputs, T tokens, R and I rows and columns of the parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ntkengine.gram import kernels
from ntkengine.gram.ghost import KEPT_BYTES, ghost
from ntkengine.gram.tiles import Accumulator, Frame, Workspace
from ntkengine.gram.transforms import SIGNS, ZERO, signed
from ntkengine.products import prefers_onednn
from ntkengine.tangents.factors import Dense, Lookup, ParameterFactors

TILE_PARAMETERS = 65_536  # longest inner product in the model's own precision
TILE_BYTES = 16 << 20  # Φ stays in the last-level cache
# Of a tile: with few rows and all columns every tile reads all inputs again (19 % of a sum at 128 tokens, 1,536 wide).
COLUMNS = 384
_PAIR_BYTES = 4 << 20  # temporary products of a lookup
_COMMON = 4  # a token that one in so many samples has (a position, [CLS]) is summed as features: no scattered additions
# How much longer a flop takes on the CPU where many small products are made instead of a large one (rates, not counts,
# decide: measured on a Zen 5, 140 to 200 against 500 GFLOP/s in float32, 440 to 870 against 1,000 in bfloat16).
_SMALL_PRODUCTS = 3.5


def choose(
    kind: str,
    shape: tuple[int, int],
    tokens: int,
    samples: int,
    frame: Frame,
    *others: Frame,
    room: float = math.inf,
    entry: int = 4,
) -> tuple[str, float]:
    """Return the cheapest strategy for a parameter and its flops.

    Args:
        kind: `ParameterFactors.kind`.
        shape: (R, I).
        tokens: longest token axis after compaction.
        samples: S.
        frame: the wanted Gram.
        others: further Grams of the same samples, made from the same features.
        room: bytes that `copied` factors may take.
        entry: bytes of one of their entries.
    """
    R, I = shape  # noqa: E741
    outputs = frame.outputs * frame.width  # pairs count samples; a full Gram has C² entries for each
    frames = (frame, *others)
    if kind == "zero":
        return "zero", 0.0
    if kind == "lookup":
        return "lookup", sum(f.pairs for f in frames) * outputs * 2.0 * tokens * I
    if kind == "dense":
        return "explicit", sum(f.computed for f in frames) * outputs * 2.0 * R * I
    costs = outer_costs(shape, tokens, samples, *frames)
    filling = 2.0 * samples * frame.outputs * tokens * R * I
    slow = (_SMALL_PRODUCTS - 1.0) * filling if prefers_onednn() else 0.0
    fits = kind == "outer" and frame.transform == "sgd" and copied(shape, tokens, samples, frame, entry) <= room
    if fits and costs["ghost"] < costs["materialise"] + slow:
        return "ghost", costs["ghost"]
    return "materialise", costs["materialise"]


def copied(shape: tuple[int, int], tokens: int, samples: int, frame: Frame, entry: int) -> float:
    """Return the bytes of what ghost products put beside an outer product's factors; arguments as `choose`."""
    R, I = shape  # noqa: E741
    C = frame.outputs
    sides = {"per-output": C * R, "full": C * (R + I)}.get(frame.contraction, 0)
    pairs = (samples * frame.width * tokens) ** 2
    return float(samples * tokens * (I + C * R + sides) * entry + min(KEPT_BYTES, pairs * entry))


def outer_costs(shape: tuple[int, int], tokens: int, samples: int, frame: Frame, *others: Frame) -> dict[str, float]:
    """Return the flops of each strategy for an outer product's factors; arguments as `choose`."""
    R, I = shape  # noqa: E741
    outputs = frame.outputs * frame.width
    pairs, computed = (sum(x) for x in zip(*((f.pairs, f.computed) for f in (frame, *others)), strict=True))
    return {
        "materialise": 2.0 * samples * frame.outputs * tokens * R * I + computed * outputs * 2.0 * R * I,
        "ghost": pairs * tokens**2 * 2.0 * (I + R * outputs),
    }


def contract(
    factors: ParameterFactors,
    strategy: str,
    total: Accumulator,
    root: Tensor | None = None,
    *others: Accumulator,
    poll: Callable[[], None] = lambda: None,
) -> None:
    """Add one parameter's inner products to the Gram.

    Args:
        factors: all samples' gradient of the parameter.
        strategy: from `choose`.
        total: where to add.
        root: (R, I), what gradients are multiplied by first: the square root of a diagonal preconditioner.
        others: further Grams of the same samples, outputs and inner product: features are made once for all.
        poll: called now and then.
    """
    totals = (total, *others)
    if strategy == "zero" or total.kernels and kernels.contract(factors, strategy, totals, root, poll):
        return
    if strategy == "ghost":
        ghost(factors, totals, poll)
    elif strategy == "lookup":
        summed = _summed_rows(factors)
        for each in totals:
            _lookup(summed, sum(factors.sizes), each, root)
            poll()
    else:
        for layer, part, frame in _by_layer(factors, total.frame):
            for phi, other in feature_tiles(part, frame, root, total.workspace):
                for each in totals:
                    each.add_features(phi, other, layer)
                poll()


def _by_layer(factors: ParameterFactors, frame: Frame) -> Iterator[tuple[int, ParameterFactors, Frame]]:
    """Yield (first layer, factors, frame): separate outputs one by one, so that a tile of one fills the cache."""
    if frame.contraction != "per-output":
        yield 0, factors, frame
        return
    for c in range(frame.outputs):
        chunks = [[use.output(c) for use in uses] for uses in factors.chunks]
        yield c, replace(factors, chunks=chunks), replace(frame, outputs=1)


def feature_tiles(
    factors: ParameterFactors, frame: Frame, root: Tensor | None = None, workspace: Workspace | None = None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield tangent features (S, C, p), blocks of a parameter's rows and columns, in a buffer that is reused.

    With them the columns' features, where those are not the rows'. Put side by side the features are the same,
    however many rows fit a block.
    """
    workspace = workspace or Workspace()
    R, I = factors.shape  # noqa: E741
    like = _like(factors)
    S, C = sum(factors.sizes), frame.outputs
    width = min(I, COLUMNS)
    fit = TILE_BYTES // (S * C * width * like.element_size())
    height = max(1, min(R, TILE_PARAMETERS // (width * frame.folded), max(fit, 16)))
    if all(isinstance(u, Dense) for uses in factors.chunks for u in uses) and I == 1:
        height = R
    buffer = workspace.take(like, S * C * height * width)
    floor = _floor(factors, like) if frame.transform in SIGNS else None
    for columns in _slices(I, width):
        for rows in _slices(R, height):
            shape = (S, C, rows.stop - rows.start, columns.stop - columns.start)
            phi = buffer[: math.prod(shape)].view(shape)
            at = 0
            for uses, n in zip(factors.chunks, factors.sizes, strict=True):
                out = phi[at : at + n]
                for k, use in enumerate(uses):
                    use.block(rows, columns, out, add=k > 0)
                if not uses:
                    out.zero_()
                at += n
            if root is not None:
                phi.mul_(root[rows, columns])
            signs = None if floor is None else signed(phi, floor).view(S, C, -1)
            if frame.transform == "sign" and signs is not None:
                yield signs, None
            else:
                yield phi.view(S, C, -1), signs


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _floor(factors: ParameterFactors, like: Tensor) -> Tensor:
    """Return (S, C or 1, 1, 1): below it an entry of an explicit gradient is rounding and has no sign."""
    floors = []
    for uses, n in zip(factors.chunks, factors.sizes, strict=True):
        dense = uses[0].g if len(uses) == 1 and isinstance(uses[0], Dense) else torch.zeros(n, 1, 1, 1).to(like)
        floors.append((ZERO.get(like.dtype, 1e-3) * dense.abs().amax((2, 3), keepdim=True)).expand(n, -1, 1, 1))
    width = max(f.shape[1] for f in floors)
    return torch.cat([f.expand(-1, width, 1, 1) for f in floors])


def _lookup(summed: tuple[Tensor, Tensor, Tensor], S: int, total: Accumulator, root: Tensor | None = None) -> None:
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


def _summed_rows(factors: ParameterFactors) -> tuple[Tensor, Tensor, Tensor]:
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


def _like(factors: ParameterFactors) -> Tensor:
    return next(u.g if isinstance(u, Dense) else u.d for uses in factors.chunks for u in uses)
