"""A Gram summed tile by tile: two tiles of samples are swept at a time, when all at once do not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ntkengine.gram.checkpoint import Checkpoints
from ntkengine.gram.frame import Frame
from ntkengine.gram.layout import Layout
from ntkengine.gram.run import Sums, sum_gram
from ntkengine.gram.task import Task
from ntkengine.gram.tiles import Accumulator
from ntkengine.inputs.batches import Samples
from ntkengine.tangents.structure import Structure


def sum_tiled(
    task: Task,
    structure: Structure,
    samples: Samples,
    frame: Frame,
    layout: Layout,
    *,
    group: Callable[[str], str] | None = None,
    checkpoints: Checkpoints | None = None,
    **options: Any,
) -> Sums:
    """Return `sum_gram`'s sums of all samples, from one sweep if the layout has one tile, else one for each tile pair.

    Args:
        task: as `sum_gram`.
        structure: likewise.
        samples: microbatches.
        frame: the wanted Gram.
        layout: its tile.
        group: as `sum_gram`.
        checkpoints: where the sums are written down, and taken up again.
        options: of `sum_gram`.
    """
    options |= {"group": group, "layout": layout}
    if not layout.tile:
        keeper = None if checkpoints is None else checkpoints.sweep(frame)
        return sum_gram(task, structure, samples, frame, keeper=keeper, **options)
    device = task.device
    whole = Sums(Accumulator(frame, device), outputs=np.full((samples.total, structure.outputs), np.nan))
    rows, columns = (_tiles(samples, *span, layout.tile) for span in (frame.rows, frame.columns))
    for a in rows:
        for b in columns:
            if frame.symmetric and b[1] > a[1] and a[1] < frame.columns[1]:
                continue  # above the diagonal
            same = a == b
            few = _part(samples, [a] if same else [a, b], structure, layout)
            last = few.span(0) if same else few.span(1)
            small = Frame(few.span(0), last, frame.outputs, frame.contraction, frame.transform)
            region = (*a[1:], *b[1:])
            keeper = None if checkpoints is None else checkpoints.tile(frame, region, layout.tile)
            found = Sums(Accumulator(small, device)) if keeper is not None and keeper.path.is_file() else None
            if found is None or keeper is None or not keeper.finished(found):
                found = sum_gram(task, structure, few, small, keeper=keeper, **options)
            _add(whole, found, frame, (a[1], a[2]), (b[1], b[2]), square=same)
            for i, tile in enumerate([a] if same else [a, b]):
                whole.outputs[tile[1] : tile[2]] = found.outputs[slice(*few.span(i))]
    return whole


Tile = tuple[int, int, int]  # group, first and last position on the sample axis


def _tiles(samples: Samples, start: int, stop: int, size: int) -> list[Tile]:
    found = []
    for g in range(len(samples.sizes)):
        low, high = samples.span(g)
        low, high = max(low, start), min(high, stop)
        found += [(g, at, min(at + size, high)) for at in range(low, high, size)]
    return found


def _part(samples: Samples, tiles: list[Tile], structure: Structure, layout: Layout) -> Samples:
    """Return the samples of some tiles, in the same order: they are sorted by length already."""
    rows = [(g, np.arange(start, stop)) for g, start, stop in tiles]
    return samples.part(rows, **structure.microbatches(layout.microbatch_tokens))


def _add(
    whole: Sums,
    found: Sums,
    frame: Frame,
    rows: tuple[int, int],
    columns: tuple[int, int],
    *,
    square: bool,
) -> None:
    w = frame.width
    r = slice((rows[0] - frame.rows[0]) * w, (rows[1] - frame.rows[0]) * w)
    c = slice((columns[0] - frame.columns[0]) * w, (columns[1] - frame.columns[0]) * w)
    whole.total.K[:, r, c] += found.total.K
    for name, part in found.parts.items():
        whole.part(name).K[:, r, c] += part.K
    for name, (strategy, tokens, flops, seconds) in found.done.items():
        before = whole.done.get(name, (strategy, 0, 0.0, 0.0))
        whole.done[name] = strategy, max(tokens, before[1]), flops + before[2], seconds + before[3]
    if square and frame.square:
        for name, value in found.traces.items():
            whole.traces[name] = whole.traces.get(name, 0.0) + value
    whole.pass_seconds += found.pass_seconds
