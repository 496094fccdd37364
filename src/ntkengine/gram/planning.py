"""A job laid out before it runs: probed, fitted into its budget, and timed on a piece of itself."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch

from ntkengine.cluster.comm import Team, together
from ntkengine.cluster.shards import Shard, deal
from ntkengine.errors import CheckFailed
from ntkengine.gram.estimates import kept_microbatches, make_plan, needs_of, shorten
from ntkengine.gram.fitting import GIB, bounds, fit, spill_of
from ntkengine.gram.frame import Frame
from ntkengine.gram.layout import Layout, Needs
from ntkengine.gram.panels import entries, meetings
from ntkengine.gram.plan import Plan
from ntkengine.gram.rates import checks_seconds, contraction_rate, page_seconds, sweep_seconds
from ntkengine.gram.sketching import choose_sketches
from ntkengine.gram.task import Task
from ntkengine.inputs.batches import Samples
from ntkengine.inputs.resident import RESIDENT
from ntkengine.inputs.running import taken_apart
from ntkengine.inputs.streaming import is_streamed, turn_entries
from ntkengine.tangents.probe import probe
from ntkengine.tangents.sketch import Sketch
from ntkengine.tangents.structure import Structure

BUNDLE_BYTES = 32 << 20  # small parameters travel together up to this, so that their messages are few
WINDOW_BYTES = 1 << 30  # parcels of other ranks, the window in use and the next; own features are filled anew for each


def planned(
    task: Task,
    precision: str,
    per_module: bool,
    memory_gib: float | None,
    seed: int,
    sketch: int | None = None,
    team: Team | None = None,
    shared_by: int = 1,
    *,
    double: bool = False,
    room: float = float("inf"),
) -> tuple[Structure, Plan, Layout, Samples, dict[str, Sketch]]:
    """Probe the model, choose what is sketched, and lay the job out within its budget.

    All ranks probe, and stop if they find different ways through the model.

    Args:
        task: the job.
        precision: of the passes.
        per_module: whether every module gets its own accumulator.
        memory_gib: the budget, of each rank.
        seed: of the probe and of a sketch.
        sketch: features.
        team: the ranks that share the job; None: this process alone.
        shared_by: ranks to lay it out for without a team.
        double: whether a float64 copy of the model measures the noise.
        room: bytes that are free, for a job without a budget.

    Raises:
        InputError: nothing fits.
        CheckFailed: ranks disagree.
    """
    dtype = torch.bfloat16 if precision == "fast" else task.dtype
    turn = turn_entries(task.model, task.device)
    before = bounds(memory_gib, task.dtype.itemsize, task.device, (turn or 0) * task.dtype.itemsize)
    RESIDENT.resize(before.resident_bytes, turn)
    began = time.perf_counter()
    with together(team):
        keep_bytes = 0 if is_streamed(task.model) else before.keep_bytes
        with taken_apart(task.model):
            structure = probe(task.model, task.selected, task.samples, task.readout, seed, before.gradients, keep_bytes)
    if team is not None:
        team.same(structure.told(), "are the machines and versions the same?", CheckFailed)
    probed = time.perf_counter() - began
    frame = task.frame(structure.outputs)

    def microbatches(tokens: int) -> Samples:
        return Samples(task.samples.groups, **structure.microbatches(tokens))

    sketches = choose_sketches(structure, task.samples, sketch, seed)
    plan = make_plan(task.model, structure, microbatches(before.microbatch_tokens), frame, per_module, sketches)
    plan.probe_seconds = probed
    spill = spill_of(task.device)
    ranks = shared_by if team is None else team.size
    if ranks == 1:
        needs = needs_of(plan, structure, task.model, dtype, frame, sketches, kernels=task.kernels, double=double)
        layout = fit(needs, memory_gib, spill=spill, base=before, room=room)
    else:
        room = room if team is None else min(team.exchange(room))
        with together(team):
            shards = deal(microbatches(before.microbatch_tokens), ranks)
            needs, base = share_of(task, structure, plan, shards, frame, sketches, before, memory_gib, dtype, double)
            layout = fit(needs, memory_gib, spill=spill, base=base, room=room)
        layout = layout if team is None else team.broadcast(layout)
    RESIDENT.resize(layout.resident_bytes, turn)
    samples = microbatches(layout.microbatch_tokens)
    plan.microbatches, plan.layout, plan.peak_bytes = len(samples.chunks), asdict(layout), needs.peak(layout)
    tiles = layout.tiles(plan.samples)
    plan.sweeps = tiles * (tiles + 1) // 2
    plan.ranks = ranks
    return structure, plan, layout, samples, sketches


def share_of(
    task: Task,
    structure: Structure,
    plan: Plan,
    shards: Sequence[Shard],
    frame: Frame,
    sketches: dict[str, Sketch],
    base: Layout,
    memory_gib: float | None,
    dtype: torch.dtype,
    double: bool,
) -> tuple[Needs, Layout]:
    """Return what the rank with the most needs, and what is decided of the layout of all ranks: how samples are met.

    Args:
        task: the job.
        structure: from the probe.
        plan: of the whole job.
        shards: of all ranks.
        frame: the wanted Gram.
        sketches: by parameter.
        base: from the budget alone.
        memory_gib: the budget of a rank.
        dtype: what runs.
        double: whether a float64 copy of the model measures the noise.
    """
    ranks = len(shards)
    share = max(shard.tokens for shard in shards) / plan.tokens
    most = max(shard.size for shard in shards)
    rows = [replace(row, bytes=row.bytes * share) for row in plan.parameters]
    segments: dict[str, float] = {}
    for row in rows:
        segments[row.segment] = segments.get(row.segment, 0.0) + row.bytes
    small = min(float(BUNDLE_BYTES), max(segments.values(), default=0.0))
    parcel = max([small, 1.0, *(row.bytes for row in rows)])
    room = WINDOW_BYTES if memory_gib is None else memory_gib * GIB / 8
    window = max(1, min(ranks // 2, int(room / (2 * parcel))))
    own = [meetings(shards, r, task.samples, frame, window) for r in range(ranks)]
    modules = plan.gram_bytes / (8.0 * max(1, frame.entries))
    local = replace(
        plan,
        parameters=rows,
        samples=most,
        tokens=math.ceil(plan.tokens * share),
        microbatches=max(1, math.ceil(plan.microbatches * share)),
        hidden_bytes=plan.hidden_bytes * share,
        gram_bytes=8.0 * modules * max(sum(entries(m) for m in met) for met in own),
    )
    needs = needs_of(local, structure, task.model, dtype, frame, sketches, kernels=task.kernels, double=double)
    needs = replace(needs, met=max(m.size for met in own for m in met) / most, parcel=parcel)
    return needs, replace(base, window=window, bundle_bytes=BUNDLE_BYTES)


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
    plan.check_seconds = checks_seconds(task, plan, samples, seconds)
    plan.pass_seconds = seconds * layout.tiles(plan.samples) + page_seconds(plan.peak_bytes, task.device)
    structure.tokens |= tokens
    shorten(plan, structure, frame, tokens)
    rate = contraction_rate(plan, frame, task.dtype, task.device, kernels=task.kernels)
    plan.rate = rate if rate == rate else 1e9  # only small contractions, whose time is nothing
    for row in plan.parameters:
        row.seconds = row.flops / plan.rate
    return plan
