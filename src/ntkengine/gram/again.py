"""A few samples of a job run again in float64, within the memory the job was given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from ntkengine.gram.estimates import make_plan, needs_of
from ntkengine.gram.fitting import GIB, bounds, nearest, spill_of
from ntkengine.gram.frame import Frame
from ntkengine.gram.layout import Layout
from ntkengine.gram.plan import Plan
from ntkengine.gram.run import Sums
from ntkengine.gram.task import Task
from ntkengine.gram.tiling import sum_tiled
from ntkengine.inputs.batches import Samples
from ntkengine.inputs.heap import HEAP
from ntkengine.inputs.resident import RESIDENT
from ntkengine.inputs.streaming import turn_entries
from ntkengine.tangents.structure import Structure

_MOST = 0.75  # of the room: for the weights of a streamed block


def left(task: Task, plan: Plan, layout: Layout, memory_gib: float | None) -> float:
    """Return the bytes that are left to a job whose sweep is over; infinity where nothing bounds it.

    Args:
        task: the job; streamed weights that are in memory are let go.
        plan: its plan.
        layout: its layout.
        memory_gib: its budget.
    """
    if layout.doubles:
        return float("inf")
    RESIDENT.clear()
    bound = plan.peak_bytes if memory_gib is None else memory_gib * GIB
    return bound - (HEAP.taken() if task.device.type == "cpu" else plan.gram_bytes / plan.ranks)


def run_again(
    task: Task,
    structure: Structure,
    groups: Sequence[Mapping[str, Tensor]],
    origins: Sequence[tuple[int, np.ndarray]],
    frame: Frame,
    layout: Layout,
    room: float,
) -> tuple[Sums, Samples]:
    """Return the sums of a few samples, and these in the order of the sums.

    Args:
        task: the job in float64.
        structure: from the probe, on that model.
        groups: the samples' tensors.
        origins: for each group the job's group and the rows there.
        frame: the job's.
        layout: the job's.
        room: bytes that may be taken; infinity: as many as it takes at once.
    """

    def microbatches(tokens: int) -> Samples:
        return Samples(groups, origins=origins, **structure.microbatches(tokens))

    task = replace(task, kernels=False)
    tokens = max(1, layout.microbatch_tokens // (1 if layout.keeps else 2))  # float64 takes twice the room
    few = microbatches(tokens)
    small = Frame(few.span(0), few.span(len(groups) - 1), frame.outputs, frame.contraction, frame.transform)
    options: dict[str, Any] = {"keep_bytes": layout.keep_bytes}
    fitted = Layout(microbatch_tokens=tokens)
    if room < float("inf"):
        plan = make_plan(task.model, structure, few, small, False, {})
        needs = needs_of(plan, structure, task.model, task.dtype, small, {}, kernels=False, double=False)
        needs = replace(needs, parameter=0, segment=0)  # which nobody probes
        turn = turn_entries(task.model, task.device)
        held = (turn or 0) * task.dtype.itemsize
        base = bounds(room / GIB, task.dtype.itemsize, task.device, held)
        if held < _MOST * room:  # else it would be read for every microbatch
            base = replace(base, resident_bytes=max(base.resident_bytes, held))
        if structure.one_by_one:
            base = replace(base, microbatch_tokens=int(max(map(np.max, few.lengths))))
        fitted = nearest(needs, room, spill=spill_of(task.device), base=base)
        RESIDENT.resize(fitted.resident_bytes, turn)
        few = microbatches(fitted.microbatch_tokens)
        options = {"keep_bytes": 0, "factor_bytes": {row.parameter: row.bytes for row in plan.parameters}}
    return sum_tiled(task, structure, few, small, fitted, **options), few
