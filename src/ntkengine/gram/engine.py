"""`compute_gram`: the engine's front door."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ntkengine import store
from ntkengine.arguments import called, file_path
from ntkengine.cluster.comm import team_of, together
from ntkengine.errors import InputError
from ntkengine.gram.assembly import as_float, shared
from ntkengine.gram.checkpoint import CHECKPOINT_S, Checkpoints, check_seconds
from ntkengine.gram.computing import computed
from ntkengine.gram.identity import existing, identity, writable
from ntkengine.gram.repairing import fill_open_tiles
from ntkengine.gram.result import Gram
from ntkengine.gram.run import Sums
from ntkengine.gram.sharding import write_spread
from ntkengine.gram.spread import Spread
from ntkengine.gram.task import Task, check_rows, check_settings, refuse
from ntkengine.gram.teamwork import checkpointing
from ntkengine.gram.transforms import Preconditioner
from ntkengine.gram.versions import versions
from ntkengine.gram.zerorows import zero_rows_named
from ntkengine.inputs.batches import Samples
from ntkengine.inputs.heads import warn_of_new_head
from ntkengine.inputs.ownloss import warn_of_own_loss
from ntkengine.inputs.readout import ReadoutFunction
from ntkengine.inputs.sources import Source, as_inputs
from ntkengine.targets import refuse_bits

Progress = Callable[[float, float, str], None]
Maker = Callable[[], Mapping[str, np.ndarray]]
Extras = Mapping[str, np.ndarray] | Maker


def compute_gram(
    model: nn.Module,
    inputs: Source,
    inputs2: Source | None = None,
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
    eval_inputs: Source | None = None,
    targets: np.ndarray | None = None,
    eval_targets: np.ndarray | None = None,
    example_ids: Sequence[str] | None = None,
    eval_ids: Sequence[str] | None = None,
    job: Mapping[str, Any] | None = None,
    extras: Extras | Sequence[Extras] | None = None,
    seed: int = 0,
    sketch: int | None = None,
) -> Gram:
    """Return the empirical NTK Gram matrix of a model on a set of inputs: exact, unless a sketch is asked for.

    K[n, m] = Σ_c ⟨∇f_c(x_n), ∇f_c(x_m)⟩ for `"trace"`: a sum over parameters and outputs, not divided by anything.
    No gradient is ever stored for all samples and all parameters.

    Args:
        model: any `torch.nn.Module`; it is run in eval mode and left as it was found.
        inputs: tensors with a leading sample axis N: what the model is called with; `labels` only reach the readout.
            Or what becomes such: texts, `Examples`, a data set or frame with a `text` column (`tokenize`), a
            DataLoader or a list of tokenised batches, in order (`inputs.tokenised`), or, for a plain torch module with
            one input, a tensor or an array.
        inputs2: other inputs; then K is (N, M), rows `inputs`, columns `inputs2`.
        readout: `"logits"`, `"margin"`, `"loss"`, or a callable (model_outputs, inputs) -> (N, C).
        params: `"trainable"`, `"all"`, a glob over names, or a list of these; `"!glob"` in a list leaves out.
        contraction: `"trace"`, `"full"`, `"per-output"` or `"sum-of-outputs"`.
        transform: `"sgd"`, `"sign"`, `"asymmetric-sign"` (rows raw, columns signed: not symmetric), or a
            `Preconditioner` (`gram.transforms`).
        per_module: keep each module's own Gram as well; they sum to K.
        precision: `"high"`: float32 passes and tile products, float64 across tiles. `"exact"`: float64 throughout,
            also where the model itself casts to float32.
            `"fast"`: bfloat16 passes and products, float64 across tiles; `noise` then says what that costs.
        backend: of the contractions: `"triton"`: kernels for GPUs; `"torch"`; `"auto"`: Triton on a GPU where it runs.
        memory_gib: bound on the memory above the loaded model (an estimate is kept below it). Over it, microbatches
            get smaller, hidden states wait on the host or in a file, a block is run again for parts of its
            parameters, and samples are swept in tiles. None: all that is free, of which a warning tells when it binds.
        out: HDF5 file to write; it appears only when complete. Until then the work is kept in `.<name>.parts` beside
            it, and the same call goes on from there after any kind of end, over any number of ranks.
        resume: a complete file of the same job is returned as it is, an unfinished one is gone on with. False refuses
            both: nothing is ever overwritten or thrown away.
        checkpoint_s: seconds between checkpoints of the sums, with `out`; 0: one after every parameter (over ranks,
            after every block). They are further apart where they would take more than 2 % of the run.
        comm: an mpi4py communicator whose processes share the job: each calls this with the same arguments, sweeps its
            own samples (`cluster.shards`) and keeps its own part of the Gram. `memory_gib` is that of each process.
            With `out`, in a folder that all of them share, each writes its rows to a file beside it
            (`store.shards`), and nobody ever holds the whole; without, rank 0 gathers it. On the other ranks `values`,
            `cross` and `modules` are shapes without entries (`result.Elsewhere`).
        check: compare with plain autograd before and after the sweep, and estimate the noise by recomputing in float64.
        progress: called with (flops done, flops in all, stage): see `show_progress`.
        eval_inputs: further inputs swept along: adds `cross` (eval × train) and `eval_outputs`.
        targets: (N, C) kept in the result and the file; of a margin ±1, not 0 and 1 (`encode_targets`).
        eval_targets: (M, C) likewise.
        example_ids: N names kept in the file.
        eval_ids: M names.
        job: a mapping kept in the file.
        extras: further arrays kept in the file, and in the checkpoints; or a function that makes them from what the job
            already names, called after the sweep; or several of these.
        seed: of the drawn checks, and of a sketch.
        sketch: keep at most this many random projections of each parameter's gradient: an approximation, for more
            samples or parameters than exact products can take. Still symmetric and positive semi-definite, right in
            the mean, with an error that falls as 1/√sketch (`tangents.sketch`): `noise` and `meta["sketch"]` say how
            far it is off, measured on rows recomputed without it. Parameters that are no larger stay exact.

    Returns:
        The Gram. `noise` is NaN with `check=False`. `meta` has the seconds of each part of the run; those of writing
        the file, `write_seconds`, only where this call wrote it.

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
        given_arrays, makers = _further(extras)
        refuse(transform, precision, backend, contraction, inputs2, eval_inputs, sketch, check)
        check_settings(memory_gib, seed, per_module=per_module, check=check, resume=resume)
        called("progress", progress)
        # Here, as a generator of batches could not be read a second time.
        inputs = as_inputs(inputs, model)
        inputs2 = None if inputs2 is None else as_inputs(inputs2, model)
        eval_inputs = None if eval_inputs is None else as_inputs(eval_inputs, model)
        task = Task.prepare(
            model, inputs, inputs2, eval_inputs, readout, params, contraction, transform, precision, backend
        )
        warn_of_new_head(model, readout)
        check_rows("targets", targets, task.samples.sizes[0])
        check_rows("example_ids", example_ids, task.samples.sizes[0])
        check_rows("eval_targets", eval_targets, task.samples.sizes[-1] if eval_inputs is not None else None)
        check_rows("eval_ids", eval_ids, task.samples.sizes[-1] if eval_inputs is not None else None)
        for name, y in (("targets", targets), ("eval_targets", eval_targets)):
            if readout == "margin" and y is not None:
                refuse_bits(name, np.asarray(y).reshape(len(y), -1))
        check_seconds(checkpoint_s)
        path = None if out is None else store.followed(file_path("out", out))
        if path is not None and root:
            writable(path)
        if path is not None or team is not None:
            settings: dict[str, Any] = {"contraction": contraction, "transform": task.transform, "precision": precision}
            settings |= {"per_module": per_module, "check": check, "seed": seed, "sketch": sketch}
            arrays = {"targets": targets, "eval_targets": eval_targets}
            arrays |= {f"d of {name}": d.double().cpu().numpy() for name, d in (task.roots or {}).items()}
            arrays |= given_arrays
            wanted = identity(model, task, settings, arrays, job)
    here = versions(model, task.readout)
    if team is not None:
        given = {"memory_gib": memory_gib, "out": str(out), "extras": len(makers), "versions": here}
        team.same(wanted | given, "every rank must be given the same")

    def made(checkpoints: Checkpoints | None) -> tuple[Gram, Sums | Spread, Samples]:
        report = progress if checkpoints is None else checkpoints.telling.watched(progress)
        if root:
            warn_of_own_loss(model, task.samples, task.readout)
        with zero_rows_named(task):
            gram, sums, samples = computed(
                task, precision, per_module, memory_gib, check, seed, sketch, report, checkpoints, team, start
            )
        gram.targets, gram.eval_targets = as_float(targets), as_float(eval_targets)
        began = time.perf_counter()
        with together(team):
            gram.extras = given_arrays.copy()
            for make in makers:
                gram.extras |= make() or {}
        gram.meta["extras_seconds"] = time.perf_counter() - began
        gram.meta["settings"] = dict(job or {})
        gram.meta["seconds"] = time.perf_counter() - start if checkpoints is None else checkpoints.seconds
        return gram, sums, samples

    if path is None:
        return shared(team, made(None)[0])
    with together(team):
        if root:
            store.tidy(path)
    ids = {"example_id": example_ids, "eval_id": eval_ids}
    names = {k: list(v) for k, v in ids.items() if v is not None}
    if path.exists() if team is None else team.broadcast(path.exists()):
        with together(team):
            there = existing(path, wanted, resume, here, names) if root else None
        return shared(team, there)
    written, refilled = None, False
    keeps: dict[str, Any] = {"every_s": checkpoint_s, "versions": here, "arrays": given_arrays}
    with checkpointing(path, wanted, team, resume=resume, **keeps) as checkpoints:
        refilled = checkpoints.repairs
        if checkpoints.repairs:
            again: dict[str, Any] = {"readout": readout, "params": params, "contraction": contraction, "seed": seed}
            again |= {"transform": transform, "per_module": per_module, "precision": precision, "backend": backend}
            compute = partial(compute_gram, model, **again, memory_gib=memory_gib, check=check, progress=progress)
            with together(team):
                if root:
                    fill_open_tiles(checkpoints, inputs, inputs2, eval_inputs, compute)
        else:
            gram, sums, samples = made(checkpoints)
            began = time.perf_counter()
            if isinstance(sums, Spread):
                write_spread(checkpoints, path, gram, sums, samples, wanted, names)
            else:
                checkpoints.write(lambda name: store.write_gram(path, gram, wanted, names, name))
            written = time.perf_counter() - began
    found = shared(team, store.open_gram(path) if root else None)
    found.meta |= {"refilled": True} if refilled else {}
    if written is not None:  # of the file itself, which therefore cannot hold it
        found.meta["write_seconds"] = written
    return found


def _further(extras: Extras | Sequence[Extras] | None) -> tuple[dict[str, np.ndarray], list[Maker]]:
    """Return the arrays given, and the functions that make more."""
    several = () if extras is None else extras if isinstance(extras, list | tuple) else (extras,)
    arrays: dict[str, np.ndarray] = {}
    for part in several:
        if not callable(part) and not isinstance(part, Mapping):
            msg = f"extras: expected arrays by name, a function that makes them, or several of these, got {part!r:.200}"
            raise InputError(msg)
        arrays |= {} if callable(part) else part
    return arrays, [part for part in several if callable(part)]
