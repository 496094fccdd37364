"""`compute_gram` and `plan_gram`: the engine's front door."""

from __future__ import annotations

import copy
import logging
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from ntkengine import store
from ntkengine.errors import InputError
from ntkengine.gram.check import Check
from ntkengine.gram.noise import estimate_noise
from ntkengine.gram.plan import Plan, make_plan
from ntkengine.gram.result import Gram
from ntkengine.gram.run import Sums, sum_gram
from ntkengine.gram.tiles import CONTRACTIONS, Frame, unsorted
from ntkengine.inputs.batches import Samples, check_inputs, fingerprint_inputs
from ntkengine.inputs.models import fingerprint
from ntkengine.inputs.parameters import module_of, select_parameters
from ntkengine.inputs.readout import Readout, ReadoutFunction, resolve_readout
from ntkengine.tangents.blocks import evaluation
from ntkengine.tangents.probe import Structure, probe

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
    transform: str = "sgd",
    per_module: bool = False,
    precision: str = "high",
    backend: str = "auto",
    memory_gib: float | None = None,
    out: str | Path | None = None,
    resume: bool = True,
    comm: Any = None,
    check: bool = True,
    progress: Progress | None = None,
    eval_inputs: Mapping[str, Tensor] | None = None,
    targets: np.ndarray | None = None,
    eval_targets: np.ndarray | None = None,
    example_ids: Sequence[str] | None = None,
    eval_ids: Sequence[str] | None = None,
    job: Mapping[str, Any] | None = None,
    extras: Mapping[str, np.ndarray] | None = None,
    seed: int = 0,
) -> Gram:
    """Return the exact empirical NTK Gram matrix of a model on a set of inputs.

    K[n, m] = Σ_c ⟨∇f_c(x_n), ∇f_c(x_m)⟩ for `"trace"`: a sum over parameters and outputs, not divided by anything.
    No gradient is ever stored for all samples and all parameters.

    Args:
        model: any `torch.nn.Module`; it is run in eval mode and left as it was found.
        inputs: tensors with a leading sample axis N: what the model is called with; `labels` only reach the readout.
        inputs2: other inputs; then K is (N, M), rows `inputs`, columns `inputs2`.
        readout: `"logits"`, `"margin"`, `"loss"`, or a callable (model_outputs, inputs) -> (N, C).
        params: `"trainable"`, `"all"`, a glob over names, or a list of names.
        contraction: `"trace"`, `"full"`, `"per-output"` or `"sum-of-outputs"`.
        transform: `"sgd"`.
        per_module: keep each module's own Gram as well; they sum to K.
        precision: `"high"`: float32 passes and tile products, float64 across tiles. `"exact"`: float64 throughout.
        backend: `"auto"` or `"torch"`.
        memory_gib: refuse a job whose plan needs more than this above the loaded model.
        out: HDF5 file to write; it appears only when complete.
        resume: a complete file of the same job is returned as it is; False refuses any existing file.
        comm: None.
        check: compare with plain autograd before and after the sweep, and estimate the noise from float64 recomputation.
        progress: called with (flops done, flops in all, stage).
        eval_inputs: further inputs swept along: adds `cross` (eval × train) and `eval_outputs`.
        targets: (N, C) kept in the result and the file.
        eval_targets: (M, C) likewise.
        example_ids: N names kept in the file.
        eval_ids: M names.
        job: a mapping kept in the file.
        extras: further arrays kept in the file.
        seed: of the drawn checks.

    Returns:
        The Gram. `noise` is NaN with `check=False`.

    Raises:
        InputError: arguments that cannot be used, or a file of another job under `out`.
        NotImplementedError: an argument whose capability this version lacks; says what to use instead.
        CheckFailed: the sweep disagrees with plain autograd.
        NonFinite: a gradient is not finite.
    Cost: see `plan_gram`. Source: definitions as in Jacot et al. 2018; factored per-sample gradients as in Goodfellow 2015.
    """
    start = time.perf_counter()
    _refuse(transform, precision, backend, comm, contraction, inputs2, eval_inputs)
    task = _Task.prepare(model, inputs, inputs2, eval_inputs, readout, params, contraction, precision)
    _check_rows("targets", targets, task.samples.sizes[0])
    _check_rows("example_ids", example_ids, task.samples.sizes[0])
    _check_rows("eval_targets", eval_targets, task.samples.sizes[-1] if eval_inputs is not None else None)
    _check_rows("eval_ids", eval_ids, task.samples.sizes[-1] if eval_inputs is not None else None)
    identity: dict[str, Any] = {}
    path = None if out is None else _writable(Path(out))
    if path is not None:
        identity = _identity(model, task, contraction, transform, precision, per_module, check, seed, job)
        identity |= {f"{k}_sha256": _digest(v) for k, v in (("targets", targets), ("eval_targets", eval_targets), *(extras or {}).items()) if v is not None}
        if path.exists():
            return _existing(path, identity, resume)
    with ExitStack() as running:
        running.enter_context(evaluation(task.model))
        structure = probe(task.model, task.selected, task.samples, task.readout, seed)
        samples = task.samples.one_by_one() if structure.one_by_one else task.samples
        samples = samples if structure.trim else Samples(samples.groups, trim=False, microbatch=1 if structure.one_by_one else None)
        frame = task.frame(structure.outputs)
        plan = make_plan(task.model, structure, samples, frame, per_module, rate=1.0)
        if memory_gib is not None and plan.peak_bytes > memory_gib * 2**30:
            msg = (
                f"memory_gib={memory_gib}: this job needs about {plan.peak_bytes / 2**30:.2f} GiB above the model, and spilling "
                "to disk is not built yet; use fewer examples, shorter texts, or contraction='sum-of-outputs'"
            )
            raise NotImplementedError(msg)
        truth = None
        if check:
            truth = Check(task.model, task.selected, samples, task.readout, frame, seed)
            truth.sweep(structure)
        sums = _sweep(task, structure, samples, frame, plan, per_module, progress)
        if truth is not None:
            truth.entries(sums, samples)
        noise = _noise(task, structure, samples, frame, sums, seed, running) if check else None
    for row in plan.parameters:
        row.strategy, row.tokens, row.flops, row.seconds = sums.done[row.parameter]
    plan.rate = plan.flops / max(1e-9, sums.pass_seconds + sum(row.seconds or 0.0 for row in plan.parameters))
    gram = _assemble(sums, samples, frame, plan, contraction, transform, two=inputs2 is not None)
    gram.noise = float("nan") if noise is None else noise.norm
    gram.targets, gram.eval_targets = _float(targets), _float(eval_targets)
    gram.extras = dict(extras or {})
    gram.meta = {
        "precision": precision,
        "readout": task.readout.name,
        "parameters": sum(p.numel() for p in task.selected.values()),
        "unused_parameters": structure.unused,
        "module_trace": sums.traces,
        "noise_relative": None if noise is None else noise.relative,
        "checked": check,
        "one_by_one": structure.one_by_one,
        "blocks": structure.stack.depth,
        "seconds": time.perf_counter() - start,
        "pass_seconds": sums.pass_seconds,
        "contract_seconds": sum(row.seconds or 0.0 for row in plan.parameters),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": _device_name(task.device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
        "settings": dict(job or {}),
    }
    if path is not None:
        ids = {"example_id": example_ids, "eval_id": eval_ids}
        store.write_gram(path, gram, identity, {k: list(v) for k, v in ids.items() if v is not None})
        return store.open_gram(path)
    return gram


