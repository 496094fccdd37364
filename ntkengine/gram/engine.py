"""`compute_gram` and `plan_gram`: the engine's front door."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkengine import store
from ntkengine.cluster.comm import Team, team_of, together
from ntkengine.errors import CheckFailed, InputError, NonFinite, RankFailed
from ntkengine.gram.assembly import as_float, assemble, shared, surroundings
from ntkengine.gram.check import Check
from ntkengine.gram.checkpoint import CHECKPOINT_S, Checkpoints, check_seconds
from ntkengine.gram.identity import existing, identity, writable
from ntkengine.gram.layout import Layout, tune_allocator
from ntkengine.gram.noise import LIMIT, USUAL, Noise, estimate_noise
from ntkengine.gram.plan import Plan
from ntkengine.gram.planning import planned, timed
from ntkengine.gram.repairing import fill_open_tiles
from ntkengine.gram.result import Gram
from ntkengine.gram.run import Sums, by_module
from ntkengine.gram.scaling import check_ranks, predict
from ntkengine.gram.sketching import described
from ntkengine.gram.spread import Spread
from ntkengine.gram.spreading import sum_spread
from ntkengine.gram.task import Task, check_rows, in_precision, refuse
from ntkengine.gram.teamwork import checkpointing
from ntkengine.gram.tiles import Frame
from ntkengine.gram.tiling import sum_tiled
from ntkengine.gram.transforms import SIGNS, Preconditioner
from ntkengine.inputs.batches import Samples
from ntkengine.inputs.parameters import module_of
from ntkengine.inputs.readout import ReadoutFunction
from ntkengine.inputs.running import evaluation
from ntkengine.tangents.probe import probe
from ntkengine.tangents.sketch import Sketch
from ntkengine.tangents.structure import Structure
from ntkengine.tangents.sweep import KEEP_BYTES

log = logging.getLogger(__name__)

Progress = Callable[[float, float, str], None]


def compute_gram(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    inputs2: Mapping[str, Tensor] | None = None,
    *,
    readout: str | ReadoutFunction = "logits",
    params: str | Iterable[str] = "trainable",
    contraction: str = "trace",
    transform: str | Preconditioner = "sgd",
    per_module: bool = False,
    precision: str = "high",
    backend: str = "auto",
    memory_gib: float | None = None,
    out: str | Path | None = None,
    resume: bool = True,
    checkpoint_s: float = CHECKPOINT_S,
    comm: Any = None,
    check: bool = True,
    progress: Progress | None = None,
    eval_inputs: Mapping[str, Tensor] | None = None,
    targets: np.ndarray | None = None,
    eval_targets: np.ndarray | None = None,
    example_ids: Sequence[str] | None = None,
    eval_ids: Sequence[str] | None = None,
    job: Mapping[str, Any] | None = None,
    extras: Mapping[str, np.ndarray] | Callable[[], Mapping[str, np.ndarray]] | None = None,
    seed: int = 0,
    sketch: int | None = None,
) -> Gram:
    """Return the empirical NTK Gram matrix of a model on a set of inputs: exact, unless a sketch is asked for.

    K[n, m] = Σ_c ⟨∇f_c(x_n), ∇f_c(x_m)⟩ for `"trace"`: a sum over parameters and outputs, not divided by anything.
    No gradient is ever stored for all samples and all parameters.

    Args:
        model: any `torch.nn.Module`; it is run in eval mode and left as it was found.
        inputs: tensors with a leading sample axis N: what the model is called with; `labels` only reach the readout.
        inputs2: other inputs; then K is (N, M), rows `inputs`, columns `inputs2`.
        readout: `"logits"`, `"margin"`, `"loss"`, or a callable (model_outputs, inputs) -> (N, C).
        params: `"trainable"`, `"all"`, a glob over names, or a list of these; `"!glob"` in a list leaves out.
        contraction: `"trace"`, `"full"`, `"per-output"` or `"sum-of-outputs"`.
        transform: `"sgd"`, `"sign"`, `"asymmetric-sign"` (rows raw, columns signed: not symmetric), or a
            `Preconditioner` (`gram.transforms`).
        per_module: keep each module's own Gram as well; they sum to K.
        precision: `"high"`: float32 passes and tile products, float64 across tiles. `"exact"`: float64 throughout.
            `"fast"`: bfloat16 passes and products, float64 across tiles; `noise` then says what that costs.
        backend: of the contractions: `"triton"`: kernels for GPUs; `"torch"`; `"auto"`: Triton on a GPU where it runs.
        memory_gib: bound on the memory above the loaded model (an estimate is kept below it). Over it, microbatches
            get smaller, hidden states wait on the host or in a file, a block is run again for parts of its
            parameters, and samples are swept in tiles.
        out: HDF5 file to write; it appears only when complete. Until then the work is kept in `.<name>.parts` beside
            it, and the same call goes on from there after any kind of end, over any number of ranks.
        resume: a complete file of the same job is returned as it is, an unfinished one is gone on with. False refuses
            both: nothing is ever overwritten or thrown away.
        checkpoint_s: seconds between checkpoints of the sums, with `out`; 0: one after every parameter (over ranks,
            after every block). They are further apart where they would take more than 2 % of the run.
        comm: an mpi4py communicator whose processes share the job: each calls this with the same arguments, sweeps its
            own samples (`cluster.shards`) and keeps its own part of the Gram until rank 0 gathers it. `memory_gib` is
            that of each process. On the other ranks `values`, `cross` and `modules` are shapes without entries
            (`result.Elsewhere`). Rank 0 writes `out`.
        check: compare with plain autograd before and after the sweep, and estimate the noise by recomputing in float64.
        progress: called with (flops done, flops in all, stage).
        eval_inputs: further inputs swept along: adds `cross` (eval × train) and `eval_outputs`.
        targets: (N, C) kept in the result and the file.
        eval_targets: (M, C) likewise.
        example_ids: N names kept in the file.
        eval_ids: M names.
        job: a mapping kept in the file.
        extras: further arrays kept in the file; or a function that makes them from what the job already names, called
            after the sweep.
        seed: of the drawn checks, and of a sketch.
        sketch: keep at most this many random projections of each parameter's gradient: an approximation, for more
            samples or parameters than exact products can take. Still symmetric and positive semi-definite, right in
            the mean, with an error that falls as 1/√sketch (`tangents.sketch`): `noise` and `meta["sketch"]` say how
            far it is off, measured on rows recomputed without it. Parameters that are no larger stay exact.

    Returns:
        The Gram. `noise` is NaN with `check=False`.

    Raises:
        InputError: arguments that cannot be used, a file of another job under `out`, or a budget too small.
        CheckFailed: the sweep disagrees with plain autograd.
        NonFinite: a gradient is not finite.
        Stopped: SIGTERM, or SIGINT, reached a call with `out`: what was summed is in a checkpoint.
        OSError: the disk refused the file; the checkpoints are still there.
        RankFailed: something else failed on another process. What fails on one is raised on all.
    Cost: see `plan_gram`.
    Source: the kernel, Jacot et al. 2018 (arXiv 1806.07572); factored gradients, Goodfellow 2015 (arXiv 1510.01799).
    """
    start = time.perf_counter()
    team = team_of(comm)
    root = team is None or team.root
    wanted: dict[str, Any] = {}
    with together(team):
        refuse(transform, precision, backend, contraction, inputs2, eval_inputs, sketch, check)
        task = Task.prepare(
            model, inputs, inputs2, eval_inputs, readout, params, contraction, transform, precision, backend
        )
        check_rows("targets", targets, task.samples.sizes[0])
        check_rows("example_ids", example_ids, task.samples.sizes[0])
        check_rows("eval_targets", eval_targets, task.samples.sizes[-1] if eval_inputs is not None else None)
        check_rows("eval_ids", eval_ids, task.samples.sizes[-1] if eval_inputs is not None else None)
        check_seconds(checkpoint_s)
        path = None if out is None else writable(Path(out)) if root else Path(out)
        if path is not None or team is not None:
            settings: dict[str, Any] = {"contraction": contraction, "transform": task.transform, "precision": precision}
            settings |= {"per_module": per_module, "check": check, "seed": seed, "sketch": sketch}
            arrays = {"targets": targets, "eval_targets": eval_targets}
            arrays |= {f"d of {name}": d.double().cpu().numpy() for name, d in (task.roots or {}).items()}
            arrays |= {} if extras is None or callable(extras) else extras
            wanted = identity(model, task, settings, arrays, job)
    if team is not None:
        team.same(wanted | {"memory_gib": memory_gib, "out": str(out)}, "every rank must be given the same")

    def computed(checkpoints: Checkpoints | None) -> Gram:
        report = progress if checkpoints is None else checkpoints.watched(progress)
        gram = _computed(task, precision, per_module, memory_gib, check, seed, sketch, report, checkpoints, team, start)
        gram.targets, gram.eval_targets = as_float(targets), as_float(eval_targets)
        with together(team):
            gram.extras = dict((extras() if callable(extras) else extras) or {})
        gram.meta["settings"] = dict(job or {})
        gram.meta["seconds"] = time.perf_counter() - start if checkpoints is None else checkpoints.seconds
        return gram

    if path is None:
        return shared(team, computed(None))
    if path.exists() if team is None else team.broadcast(path.exists()):
        with together(team):
            there = existing(path, wanted, resume) if root else None
            if root:
                store.tidy(path)
        return shared(team, there)
    ids = {"example_id": example_ids, "eval_id": eval_ids}
    names = {k: list(v) for k, v in ids.items() if v is not None}
    with checkpointing(path, wanted, team, resume=resume, every_s=checkpoint_s) as checkpoints:
        if checkpoints.repairs:
            again: dict[str, Any] = {"readout": readout, "params": params, "contraction": contraction, "seed": seed}
            again |= {"transform": transform, "per_module": per_module, "precision": precision, "backend": backend}
            compute = partial(compute_gram, model, **again, memory_gib=memory_gib, check=check, progress=progress)
            with together(team):
                if root:
                    fill_open_tiles(checkpoints, inputs, inputs2, eval_inputs, compute)
        else:
            gram = computed(checkpoints)
            with together(team):
                if root:
                    checkpoints.write(lambda name: store.write_gram(path, gram, wanted, names, name))
    return shared(team, store.open_gram(path) if root else None)


def _computed(
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
) -> Gram:
    """Return the Gram of a task, swept, checked, and with its noise; on ranks other than 0 without its entries."""
    root = team is None or team.root
    waited = 0.0 if team is None else team.waited
    tune_allocator(bounded=memory_gib is not None)
    with ExitStack() as running:
        running.enter_context(evaluation(task.model))
        structure, plan, layout, samples, sketches = planned(
            task, precision, per_module, memory_gib, seed, sketch, team
        )
        frame = task.frame(structure.outputs)
        truth = double = None
        with together(team):
            if check and root or task.transform in SIGNS:
                double = _double(task, running, lazy=memory_gib is not None)
            if task.transform in SIGNS and double is not None:
                structure.negligible = _negligible(task, structure, double, seed)
            if check and root:
                truth = Check(task, samples, frame, structure, seed, layout.gradients)
                truth.sweep()
        if team is not None:
            team.same({"negligible": structure.negligible}, "are their machines the same?", CheckFailed)
        # The layout does not count kept activations, so a bounded job recomputes them.
        keep_bytes = KEEP_BYTES if memory_gib is None else 0
        swept = task.fast(running) if precision == "fast" else task
        on = structure.on(swept.model)
        sums = _sweep(
            swept, on, samples, frame, plan, layout, per_module, progress, keep_bytes, sketches, checkpoints, team
        )
        noise, of_sketch = None, None
        with together(team), sums.asking() if root else nullcontext():
            if not root:
                sums.serve()
            if truth is not None:
                truth.allow(sketches)
                truth.entries(sums, samples, swept.dtype)
            if truth is not None and double is not None:
                noise = _noise(task, structure, samples, frame, sums, seed, double, precision, sketched=bool(sketches))
            if sketch is not None and noise is not None:
                of_sketch = described(sketch, sketches, seed, sums, noise.relative)
    for row in plan.parameters:
        row.strategy, row.tokens, row.flops, row.seconds = sums.done[row.parameter]
    contracting = sum(row.seconds or 0.0 for row in plan.parameters)
    plan.rate = sum(row.flops for row in plan.parameters) / max(1e-9, contracting)
    plan.pass_seconds = sums.pass_seconds
    gram = assemble(sums, samples, plan, two=task.two)
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
        "sketch": of_sketch,
        "one_by_one": structure.one_by_one,
        "blocks": structure.stack.depth,
        "resumed": 0 if checkpoints is None else checkpoints.resumed,
        "pass_seconds": sums.pass_seconds,
        "contract_seconds": sum(row.seconds or 0.0 for row in plan.parameters),
        **surroundings(task.device),
    }
    if isinstance(sums, Spread):
        gram.meta["ranks"] = sums.told(time.perf_counter() - start, waited)
    return gram


def plan_gram(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    inputs2: Mapping[str, Tensor] | None = None,
    *,
    readout: str | ReadoutFunction = "logits",
    params: str | Iterable[str] = "trainable",
    contraction: str = "trace",
    transform: str | Preconditioner = "sgd",
    per_module: bool = False,
    precision: str = "high",
    backend: str = "auto",
    eval_inputs: Mapping[str, Tensor] | None = None,
    memory_gib: float | None = None,
    seed: int = 0,
    sketch: int | None = None,
    ranks: int = 1,
    gpus_per_node: int | None = None,
    network: float | None = None,
    **_run_only: Any,
) -> Plan:
    """Return what `compute_gram` would do with the same arguments: strategy, flops, bytes and seconds by parameter.

    With `ranks` its `scaling` says what the job takes on as many processes like this one, `gpus_per_node` of them on a
    host, with `network` bytes a second between hosts.

    Cost: about ten forward and backward passes of three samples.

    Raises:
        InputError: as `compute_gram`.
    """
    refuse(transform, precision, backend, contraction, inputs2, eval_inputs, sketch)
    check_ranks(ranks, gpus_per_node, network)
    task = Task.prepare(
        model, inputs, inputs2, eval_inputs, readout, params, contraction, transform, precision, backend
    )
    tune_allocator(bounded=memory_gib is not None)
    with ExitStack() as running:
        running.enter_context(evaluation(task.model))
        structure, plan, layout, samples, sketches = planned(
            task, precision, per_module, memory_gib, seed, sketch, shared_by=ranks
        )
        timed(task.fast(running) if precision == "fast" else task, structure, plan, layout, samples, sketches)
    if ranks > 1:
        plan.scaling = predict(
            plan,
            structure,
            samples,
            task.frame(structure.outputs),
            layout,
            ranks,
            gpus_per_node=gpus_per_node,
            network=network,
            device=task.device,
            entry=(torch.bfloat16 if precision == "fast" else task.dtype).itemsize / task.dtype.itemsize,
        ).to_dict()
    return plan


def _sweep(
    task: Task,
    structure: Structure,
    samples: Samples,
    frame: Frame,
    plan: Plan,
    layout: Layout,
    per_module: bool,
    progress: Progress | None,
    keep_bytes: int,
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

    given = task.model, task.selected, structure, samples, task.readout, frame, layout
    options: dict[str, Any] = {
        "group": module_of if per_module else None,
        "tick": tick,
        "roots": task.roots,
        "kernels": task.kernels,
        "factor_bytes": {row.parameter: row.bytes for row in plan.parameters},
        "pass_flops": plan.pass_flops + plan.projection_flops,
        "keep_bytes": keep_bytes,
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


def _double(task: Task, running: ExitStack, *, lazy: bool) -> nn.Module:
    """Return the model in float64, ready to run: itself, or a copy."""
    model = in_precision(task.model, "exact", lazy=lazy)
    if model is not task.model:
        running.enter_context(evaluation(model))
    return model


def _negligible(task: Task, structure: Structure, double: nn.Module, seed: int) -> list[str]:
    """Return the parameters without a sign: float32 suspects them, float64 decides."""
    suspects = {n: p for n, p in double.named_parameters() if n in structure.negligible}
    if not suspects or double is task.model:
        return structure.negligible
    selected = {n: p for n, p in double.named_parameters() if n in task.selected}
    return [n for n in probe(double, selected, task.samples, task.readout, seed).negligible if n in suspects]


def _noise(
    task: Task,
    structure: Structure,
    samples: Samples,
    frame: Frame,
    sums: Sums | Spread,
    seed: int,
    model: nn.Module,
    precision: str,
    *,
    sketched: bool,
) -> Noise | None:
    expected, limit = float("inf") if precision == "fast" else USUAL, LIMIT[precision]
    by_name = dict(model.named_parameters())
    selected = {name: by_name[name] for name in task.selected}
    same = model is task.model
    roots = None if task.roots is None else {name: root.double() for name, root in task.roots.items()}
    try:
        return estimate_noise(
            model,
            selected,
            structure.on(model),
            samples,
            task.readout,
            frame,
            sums,
            one_by_one=structure.one_by_one or same,
            trim=structure.trim and not same,
            seed=seed,
            roots=roots,
            expected=expected,
            limit=limit,
            sketched=sketched,
        )
    except (NonFinite, RuntimeError, TypeError, ValueError) as error:
        if same or isinstance(error, CheckFailed | InputError | RankFailed | torch.OutOfMemoryError):
            raise
        if sketched:  # its error is far above float32's
            return _noise(task, structure, samples, frame, sums, seed, task.model, precision, sketched=True)
        log.warning("the model does not run in float64 (%s): the noise of this Gram is unknown", str(error)[:200])
        return None
