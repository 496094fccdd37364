"""A Gram over ranks on its way to the disk: a shard from each of them, never gathered."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ntkengine import store
from ntkengine.gram.blocks import TOTAL
from ntkengine.gram.checkpoint import Checkpoints
from ntkengine.gram.result import Gram
from ntkengine.gram.rows import Rows
from ntkengine.gram.spread import Spread
from ntkengine.inputs.batches import Samples


def write_spread(
    checkpoints: Checkpoints,
    path: Path,
    gram: Gram,
    sums: Spread,
    samples: Samples,
    job: Mapping[str, Any],
    ids: Mapping[str, list[str]],
) -> None:
    """Write a job's file, every rank its shard of it, and clear the job's parts away.

    Args:
        checkpoints: of the job, on every rank.
        path: of the whole.
        gram: on rank 0 everything but the entries, which nobody has.
        sums: finished.
        samples: of the job.
        job: what defines the values.
        ids: as `store.write_gram`.

    Raises:
        Exception: on every rank what failed on any; then the checkpoints are still there.
    """
    team = sums.team
    with checkpoints.writing():
        _write_shard(checkpoints, path, sums, samples, job)
        with team.together(), checkpoints.refused():
            if team.root:
                store.link_shards(path, team.size, gram, job, ids)
                store.place(path)
        with team.together():
            if team.root:
                checkpoints.folder.remove()


def _write_shard(checkpoints: Checkpoints, path: Path, sums: Spread, samples: Samples, job: Mapping[str, Any]) -> None:
    team, height = sums.team, store.tiles.TILE
    columns = next(g for g in range(len(samples.sizes)) if samples.span(g) == sums.frame.columns)
    matrices = {"gram": (TOTAL, 0)}
    matrices |= {"cross": (TOTAL, 1)} if len(samples.sizes) > 1 and columns == 0 else {}
    matrices |= {f"modules/{i}": (name, 0) for i, name in enumerate(sums.parts)}
    matrices |= {f"crosses/{i}": (name, 1) for i, name in enumerate(sums.parts)} if "cross" in matrices else {}
    layered = sums.frame.contraction == "per-output"
    rows = {}
    with ExitStack() as writing:
        for name, (part, group) in matrices.items():
            rows[name] = Rows(sums, samples, part, group, columns, height)
        with team.together(), checkpoints.refused():
            room = {
                name: (found.start, found.shape if layered else found.shape[1:], np.dtype(np.float64))
                for name, found in rows.items()
                if found.shape[1]
            }
            shard = writing.enter_context(store.writing_shard(path, team.rank, team.size, room, job))
        for name, found in rows.items():
            for k in range(found.strips):
                strip = found.strip(k)
                with team.together(), checkpoints.refused():
                    if strip.shape[1]:
                        shard.put(name, k * height, strip if layered else strip[0])
        with team.together(), checkpoints.refused():
            writing.close()
