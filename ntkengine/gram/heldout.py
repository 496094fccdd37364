"""The train Gram under every held-out head: in one sweep, with all heads side by side, where there is room for it.

The heads differ in their own weights alone, so that with F of them in place of the head one forward pass serves all:
the kernels of a head's outputs add up to its Gram. A weight of the head itself has a gradient in its own rows only, and
its part of Gram k is what it is under head k. Output gradients of all heads wait in place of those of one.
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
from ntkengine.gram.result import Gram, Layers, Stacked
from ntkengine.gram.task import Task
from ntkengine.inputs.batches import Samples
from ntkengine.inputs.heads import HeadFit
from ntkengine.inputs.parameters import select_parameters
from ntkengine.inputs.readout import ReadoutFunction, logits_of, resolve_readout
from ntkengine.inputs.running import call_model, evaluation, wanting_gradients

if TYPE_CHECKING:
    from ntkengine.cluster.comm import Team

_MORE = 2.0  # times what one head's Gram takes, in a job without a bound
_FORETOLD, _ROUNDED = 0.02, 0.5  # of the largest output; where half precision rounds, only what is far off is seen
_NONE = 1e-9  # of a singular value: less is rounding
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
    readout = call.get("readout", "logits")
    linear = readout == "logits" or (readout == "margin" and len(head.weights[0][0]) == 2)
    plain = call.get("contraction", "trace") == "trace" and call.get("transform", "sgd") == "sgd"
    if linear and plain and call.get("sketch") is None:
        one = resolve_readout(readout, "trace")
        alone = np.stack(head.each_fold(model, lambda _: _first_outputs(model, inputs, one)[0]))
        beside = Beside(model, head, readout, call.get("params", "trainable"), call.get("precision", "high"))
        fits = beside.stands_between(model, inputs)
        with beside.in_place(model):
            root = (lambda told: told) if team is None else team.broadcast  # all ranks go the same way
            fits = root(fits and _agree(model, inputs, beside, alone))
            if fits and root(_has_room(model, inputs, beside, call, memory_gib, team)):
                found = compute(None, readout=beside, contraction="per-output")
                outputs = beside.readouts(np.asarray(found.outputs))
                return Layers(found.values, beside.rank), _foretold(outputs, model, head, call)
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


class Beside:
    """All F held-out heads as one head of F·R outputs, whose kernels add up, R at a time, to a head's Gram.

    A head whose weights are not in the kernel is turned where rounding its rows anew is within the precision: with
    M W = U S Vᵀ, M the readout of logits, outputs S Vᵀ x have the same trace kernel, and there are fewer of them where
    S has zeros: the logits of a head fitted on classes have a constant sum.

    Args:
        model: with its fitted head.
        head: of `fit_head`.
        readout: `"logits"`, `"margin"`.
        params: as `compute_gram`.
        precision: as `compute_gram`.

    Attributes:
        width: C, outputs of the readout.
        rank: R.
    """

    def __init__(self, model: nn.Module, head: HeadFit, readout: str, params: Any, precision: str) -> None:
        linear: Any = model.get_submodule(head.module)
        self._module, pairs = head.module, head.weights[:-1]
        own = {id(p) for p in linear.parameters()}
        named = dict(model.named_parameters(remove_duplicate=False))
        chosen = [named[name] for name in select_parameters(model, params)]
        self._others = [p for p in chosen if id(p) not in own]
        mix = np.array([[-1.0, 1.0]]) if readout == "margin" else np.eye(len(pairs[0][0]))
        weights, biases = (np.stack([pair[i] for pair in pairs]) for i in (0, 1))
        self.width = len(mix)
        rounds = linear.weight.dtype != torch.float64 and (precision == "exact" or linear.weight.dtype != torch.float32)
        self._turned = not rounds and len(self._others) == len(chosen)
        if self._turned:
            U, S, V = np.linalg.svd(mix @ weights, full_matrices=False)
            self.rank = max(1, int((_NONE * S.max() < S).sum(1).max()))
            self._rows, self._biases = (S[:, :, None] * V)[:, : self.rank], None
            self._back, self._shift = U[:, :, : self.rank], biases @ mix.T
        else:
            self.rank, self._mix = self.width, torch.from_numpy(mix)
            self._rows, self._biases = weights, biases
            self._back, self._shift = np.eye(self.rank)[None], np.zeros((1, self.rank))

    def __call__(self, outputs: Any, _inputs: Mapping[str, Tensor]) -> Tensor:
        """Return every head's R outputs, (N, F·R)."""
        logits = logits_of(outputs)
        if self._turned:
            return logits
        return (logits.unflatten(1, (-1, self._mix.shape[1])) @ self._mix.to(logits).T).flatten(1)

    def readouts(self, outputs: np.ndarray) -> np.ndarray:
        """Return every head's readout, (F, N, C) float64, of outputs (N, F·R)."""
        each = outputs.reshape(len(outputs), len(self._rows), self.rank).transpose(1, 0, 2).astype(np.float64)
        return each @ self._back.transpose(0, 2, 1) + self._shift[:, None]

    def stands_between(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> bool:
        """Whether outputs depend on the kernel's parameters through the head alone, not on ones beside or after it.

        Such are an adapter of the head itself, or a scale of logits: they show in gradients before they do in outputs.
        """

        def cut(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return tuple(a.detach() for a in args), {k: v.detach() for k, v in named.items()}

        handle = model.get_submodule(self._module).register_forward_pre_hook(cut, with_kwargs=True)
        try:
            with evaluation(model), wanting_gradients(self._others):
                f = logits_of(call_model(model, _first(model, inputs))).sum()
                slopes = torch.autograd.grad(f, self._others, allow_unused=True) if f.requires_grad else ()
        finally:
            handle.remove()
        return all(slope is None for slope in slopes)

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """Within the block the model has all heads, one after the other, in place of its own."""
        old: Any = model.get_submodule(self._module)
        F, rows, d = self._rows.shape
        new = nn.Linear(d, F * rows, old.bias is not None and not self._turned)
        new = new.to(old.weight).train(old.training)
        with torch.no_grad():
            for name, p in new.named_parameters():
                p.copy_(torch.from_numpy(self._biases if name == "bias" else self._rows).reshape(p.shape))
                p.requires_grad_(getattr(old, name).requires_grad)
        model.set_submodule(self._module, new)
        try:
            yield
        finally:
            model.set_submodule(self._module, old)


def _first_outputs(model: nn.Module, inputs: Mapping[str, Tensor], readout: ReadoutFunction) -> np.ndarray:
    """Return the first example's outputs, (1, C)."""
    given = _first(model, inputs)
    with evaluation(model), torch.no_grad():
        return readout(call_model(model, given), given).double().cpu().numpy()


def _first(model: nn.Module, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    one = Samples([inputs], microbatch=1, trim=False)
    parameter = next(iter(model.parameters()))
    return one.inputs(one.chunks[0], parameter.device, parameter.dtype)


def _agree(model: nn.Module, inputs: Mapping[str, Tensor], beside: Beside, alone: np.ndarray) -> bool:
    """Whether heads side by side give what each gives alone: the model makes its logits of the head's output only."""
    try:
        got = beside.readouts(_first_outputs(model, inputs, beside))[:, 0]
    except (RuntimeError, IndexError, ValueError, InputError):
        return False
    if got.shape != alone.shape:
        return False
    near = _SAME.get(next(model.parameters()).dtype, 5e-2)
    return bool(np.abs(got - alone).max() <= near * np.abs(alone).max())


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
