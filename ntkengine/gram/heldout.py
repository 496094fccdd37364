"""The train Gram under every held-out head: in one sweep, with all heads side by side, where there is room for it.

The heads differ in their own weights alone, so that with F of them in place of the head, as F outputs, one forward pass
serves all: Gram k is the kernel of output k. A weight of the head itself has a gradient in its own rows only, and its
part of Gram k is what it is under head k. F output gradients wait in place of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkengine.errors import InputError
from ntkengine.gram.layout import GIB
from ntkengine.gram.planning import planned
from ntkengine.gram.result import Gram, Stacked
from ntkengine.gram.task import Task
from ntkengine.inputs.batches import Samples
from ntkengine.inputs.heads import HeadFit
from ntkengine.inputs.readout import ReadoutFunction, logits_of
from ntkengine.inputs.running import call_model, evaluation

if TYPE_CHECKING:
    from ntkengine.cluster.comm import Team

_MORE = 2.0  # times what one head's Gram takes, in a job without a bound
_FORETOLD, _ROUNDED = 0.02, 0.5  # of the largest output; where half precision rounds, only what is far off is seen
_SAME = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative to the largest logit


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
    plain = call.get("contraction", "trace") == "trace" and call.get("transform", "sgd") == "sgd"
    if plain and call.get("readout") == "margin" and call.get("sketch") is None:
        alone = head.each_fold(model, lambda _: _first_margins(model, inputs))
        with _side_by_side(model, head):
            root = (lambda told: told) if team is None else team.broadcast  # all ranks go the same way
            if root(_agree(model, inputs, alone)) and root(_has_room(model, inputs, call, memory_gib, team)):
                found = compute(None, readout=margins, contraction="per-output")
                return found.values, _foretold(np.asarray(found.outputs).T[:, :, None], model, head, call)
    each = head.each_fold(model, compute)
    return Stacked([g.values for g in each]), _foretold(np.stack([g.outputs for g in each]), model, head, call)


def _foretold(outputs: np.ndarray, model: nn.Module, head: HeadFit, call: Mapping[str, Any]) -> np.ndarray:
    """Return outputs (F, N, C), in which each example's under its own fold's head are what `fit_head` foretold."""
    readout = call.get("readout", "logits")
    own = outputs[head.fold, np.arange(len(head.fold))]
    want = head.held_out[:, 1:] - head.held_out[:, :1] if readout == "margin" else head.held_out
    if readout not in ("logits", "margin") or own.shape != want.shape:  # another readout, or the sum of its outputs
        return outputs
    off = np.abs(own - want).max(1)
    full = call.get("precision") != "fast" and all(p.dtype in _SAME for p in model.parameters())
    if not off.max() <= (_FORETOLD if full else _ROUNDED) * np.abs(want).max():
        n = int(off.argmax())
        raise InputError(
            f"inputs: expected the examples the head was fitted on, in their order; the outputs of example {n} are "
            f"{own[n]}, and the head foretold {want[n]}"
        )
    return outputs


def margins(outputs: Any, _inputs: Mapping[str, Tensor]) -> Tensor:
    """Return logit₁ − logit₀ of every head, (N, F)."""
    logits = logits_of(outputs)
    return logits[:, 1::2] - logits[:, ::2]


@contextmanager
def _side_by_side(model: nn.Module, head: HeadFit) -> Iterator[None]:
    """Within the block the head is all held-out heads, one after the other."""
    old: Any = model.get_submodule(head.module)
    pairs = head.weights[:-1]
    new = nn.Linear(old.in_features, len(pairs) * old.out_features, old.bias is not None)
    new = new.to(old.weight).train(old.training)
    with torch.no_grad():
        for name, p in new.named_parameters():
            p.copy_(torch.from_numpy(np.concatenate([pair[name == "bias"] for pair in pairs])))
            p.requires_grad_(getattr(old, name).requires_grad)
    model.set_submodule(head.module, new)
    try:
        yield
    finally:
        model.set_submodule(head.module, old)


def _first_margins(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the first example's margins, (heads,)."""
    one = Samples([inputs], microbatch=1, trim=False)
    parameter = next(iter(model.parameters()))
    given = one.inputs(one.chunks[0], parameter.device, parameter.dtype)
    with evaluation(model), torch.no_grad():
        return margins(call_model(model, given), given)[0]


def _agree(model: nn.Module, inputs: Mapping[str, Tensor], alone: list[Tensor]) -> bool:
    """Whether heads side by side give what each gives alone: the model makes its logits of the head's output only."""
    try:
        got = _first_margins(model, inputs)
    except (RuntimeError, IndexError, ValueError, InputError):
        return False
    want = torch.cat(alone)
    if got.shape != want.shape:
        return False
    return bool((got - want).abs().max() <= _SAME.get(want.dtype, 5e-2) * want.abs().max())


def _has_room(
    model: nn.Module, inputs: Mapping[str, Tensor], call: Mapping[str, Any], memory_gib: float | None, team: Team | None
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

    if memory_gib is not None:
        return peak(margins, "per-output") <= memory_gib * GIB
    return peak(margins, "per-output") <= _MORE * peak(lambda *given: margins(*given)[:, :1], "trace")