def plan_gram(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    inputs2: Mapping[str, Tensor] | None = None,
    *,
    readout: str | ReadoutFunction = "logits",
    params: str | Iterable[str] = "trainable",
    contraction: str = "trace",
    transform: str = "sgd",
    per_module: bool = False,
    precision: str = "high",
    backend: str = "auto",
    eval_inputs: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    **_run_only: Any,
) -> Plan:
    """Return what `compute_gram` would do with the same arguments: strategy, flops, bytes and seconds by parameter.

    Cost: about ten forward and backward passes of three samples.

    Raises:
        InputError, NotImplementedError: as `compute_gram`.
    """
    _refuse(transform, precision, backend, None, contraction, inputs2, eval_inputs)
    task = _Task.prepare(model, inputs, inputs2, eval_inputs, readout, params, contraction, precision)
    with evaluation(task.model):
        structure = probe(task.model, task.selected, task.samples, task.readout, seed)
    samples = task.samples.one_by_one() if structure.one_by_one else task.samples
    return make_plan(task.model, structure, samples, task.frame(structure.outputs), per_module)


@dataclass
class _Task:
    """A validated call: the model in the precision it will run in, and what to run it on."""

    model: nn.Module
    selected: dict[str, nn.Parameter]
    samples: Samples
    readout: Readout
    contraction: str
    two: bool

    @classmethod
    def prepare(
        cls,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        inputs2: Mapping[str, Tensor] | None,
        eval_inputs: Mapping[str, Tensor] | None,
        readout: str | ReadoutFunction,
        params: str | Iterable[str],
        contraction: str,
        precision: str,
    ) -> _Task:
        groups = [inputs] + [g for g in (inputs2, eval_inputs) if g is not None]
        for group in groups:
            check_inputs(group)
        chosen = resolve_readout(readout, contraction)
        names = list(select_parameters(model, params))
        running = in_precision(model, precision)
        by_name = dict(running.named_parameters())
        samples = Samples(groups)
        return cls(running, {n: by_name[n] for n in names}, samples, chosen, contraction, inputs2 is not None)

    @property
    def device(self) -> torch.device:
        return next(iter(self.model.parameters())).device

    def frame(self, outputs: int) -> Frame:
        first = self.samples.span(0)
        if self.two:
            return Frame(first, self.samples.span(1), outputs, self.contraction)
        return Frame((0, self.samples.total), first, outputs, self.contraction)


