"""Held-out heads side by side, as one head with more outputs, and whether they give what each gives alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkengine.errors import InputError
from ntkengine.gram.autograd import plain_gradients
from ntkengine.inputs.batches import Samples
from ntkengine.inputs.headrows import chunk_logits, nearness
from ntkengine.inputs.heads import HeadFit
from ntkengine.inputs.parameters import select_parameters
from ntkengine.inputs.readout import Readout, ReadoutFunction, logits_of
from ntkengine.inputs.running import evaluation
from ntkengine.tangents.grouping import grouped

_NONE = {torch.float64: 1e-12, torch.float32: 1e-6}  # of the largest singular value: less is rounding
_FLOOR = 1e-2  # of the whole gradient: a parameter's below it is compared relative to that
_PARTS = 4  # of a gradient: where memory asks for more, only so many are compared


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
        self._head, self._module, pairs = head, head.module, head.weights[:-1]
        own = {id(p) for p in linear.parameters()}
        named = dict(model.named_parameters(remove_duplicate=False))
        chosen = list(select_parameters(model, params))
        self._others = [name for name in chosen if id(named[name]) not in own]
        mix = np.array([[-1.0, 1.0]]) if readout == "margin" else np.eye(len(pairs[0][0]))
        weights, biases = (np.stack([pair[i] for pair in pairs]) for i in (0, 1))
        self.width = len(mix)
        dtype, outside = linear.weight.dtype, len(self._others) == len(chosen)
        self._turned = outside and dtype in (torch.float64, *([] if precision == "exact" else [torch.float32]))
        U, S, V = np.linalg.svd(mix @ weights, full_matrices=False)
        sizes = S if self._turned else np.linalg.norm(mix @ weights, axis=2)
        large = sizes > _NONE.get(dtype, 1e-2) * S.max()
        # An output that is nothing but rounding has no gradient to check.
        sound = not outside or bool(large.any() and (large == (large[0] if self._turned else True)).all())
        hooked = any(hooks for key, hooks in vars(linear).items() if "_hooks" in key) or "forward" in vars(linear)
        tied = sum(id(p) in own for p in named.values()) > len(own)
        self._plain = sound and not hooked and not tied and self._module != "" and type(linear) is nn.Linear
        if self._turned:
            self.rank = int(large[0].sum())
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

    def agrees(self, model: nn.Module, inputs: Mapping[str, Tensor], readout: Readout, entries: int) -> bool:
        """Whether one example's outputs, and the slopes of the first head's, are those of each head alone.

        Not so with an adapter of the head itself, a scale of logits, or a model that reads its head's weights or shape:
        many show in gradients only. Those beside the head or after it show in which gradients there are at all.

        Args:
            model: with its fitted head.
            inputs: of examples.
            readout: of one head.
            entries: of gradients to hold at once.
        """
        first = {k: v[:1] for k, v in inputs.items()}
        if not self._plain or not self._leads(model, first):
            return False
        alone = np.stack(self._head.each_fold(model, lambda _: _outputs(model, first, readout)[0]))
        try:
            with self.in_place(model):
                got = self.readouts(_outputs(model, first, self))[:, 0]
        except (RuntimeError, IndexError, ValueError, InputError):
            return False
        near = nearness(next(model.parameters()).dtype)
        if got.shape != alone.shape or not np.abs(got - alone).max() <= near * np.abs(alone).max():
            return False
        named = dict(model.named_parameters(remove_duplicate=False))
        parts = grouped({name: named[name].numel() for name in self._others}, entries / 3)
        return all(self._same(model, first, readout, names, near) for names in parts[:: -(-len(parts) // _PARTS) or 1])

    def _leads(self, model: nn.Module, first: Mapping[str, Tensor]) -> bool:
        """Whether only the head's outputs lead to the logits, and only the head uses its weights."""
        head: Any = model.get_submodule(self._module)
        own = dict(head.named_parameters())

        def cut(_head: nn.Module, _args: Any, output: Tensor) -> Tensor:
            return output.detach()

        def held(_head: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> Tensor:
            return nn.functional.linear(args[0], *(p.detach() for p in own.values()))

        names = [f"{self._module}.{name}" for name in own]
        for hook, wanted in ((cut, [*self._others, *names]), (held, names)):
            handle = head.register_forward_hook(hook)
            try:
                found = _slopes(model, first, lambda outputs, _: logits_of(outputs), wanted)
            except (RuntimeError, IndexError):
                return False
            finally:
                handle.remove()
            if found:
                return False
        return True

    def _same(
        self, model: nn.Module, first: Mapping[str, Tensor], readout: Readout, names: Sequence[str], near: float
    ) -> bool:
        """Whether the slopes of the first head's outputs are the same alone and side by side."""

        def of_first_head(outputs: Any, given: Mapping[str, Tensor]) -> Tensor:
            z = self(outputs, given)[:, : self.rank]
            return z @ torch.from_numpy(self._back[0]).to(z).T

        try:
            self._head.write(model, 0)
            alone = _slopes(model, first, readout, names)
        finally:
            self._head.write(model, -1)
        with self.in_place(model):
            beside = _slopes(model, first, of_first_head, names)
        if alone.keys() != beside.keys():
            return False
        sizes = {name: _norm(slope) for name, slope in alone.items()}
        least = _FLOOR * float(np.linalg.norm(list(sizes.values())))
        return all(_norm(alone[name] - beside[name]) <= near * max(size, least) for name, size in sizes.items())


def _outputs(model: nn.Module, first: Mapping[str, Tensor], readout: ReadoutFunction) -> np.ndarray:
    """Return one example's outputs, (1, C)."""
    one = Samples([first], trim=False)
    return readout(chunk_logits(model, one, one.chunks[0], []), first).double().cpu().numpy()


def _slopes(
    model: nn.Module, first: Mapping[str, Tensor], readout: ReadoutFunction, names: Sequence[str]
) -> dict[str, Tensor]:
    """Return the gradient of a weighted sum of one example's outputs, by parameter; those that lead there."""

    def total(outputs: Any, given: Mapping[str, Tensor]) -> Tensor:
        f = readout(outputs, given)
        return (f * torch.linspace(1.0, 2.0, f.shape[1]).to(f)).sum(1, keepdim=True)

    named = dict(model.named_parameters(remove_duplicate=False))
    with evaluation(model):
        found = plain_gradients(model, named, names, [first], Readout("slopes", total), 1, foreign=True)
    return {name: slopes[0, 0] for name, slopes in found.items() if slopes}


def _norm(slope: Tensor) -> float:
    return float((slope.coalesce().values() if slope.is_sparse else slope).double().norm())
