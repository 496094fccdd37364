"""The sums of a validated call: probed, planned, swept, checked, and with their noise."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np

from ntkengine.cluster.comm import Team, together
from ntkengine.errors import CheckFailed, NonFinite
from ntkengine.gram.again import left
from ntkengine.gram.anew import compare_anew
from ntkengine.gram.assembly import assemble, surroundings
from ntkengine.gram.checkpoint import Checkpoints
from ntkengine.gram.finer import checked_by_autograd, double_of, measures_noise, noise_in_float64, without_sign
from ntkengine.gram.fitting import NEAR, heap_limit
from ntkengine.gram.frame import Frame
from ntkengine.gram.layout import Layout
from ntkengine.gram.plan import Plan
from ntkengine.gram.planning import planned
from ntkengine.gram.ranksweep import sum_spread
from ntkengine.gram.result import Gram
from ntkengine.gram.room import free_bytes
from ntkengine.gram.run import Sums, by_module
from ntkengine.gram.sketching import described
from ntkengine.gram.spread import Spread
from ntkengine.gram.task import Task
from ntkengine.gram.tiling import sum_tiled
from ntkengine.gram.transforms import SIGNS
from ntkengine.inputs.batches import Samples
from ntkengine.inputs.heap import HEAP
from ntkengine.inputs.parameters import module_of
from ntkengine.inputs.running import evaluation
from ntkengine.inputs.seen import seen_before
from ntkengine.inputs.streaming import told_of_streaming
from ntkengine.tangents.sketch import Sketch
from ntkengine.tangents.structure import Structure
from ntkengine.tangents.trial import check_repeats

log = logging.getLogger(__name__)

Progress = Callable[[float, float, str], None]


def computed(
    task: Task,
    precision: str,
    per_module: bool,
    memory_gib: float | None,
    check: bool,
    seed: int,
    sketch: int | None,
    progress: Progress | None,
    checkpoints: Checkpoints | None,
    team: Team | None,
    start: float,
) -> tuple[Gram, Sums | Spread, Samples]:
    """Return the Gram of a task, swept, checked, and with its noise; and its sums, and the samples in their order.

    Over ranks only rank 0 has its entries, and nobody when there are checkpoints: then they are on their way to a file
    (`sharding.write_spread`).
    """
    root = team is None or team.root
    waited = 0.0 if team is None else team.waited
    began = time.perf_counter()
    HEAP.begin(heap_limit(memory_gib))
    with ExitStack() as running:
        running.enter_context(told_of_streaming(task.model))
        running.enter_context(evaluation(task.model))
        structure, plan, layout, samples, sketches = planned(
            task,
            precision,
            per_module,
            memory_gib,
            seed,
            sketch,
            team,
            double=measures_noise(task, check=check),
            room=free_bytes(task.device, team),
        )
        if memory_gib is not None:
            HEAP.limit = NEAR * plan.peak_bytes
        elif not layout.doubles:  # it would not fit in what is free
            HEAP.begin(NEAR * plan.peak_bytes)
        plan_s = time.perf_counter() - began
        frame = task.frame(structure.outputs)
        truth = double = None
        checking = time.perf_counter()
        with together(team):
            if measures_noise(task, check=check and root):
                double = double_of(task, running, lazy=not layout.doubles)
            if task.transform in SIGNS and double is not None:
                structure.negligible = without_sign(task, structure, double, seed)
            if check and root:
                truth = checked_by_autograd(task, double, samples, frame, structure, seed, layout, precision)
        check_s = time.perf_counter() - checking
        if team is not None:
            team.same({"negligible": structure.negligible}, "are their machines the same?", CheckFailed)
        swept = task
        if precision == "fast":
            swept = task.fast(running)
            check_repeats(swept.model, samples, swept.readout, swept.selected)
        on = structure.on(swept.model)
        sums = _sweep(swept, on, samples, frame, plan, layout, per_module, progress, sketches, checkpoints, team)
        noise, of_sketch = None, None
        checking = time.perf_counter()
        with together(team), sums.asking() if root else nullcontext():
            if not root:
                sums.serve()
            else:
                _refuse_not_finite(sums, frame, samples)
            if truth is not None:
                truth.allow(sketches)
                truth.entries(sums, samples, swept.dtype)
                compare_anew(swept, on, samples, sums, frame, layout, seed, sketched=bool(sketches))
            if truth is not None and double is not None:
                room = left(task, plan, layout, memory_gib)
                given = task, structure, samples, frame, sums, seed, double, precision, layout, room
                noise = noise_in_float64(*given, sketched=bool(sketches), alone=truth.reduced)
            if truth is not None and noise is not None and task.transform in SIGNS:
                noise = replace(noise, norm=max(noise.norm, truth.turned_norm()))
            if sketch is not None and noise is not None:
                of_sketch = described(sketch, sketches, seed, sums, noise.relative)
    check_s += time.perf_counter() - checking
    for row in plan.parameters:
        row.strategy, row.tokens, row.flops, row.seconds = sums.done[row.parameter]
    contracting = sum(row.seconds or 0.0 for row in plan.parameters)
    plan.rate = sum(row.flops for row in plan.parameters) / max(1e-9, contracting)
    plan.pass_seconds, plan.check_seconds = sums.pass_seconds, check_s
    gram = assemble(sums, samples, plan, two=task.two, gather=checkpoints is None)
    gram.noise = float("nan") if noise is None else noise.norm
    gram.meta = {
        "precision": precision,
        "backend": "triton" if task.kernels else "torch",
        "readout": task.readout.name,
        "parameters": sum(p.numel() for p in task.selected.values()),
        "unused_parameters": structure.unused,
        "negligible_parameters": structure.negligible,
        "module_trace": by_module(sums.traces),
        "noise_relative": None if noise is None else noise.relative,
        "outputs_error": None if noise is None else noise.outputs,
        "checked": check,
        **seen_before(task.model, task.samples.groups[:1] if task.two else task.samples.groups),
        "sketch": of_sketch,
        "one_by_one": structure.one_by_one,
        "blocks": structure.stack.depth,
        "resumed": 0 if checkpoints is None else checkpoints.resumed,
        "plan_seconds": plan_s,
        "check_seconds": check_s,
        "pass_seconds": sums.pass_seconds,
        "contract_seconds": sum(row.seconds or 0.0 for row in plan.parameters),
        **surroundings(task.device, task.model, task.readout),
    }
    if isinstance(sums, Spread):
        gram.meta["ranks"] = sums.told(time.perf_counter() - start, waited)
    return gram, sums, samples


def _refuse_not_finite(sums: Sums | Spread, frame: Frame, samples: Samples) -> None:
    """Refuse a Gram that is not finite: of rows beyond its square the sweep, which looks at traces, sees nothing.

    Raises:
        NonFinite: naming the first example.
    """
    if np.isfinite(sums.norm()):
        return
    start, stop = frame.rows
    first = sums.pick(np.arange((stop - start) * frame.width), np.arange(frame.width))
    bad = np.flatnonzero(~np.isfinite(first).all((0, 2)))
    which = f" for example {samples.example_at(start + int(bad[0]) // frame.width)}" if len(bad) else ""
    raise NonFinite(f"the gradient is not finite{which}")


def _sweep(
    task: Task,
    structure: Structure,
    samples: Samples,
    frame: Frame,
    plan: Plan,
    layout: Layout,
    per_module: bool,
    progress: Progress | None,
    sketches: Mapping[str, Sketch],
    checkpoints: Checkpoints | None,
    team: Team | None,
) -> Sums | Spread:
    done = 0.0
    total = max(plan.flops / plan.ranks, 1.0)
    if team is not None and not team.root:
        progress = None

    def tick(flops: float, stage: str) -> None:
        nonlocal done
        done += flops
        if progress is not None:
            progress(min(done, total), total, stage)

    given = task, structure, samples, frame, layout
    options: dict[str, Any] = {
        "group": module_of if per_module else None,
        "tick": tick,
        "factor_bytes": {row.parameter: row.bytes for row in plan.parameters},
        "pass_flops": plan.pass_flops + plan.projection_flops,
        "keep_bytes": layout.keep_bytes,
        "sketches": sketches,
        "checkpoints": checkpoints,
    }
    if team is not None:
        return sum_spread(team, *given, **options)
    sums = sum_tiled(*given, **options)
    if per_module:
        for part in sums.parts.values():
            part.finish()
            sums.total.K += part.K
    else:
        sums.total.finish()
    if progress is not None:
        progress(total, total, "done")
    return sums
