"""A job laid out before it runs: probed, fitted into its budget, and timed on a piece of itself."""

from __future__ import annotations

import time
from dataclasses import asdict

import torch

from ntkengine.errors import InputError
from ntkengine.gram.layout import Layout, bounds, fit
from ntkengine.gram.plan import Plan, kept_microbatches, make_plan, needs_of, shorten
from ntkengine.gram.rates import contraction_rate, page_seconds, sweep_seconds
from ntkengine.gram.sketching import choose_sketches
from ntkengine.gram.task import Task
from ntkengine.inputs.batches import Samples
from ntkengine.inputs.streaming import is_streamed
from ntkengine.inputs.weights import RESIDENT
from ntkengine.tangents.probe import probe
from ntkengine.tangents.sketch import Sketch
from ntkengine.tangents.structure import Structure


def planned(
    task: Task, precision: str, per_module: bool, memory_gib: float | None, seed: int, sketch: int | None = None
) -> tuple[Structure, Plan, Layout, Samples, dict[str, Sketch]]:
    """Probe the model, choose what is sketched, and lay the job out within its budget.

    Raises:
        InputError: nothing fits.
    """
    if memory_gib is not None and not memory_gib > 0:
        msg = f"memory_gib: expected a number above 0, got {memory_gib}"
        raise InputError(msg)
    dtype = torch.bfloat16 if precision == "fast" else task.dtype
    before = bounds(memory_gib, task.dtype.itemsize)
    RESIDENT.limit = before.resident_bytes
    began = time.perf_counter()
    structure = probe(task.model, task.selected, task.samples, task.readout, seed, before.gradients)
    probed = time.perf_counter() - began
    frame = task.frame(structure.outputs)
    one = 1 if structure.one_by_one else None

    def microbatches(tokens: int) -> Samples:
        return Samples(task.samples.groups, microbatch_tokens=tokens, microbatch=one, trim=structure.trim)

    sketches = choose_sketches(structure, task.samples, sketch, seed)
    plan = make_plan(task.model, structure, microbatches(before.microbatch_tokens), frame, per_module, sketches)
    plan.probe_seconds = probed
    needs = needs_of(plan, structure, task.model, dtype, sketches, kernels=task.kernels)
    layout = fit(needs, memory_gib, spill="host" if task.device.type == "cuda" else "disk")
    samples = microbatches(layout.microbatch_tokens)
    plan.microbatches, plan.layout, plan.peak_bytes = len(samples.chunks), asdict(layout), needs.peak(layout)
    tiles = layout.tiles(plan.samples)
    plan.sweeps = tiles * (tiles + 1) // 2
    return structure, plan, layout, samples, sketches


def timed(
    task: Task, structure: Structure, plan: Plan, layout: Layout, samples: Samples, sketches: dict[str, Sketch]
) -> Plan:
    """Return the plan with its times estimated from a piece of the job.

    Args:
        task: in the precision it will run in.
        structure: from the probe.
        plan: from `planned`.
        layout: the same.
        samples: the same.
        sketches: the same.
    """
    kept = kept_microbatches(plan, structure)[0] if layout.keeps and not is_streamed(task.model) else 0
    on = structure.on(task.model)
    frame = task.frame(plan.outputs)
    seconds, tokens = sweep_seconds(task, on, plan, layout, samples, sketches, kept)
    plan.pass_seconds = seconds * layout.tiles(plan.samples) + page_seconds(plan.peak_bytes, task.device)
    shorten(plan, structure, frame, tokens)
    rate = contraction_rate(plan, frame, task.dtype, task.device, kernels=task.kernels)
    plan.rate = rate if rate == rate else 1e9  # only small contractions, whose time is nothing
    for row in plan.parameters:
        row.seconds = row.flops / plan.rate
    return plan
