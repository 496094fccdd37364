"""`plan_gram`: what a job would do, without doing it."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ntkengine.errors import InputError
from ntkengine.gram.engine import compute_gram
from ntkengine.gram.finer import measures_noise
from ntkengine.gram.fitting import heap_limit
from ntkengine.gram.plan import Plan
from ntkengine.gram.planning import planned, timed
from ntkengine.gram.room import free_bytes
from ntkengine.gram.scaling import check_ranks, predict
from ntkengine.gram.task import Task, check_settings, refuse
from ntkengine.gram.transforms import Preconditioner
from ntkengine.inputs.heap import HEAP
from ntkengine.inputs.readout import ReadoutFunction
from ntkengine.inputs.running import evaluation
from ntkengine.inputs.sources import Source

log = logging.getLogger(__name__)


def plan_gram(
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
    eval_inputs: Source | None = None,
    memory_gib: float | None = None,
    seed: int = 0,
    sketch: int | None = None,
    ranks: int = 1,
    gpus_per_node: int | None = None,
    network: float | None = None,
    **run_only: Any,
) -> Plan:
    """Return what `compute_gram` would do with the same arguments: strategy, flops, bytes and seconds by parameter.

    With `ranks` its `scaling` says what the job takes on as many processes like this one, `gpus_per_node` of them on a
    host, with `network` bytes a second between hosts.

    Cost: about ten forward and backward passes of three samples.

    Raises:
        InputError: as `compute_gram`.
    """
    unknown = run_only.keys() - inspect.signature(compute_gram).parameters.keys()
    if unknown:
        raise InputError(f"plan_gram: takes the arguments of compute_gram, got {', '.join(sorted(unknown))}")
    refuse(transform, precision, backend, contraction, inputs2, eval_inputs, sketch)
    check_settings(memory_gib, seed, per_module=per_module)
    check_ranks(ranks, gpus_per_node, network)
    if network is not None and ranks <= (gpus_per_node or 1):
        log.warning("network: not used, it is the rate between hosts, and all ranks (%d) are on one", ranks)
    task = Task.prepare(
        model, inputs, inputs2, eval_inputs, readout, params, contraction, transform, precision, backend
    )
    HEAP.begin(heap_limit(memory_gib))
    check = bool(run_only.get("check", True))
    double, room = measures_noise(task, check=check), free_bytes(task.device) if ranks == 1 else float("inf")
    with ExitStack() as running:
        running.enter_context(evaluation(task.model))
        structure, plan, layout, samples, sketches = planned(
            task, precision, per_module, memory_gib, seed, sketch, shared_by=ranks, double=double, room=room
        )
        timed(task.fast(running) if precision == "fast" else task, structure, plan, layout, samples, sketches)
    if not check:
        plan.check_seconds = 0.0
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
