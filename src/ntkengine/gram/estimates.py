"""Estimates: a job's plan from the model's structure and the samples, and what memory it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from ntk_kernels.fold import SLAB_BYTES
from ntk_kernels.syrk import PANEL_BYTES
from torch import nn

from ntkengine.gram.frame import Frame
from ntkengine.gram.kernels import BLOCK, FEATURE_BYTES
from ntkengine.gram.layout import Needs
from ntkengine.gram.plan import Plan, PlanRow
from ntkengine.gram.strategies import COLUMNS, choose, copied, kind_of
from ntkengine.gram.tiles import TILE_BYTES
from ntkengine.inputs.attributes import stored_weight
from ntkengine.inputs.batches import Samples
from ntkengine.inputs.parameters import module_of
from ntkengine.inputs.streaming import entry_of, streamed_entries
from ntkengine.tangents.sketch import Sketch
from ntkengine.tangents.structure import Structure
from ntkengine.tangents.sweep import KEEP_BYTES

# Memory that kept activations take for each byte of them: freed ones between them leave gaps (measured with glibc).
_HEAP = 1.35
# What the sweep does -> what a plan calls it.
_SHOWN = {
    "outer-transposed": "outer",
    "sum": "diagonal",
    "norm": "diagonal",
    "channels": "diagonal",
    "leaf": "explicit-leaf",
    "block": "explicit-block",
}


def make_plan(
    model: nn.Module,
    structure: Structure,
    samples: Samples,
    frame: Frame,
    per_module: bool,
    sketches: Mapping[str, Sketch],
) -> Plan:
    """Return the plan of a job whose structure is known.

    Args:
        model: the model, in the dtype it will run in.
        structure: from the probe.
        samples: the job's samples.
        frame: the wanted Gram.
        per_module: whether every module gets its own accumulator.
        sketches: by parameter, what is kept of its gradient.
    """
    parameter = next(iter(model.parameters()))
    size = parameter.element_size()
    lengths = np.concatenate(samples.lengths)
    S, C, tokens = samples.total, structure.outputs, int(lengths.sum())
    rows = []
    projection = 0.0
    width = 0
    last = {
        path.parameter: path for segment in sorted(structure.paths, reverse=True) for path in structure.paths[segment]
    }
    for path in last.values():
        shape = structure.shapes[path.parameter]
        kinds, kind = structure.kinds(path.parameter), structure.factor_kind(path.parameter)
        T = structure.tokens_of(path.parameter, samples.mean_tokens)
        wanted = kind_of(path.parameter, kind, frame, structure.negligible)
        strategy, flops = choose(wanted, shape, T, S, frame)
        held = S * C * shape[0] * shape[1] if kind == "dense" else S * T * (shape[1] + C * shape[0])
        held = S * T * C * shape[1] if kind == "lookup" else held
        shown = "+".join(sorted({_SHOWN.get(k, k) for k in kinds}))
        sketch = sketches.get(path.parameter)
        if sketch is not None:
            strategy, flops = choose("lookup" if sketch.lookup else "dense", sketch.shape, T, S, frame)
            held = S * C * sketch.features * (T if sketch.lookup else 1)
            shown += f", {sketch.label}"
            projection += S * sketch.flops(T, C)
        segment = structure.stack.segment_name(path.segment)
        name = path.parameter
        width = max(width, shape[0] * shape[1]) if "norm" in kinds else width
        row = PlanRow(module_of(name), name, segment, shown, strategy, *shape, T, flops, float(held * size))
        row.features = None if sketch is None else sketch.features
        rows.append(row)
    rows.sort(key=lambda row: row.parameter)
    ledger = {row.parameter for row in rows} | set(structure.unused)
    modules = len({row.module for row in rows}) if per_module else 0
    linear = sum(_matrix(m) for m in model.modules() if not isinstance(m, nn.Embedding))
    width = width or getattr(getattr(model, "config", None), "hidden_size", 0)
    return Plan(
        rows,
        structure.unused,
        structure.negligible,
        [name for name, _ in model.named_parameters() if name not in ledger],
        S,
        tokens,
        C,
        len(samples.chunks),
        structure.stack.depth,
        2.0 * linear * tokens * (2 + C),
        float(tokens * (width or 0) * size * (structure.stack.depth + C)),
        max((sum(part.values()) for part in _factors(rows)), default=0.0),
        8.0 * frame.entries * (1 + modules),
        rate=1.0,
        projection_flops=projection,
    )


def shorten(plan: Plan, structure: Structure, frame: Frame, tokens: Mapping[str, int]) -> None:
    """Correct the rows of parameters of which fewer tokens count, as a sweep of a few samples has shown.

    Args:
        plan: changed in place.
        structure: from the probe, which sees this only in the head.
        frame: the wanted Gram.
        tokens: by parameter, tokens whose output gradients are not zero.
    """
    for row in plan.parameters:
        found = tokens.get(row.parameter, row.tokens)
        if row.features is not None or found >= row.tokens or row.strategy == "zero":
            continue
        kind = structure.factor_kind(row.parameter)
        row.bytes *= found / row.tokens
        row.tokens = found
        row.strategy, row.flops = choose(kind, (row.rows, row.columns), found, plan.samples, frame)


def needs_of(
    plan: Plan,
    structure: Structure,
    model: nn.Module,
    dtype: torch.dtype,
    frame: Frame,
    sketches: Mapping[str, Sketch],
    *,
    kernels: bool,
    double: bool,
) -> Needs:
    """Return what a planned job takes.

    Args:
        plan: without a layout.
        structure: from the probe, which has measured a token's activations.
        model: as it is probed.
        dtype: what it will run in.
        frame: the wanted Gram.
        sketches: by parameter, what is kept of its gradient.
        kernels: whether contractions run in Triton kernels, which read a parameter's factors from one piece.
        double: whether a float64 copy of the model measures the noise.
    """
    tiles = (
        min(min(row.columns, COLUMNS) * min(row.rows, 16), row.features or row.rows * row.columns)
        for row in plan.parameters
    )
    widest = plan.samples * plan.outputs * max(tiles, default=0)
    streamed = streamed_entries(model) * dtype.itemsize
    parameter = next(iter(model.parameters()))
    entry = parameter.element_size()
    segments: dict[str, int] = {}
    for row in plan.parameters:
        segments[row.segment] = segments.get(row.segment, 0) + row.rows * row.columns
    norms = (
        sum(math.prod(structure.shapes[path.parameter]) for path in paths if "norm" in path.kind.split("+"))
        for paths in structure.paths.values()
    )
    tile = max(float(TILE_BYTES), float(widest * dtype.itemsize))
    if kernels:
        least = plan.samples * plan.outputs * BLOCK**2 * dtype.itemsize
        tile = max(tile, FEATURE_BYTES, least) + max((row.bytes for row in plan.parameters), default=0.0)
        tile += SLAB_BYTES + PANEL_BYTES
    projections = (
        sum(sketches[path.parameter].bytes(dtype.itemsize) for path in paths if path.parameter in sketches)
        for paths in structure.paths.values()
    )
    share = plan.hidden_bytes / max(1, plan.blocks + plan.outputs)
    kept, kept_bytes = (0, 0.0) if streamed else kept_microbatches(plan, structure)
    return Needs(
        samples=plan.samples,
        tokens=plan.tokens,
        outputs=plan.outputs,
        gram=plan.gram_bytes,
        hidden=share * plan.blocks,
        cotangents=share * plan.outputs,
        factors=_factors(plan.parameters),
        feature_tile=tile,
        activations=1.5 * max(structure.held, default=0.0) * dtype.itemsize / 4,
        norms=float(max(norms, default=0) * plan.outputs * dtype.itemsize),
        weights=float(streamed),
        entry=entry,
        parameter=max(row.rows * row.columns for row in plan.parameters) if plan.parameters else 0,
        segment=max(segments.values(), default=0),
        kept=_HEAP * kept_bytes * dtype.itemsize / parameter.element_size(),
        kept_share=kept / plan.microbatches,
        copy=0.0 if dtype == parameter.dtype else float(sum(p.numel() for p in model.parameters()) * dtype.itemsize),
        double=8.0 * _loaded(model) if double and parameter.dtype != torch.float64 else 0.0,
        projections=float(max(projections, default=0)),
        copies=max((_copies(row, row.strategy, plan, frame, entry) for row in plan.parameters), default=0.0),
        copies_in_pieces=max(
            (_copies(row, _in_pieces(row, plan, frame), plan, frame, entry) for row in plan.parameters), default=0.0
        ),
    )


def kept_microbatches(plan: Plan, structure: Structure) -> tuple[int, float]:
    """Return how many microbatches' activations a sweep keeps, the last beyond `KEEP_BYTES`, and their bytes."""
    each = sum(structure.held) * plan.tokens / plan.microbatches
    count = min(plan.microbatches, -int(-KEEP_BYTES // each)) if each else 0
    return count, count * each


def _copies(row: PlanRow, strategy: str, plan: Plan, frame: Frame, entry: int) -> float:
    """Return the bytes of a parameter's factors that a contraction puts in another order."""
    if strategy == "lookup":
        return row.bytes * (1.0 if frame.transform == "sgd" else 2.0)
    return copied((row.rows, row.columns), row.tokens, plan.samples, frame, entry) if strategy == "ghost" else 0.0


def _in_pieces(row: PlanRow, plan: Plan, frame: Frame) -> str:
    """Return the strategy for a rank's samples alone, of all its meetings the one where ghost products save most."""
    if row.strategy != "materialise":
        return row.strategy
    few = replace(frame, rows=(0, plan.samples), columns=(0, plan.samples))
    return choose("outer", (row.rows, row.columns), row.tokens, plan.samples, few)[0]


def _factors(rows: Sequence[PlanRow]) -> list[dict[str, float]]:
    """Return bytes of factors by parameter, one mapping for each segment."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        found.setdefault(row.segment, {})[row.parameter] = row.bytes
    return list(found.values())


def _loaded(model: nn.Module) -> int:
    """Return the number of floating weights that are in memory."""
    return sum(p.numel() for p in model.parameters() if entry_of(p) is None and p.is_floating_point())


def _matrix(module: nn.Module) -> int:
    """Return the size of a module's weight matrix; 0 without one."""
    weight = stored_weight(module)
    return weight.numel() if isinstance(weight, torch.Tensor) and weight.ndim == 2 else 0