def in_precision(model: nn.Module, precision: str) -> nn.Module:
    """Return the model itself when all its floating parameters have the wanted dtype, else a converted copy.

    `"exact"` wants float64, `"high"` float32 (or float64, when that is what the model is in).
    """
    wanted = torch.float64 if precision == "exact" else torch.float32
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if dtypes == {wanted} or dtypes == {torch.float64}:
        return model
    # A tokenizer carried along need not be copied.
    keep = getattr(model, "ntk_tokenizer", None)
    return copy.deepcopy(model, {} if keep is None else {id(keep): keep}).to(wanted)


def _refuse(
    transform: str, precision: str, backend: str, comm: Any, contraction: str, inputs2: Any, eval_inputs: Any
) -> None:
    _one_of("contraction", contraction, CONTRACTIONS)
    _one_of("precision", precision, ("exact", "high", "fast"))
    _one_of("backend", backend, ("auto", "torch", "triton"))
    if isinstance(transform, str):
        _one_of("transform", transform, ("sgd", "sign", "asymmetric-sign"))
    if inputs2 is not None and eval_inputs is not None:
        msg = "eval_inputs: goes with a Gram of inputs against themselves; leave out inputs2"
        raise InputError(msg)
    later = [
        (precision == "fast", "precision='fast' is not built yet; use precision='high'"),
        (backend == "triton", "backend='triton' is not built yet; use backend='torch'"),
        (transform != "sgd", f"transform={transform!r} is not built yet; use transform='sgd'"),
        (comm is not None, "comm: runs over several processes are not built yet; leave comm=None"),
    ]
    for hit, msg in later:
        if hit:
            raise NotImplementedError(msg)


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        msg = f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}"
        raise InputError(msg)


def _check_rows(name: str, rows: Any, n: int | None) -> None:
    if rows is None:
        return
    if n is None:
        msg = f"{name}: given without eval_inputs"
        raise InputError(msg)
    if len(rows) != n:
        msg = f"{name}: expected {n} rows, one for each example, got {len(rows)}"
        raise InputError(msg)


def _writable(path: Path) -> Path:
    if not path.parent.is_dir():
        msg = f"out: folder {path.parent} does not exist"
        raise InputError(msg)
    if path.is_dir():
        msg = f"out: {path} is a folder, expected a file name"
        raise InputError(msg)
    return path


