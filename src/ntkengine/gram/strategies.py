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
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ntkengine.gram import kernels
from ntkengine.gram.frame import Frame
from ntkengine.gram.ghost import KEPT_BYTES, ghost
from ntkengine.gram.lookup import add_lookup, summed_rows
from ntkengine.gram.tiles import TILE_BYTES, Accumulator, Workspace
from ntkengine.gram.transforms import SIGNS, ZERO, signed
from ntkengine.products import prefers_onednn
from ntkengine.tangents.factors import Dense, ParameterFactors

TILE_PARAMETERS = 65_536  # longest inner product in the model's own precision
# Of a tile: with few rows and all columns every tile reads all inputs again (19 % of a sum at 128 tokens, 1,536 wide).
COLUMNS = 384
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


def kind_of(name: str, kind: str, frame: Frame, negligible: Collection[str]) -> str:
    """Return what `choose` is told of a parameter's factors: "zero" too where they would be signs of rounding.

    Args:
        name: of the parameter.
        kind: of its factors.
        frame: the wanted Gram.
        negligible: parameters whose gradient is nothing but rounding.
    """
    return "zero" if frame.transform in SIGNS and name in negligible else kind


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
        summed = summed_rows(factors)
        for each in totals:
            add_lookup(summed, sum(factors.sizes), each, root)
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
    factors: ParameterFactors, frame: Frame, root: Tensor | None, workspace: Workspace | None = None
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


def _like(factors: ParameterFactors) -> Tensor:
    return next(u.g if isinstance(u, Dense) else u.d for uses in factors.chunks for u in uses)
