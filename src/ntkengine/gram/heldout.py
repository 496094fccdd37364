"""The train Gram under every held-out head: in one sweep, with all heads side by side, where there is room for it.

The heads differ in their own weights alone, so that with F of them in place of the head one forward pass serves all:
the kernels of a head's outputs add up to its Gram. A weight of the head itself has a gradient in its own rows only, and
its part of Gram k is what it is under head k. Output gradients of all heads wait in place of those of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkengine.errors import InputError
from ntkengine.gram.beside import Beside
from ntkengine.gram.fitting import GIB, bounds
from ntkengine.gram.plan import Plan
from ntkengine.gram.planning import planned
from ntkengine.gram.result import Gram, Layers, Stacked
from ntkengine.gram.task import Task
from ntkengine.inputs.heads import HeadFit
from ntkengine.inputs.readout import ReadoutFunction, resolve_readout
from ntkengine.inputs.running import evaluation

if TYPE_CHECKING:
    from ntkengine.cluster.comm import Team

_MORE = 2.0  # times what one head's Gram takes, in a job without a bound
_FORETOLD, _ROUNDED = 0.02, 0.5  # of the largest output; where half precision rounds, only what is far off is seen
_FULL = torch.float64, torch.float32


def held_out_grams(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    head: HeadFit,
    compute: Callable[..., Gram],
    call: Mapping[str, Any],
    memory_gib: float | None,
    team: Team | None = None,
) -> tuple[Any, np.ndarray]:
    """Return the Grams, (F, …) float64, and outputs (F, N, C) under each fold's head; the fitted head is put back.

    Args:
        model: with its fitted head.
        inputs: the N examples the head was fitted on.
        head: of `fit_head`.
        compute: takes a fold, or None for all in one, and what to change in `call`; returns the Gram.
        call: arguments of `compute_gram` for one fold.
        memory_gib: bound of the job; None: one sweep may take twice what one head's would.
        team: as `compute_gram`.

    Raises:
        InputError: examples, or an order of them, that the head was not fitted on; or as `compute`.

    Cost: a Gram a fold, less all forward passes but one where one sweep does it.
    """
    readout = call.get("readout", "logits")
    if side_by_side(call, len(head.weights[0][0])):
        beside = Beside(model, head, readout, call.get("params", "trainable"), call.get("precision", "high"))
        root = (lambda told: told) if team is None else team.broadcast  # all ranks go the same way
        entries = bounds(memory_gib, next(model.parameters()).element_size()).gradients
        if root(beside.agrees(model, inputs, resolve_readout(readout, "trace"), entries)):
            with beside.in_place(model):
                if root(_has_room(model, inputs, beside, call, memory_gib, team)):
                    found = compute(None, readout=beside, contraction="per-output")
                    outputs = beside.readouts(np.asarray(found.outputs))
                    return Layers(found.values, beside.rank), _foretold(outputs, model, head, call)
    each = head.each_fold(model, compute)
    return Stacked([g.values for g in each]), _foretold(np.stack([g.outputs for g in each]), model, head, call)


def side_by_side(call: Mapping[str, Any], classes: int) -> bool:
    """Whether one sweep may serve all heads: a trace kernel of plain gradients of what is linear in the logits.

    Args:
        call: arguments of `compute_gram`.
        classes: outputs of the head.
    """
    readout = call.get("readout", "logits")
    linear = readout == "logits" or (readout == "margin" and classes == 2)
    plain = call.get("contraction", "trace") == "trace" and call.get("transform", "sgd") == "sgd"
    return linear and plain and call.get("sketch") is None


def held_out_seconds(plan: Plan, call: Mapping[str, Any], folds: int, classes: int, share: float) -> float:
    """Return an estimate of what the Grams under all folds' heads take.

    Args:
        plan: of the job, with its times.
        call: arguments of `compute_gram` for one fold.
        folds: F.
        classes: outputs of the head.
        share: of the job's examples that are train examples.
    """
    if not side_by_side(call, classes):
        return folds * (plan.probe_seconds + share * (plan.pass_seconds + plan.contract_seconds))
    passes = (2 + folds * plan.outputs) / (2 + plan.outputs)  # forward, forward again, and one backward an output
    return plan.probe_seconds + share * (passes * plan.pass_seconds + folds * plan.contract_seconds)


def _foretold(outputs: np.ndarray, model: nn.Module, head: HeadFit, call: Mapping[str, Any]) -> np.ndarray:
    """Return outputs (F, N, C), in which each example's under its own fold's head are what `fit_head` foretold."""
    readout = call.get("readout", "logits")
    own = outputs[head.fold, np.arange(len(head.fold))]
    want = head.held_out[:, 1:] - head.held_out[:, :1] if readout == "margin" else head.held_out
    if readout not in ("logits", "margin") or own.shape != want.shape:  # another readout, or the sum of its outputs
        return outputs
    off = np.abs(own - want).max(1)
    full = call.get("precision") != "fast" and all(p.dtype in _FULL for p in model.parameters())
    if not off.max() <= (_FORETOLD if full else _ROUNDED) * np.abs(want).max():
        n = int(off.argmax())
        raise InputError(
            f"inputs: expected the examples the head was fitted on, in their order; the outputs of example {n} are "
            f"{own[n]}, and the head foretold {want[n]}"
        )
    return outputs


def _has_room(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    beside: Beside,
    call: Mapping[str, Any],
    memory_gib: float | None,
    team: Team | None,
) -> bool:
    """Whether all heads at once take no more memory than a job may, or not much more than one."""

    def peak(readout: ReadoutFunction, contraction: str) -> float:
        precision = call.get("precision", "high")
        task = Task.prepare(
            model,
            inputs,
            None,
            None,
            readout,
            call.get("params", "trainable"),
            contraction,
            "sgd",
            precision,
            call.get("backend", "auto"),
        )
        with evaluation(task.model):
            return planned(task, precision, False, None, call.get("seed", 0), team=team)[1].peak_bytes

    all_heads = peak(beside, "per-output")
    if memory_gib is not None:
        return all_heads <= memory_gib * GIB
    return all_heads <= _MORE * peak(lambda *given: beside(*given)[:, : beside.width], "trace")