def _existing(path: Path, identity: Mapping[str, Any], resume: bool) -> Gram:
    if not resume:
        msg = f"out: {path} exists; remove it, choose another name, or allow resume"
        raise InputError(msg)
    difference = store.first_difference(store.read_job(path), identity)
    if difference is not None:
        msg = f"out: {path} holds another job: {difference}"
        raise InputError(msg)
    log.info("%s is complete: nothing to compute", path)
    return store.open_gram(path)


def _identity(
    model: nn.Module, task: _Task, contraction: str, transform: str, precision: str, per_module: bool, check: bool, seed: int, job: Any
) -> dict[str, Any]:
    """Return what defines a file's values: the same mapping means the same numbers."""
    names = sorted(task.selected)
    code = getattr(getattr(task.readout.function, "__code__", None), "co_code", b"")
    return {
        "model": fingerprint(model),
        "data": [fingerprint_inputs(g) for g in task.samples.groups],
        "two_inputs": task.two,
        "params": [len(names), _digest(np.array(names))],
        "readout": [task.readout.name, _digest(np.frombuffer(code, dtype=np.uint8)) if task.readout.name not in ("logits", "margin", "loss") else ""],
        "contraction": contraction,
        "transform": transform,
        "precision": precision,
        "per_module": per_module,
        "check": check,
        "seed": seed,
        "settings": dict(job or {}),
    }


def _sweep(
    task: _Task, structure: Structure, samples: Samples, frame: Frame, plan: Plan, per_module: bool, progress: Progress | None
) -> Sums:
    done = 0.0
    total = max(plan.flops, 1.0)

    def tick(flops: float, stage: str) -> None:
        nonlocal done
        done += flops
        if progress is not None:
            progress(min(done, total), total, stage)

    sums = sum_gram(
        task.model,
        task.selected,
        structure,
        samples,
        task.readout,
        frame,
        group=module_of if per_module else None,
        tick=tick,
        pass_flops=plan.pass_flops,
    )
    if per_module:
        for part in sums.parts.values():
            part.finish()
            sums.total.K += part.K
    else:
        sums.total.finish()
    if progress is not None:
        progress(total, total, "done")
    return sums


def _noise(
    task: _Task, structure: Structure, samples: Samples, frame: Frame, sums: Sums, seed: int, running: ExitStack
) -> Any:
    model = in_precision(task.model, "exact")
    if model is not task.model:
        running.enter_context(evaluation(model))
    by_name = dict(model.named_parameters())
    selected = {name: by_name[name] for name in task.selected}
    return estimate_noise(model, selected, structure.on(model), samples, task.readout, frame, sums, seed=seed)


def _assemble(sums: Sums, samples: Samples, frame: Frame, plan: Plan, contraction: str, transform: str, *, two: bool) -> Gram:
    rows = samples.sizes[0] * frame.width

    def order(matrix: np.ndarray, group: int, columns: int) -> np.ndarray:
        found = unsorted(matrix, samples, group, columns, frame.width)
        return found if contraction == "per-output" else found[0]

    K = sums.total.K.cpu().numpy()
    outputs = [sums.outputs[slice(*samples.span(g))][samples.unsort(g)] for g in range(len(samples.sizes))]
    gram = Gram(order(K[:, :rows], 0, 1 if two else 0), outputs[0], contraction, transform, float("nan"), plan=plan)
    gram.modules = {name: order(part.K.cpu().numpy()[:, :rows], 0, 1 if two else 0) for name, part in sums.parts.items()}
    if two:
        gram.eval_outputs = outputs[1]
    elif len(samples.sizes) > 1:
        gram.cross, gram.eval_outputs = order(K[:, rows:], 1, 0), outputs[1]
    return gram


def _float(array: Any) -> np.ndarray | None:
    return None if array is None else np.asarray(array, dtype=np.float64)


def _digest(array: Any) -> str:
    import hashlib

    array = np.ascontiguousarray(array)
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
