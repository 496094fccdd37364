"""A few samples through the model, held one segment at a time: what the probe compares paths on.

One forward pass keeps what enters each block and no graph; a segment is run again from there when its turn comes, so
that no more than one segment's activations are ever alive. The head's graph, the last, is kept from the first pass; all
graphs are where they are small.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ntkengine.inputs.readout import Readout
from ntkengine.inputs.running import call_model
from ntkengine.tangents.blocks import Stack, first_tensor, holds_tensors
from ntkengine.tangents.boundaries import Others, at_boundaries, before_blocks
from ntkengine.tangents.capture import Call, Pulled, Recorder

_TAG = "ntkengine segment"


@dataclass
class Scene:
    """One segment with its graph.

    Attributes:
        out: its output; of the head f, (n, C).
        leaf: its detached input; None for the first segment.
        calls: recorded calls by module.
    """

    out: Tensor
    leaf: Tensor | None
    calls: dict[str, list[Call]]

    def pull(self, v: Tensor) -> dict[str, list[Pulled]]:
        """Return each module's calls with the output gradient for cotangent v, C = 1."""
        calls = [(m, c, c.edge) for m, cs in self.calls.items() for c in cs if c.edge is not None]
        pulled: dict[str, list[Pulled]] = defaultdict(list)
        if calls and self.out.requires_grad:
            grads = torch.autograd.grad(
                self.out, [edge for _, _, edge in calls], v, retain_graph=True, allow_unused=True
            )
            for (m, c, _), g in zip(calls, grads, strict=True):
                if g is not None:
                    pulled[m].append(Pulled(c, g[None]))
        return pulled


class Rehearsal:
    """A forward pass of n samples, cut at every block boundary.

    Args:
        model: with gradients wanted for the selected parameters.
        modules: to record, by name.
        inputs: a microbatch.
        stack: the model's blocks.
        readout: f.
        expand: as `Recorder`.
        measure: count what the segments' graphs hold.
        keep: keep all segments' graphs.

    Attributes:
        f: (n, C), detached.
        depends: whether f depends on anything: not where the readout is detached.
        apart: whether segments share nothing but the hidden states: no other argument carries a gradient or a state,
            no operation belongs to two of them, as a skip connection around the blocks would, and what enters a block
            is read nowhere else, as by a readout of the first hidden states.
        whole: whether every segment's output has one row for each sample.
        expand: modules whose one row was given to all samples.
        held: bytes of activations that a segment's graph holds, by segment.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        inputs: Mapping[str, Tensor],
        stack: Stack,
        readout: Readout,
        *,
        expand: Collection[str],
        measure: bool = False,
        keep: bool = False,
    ) -> None:
        self.model, self.modules, self.inputs, self.stack, self.readout = model, dict(modules), inputs, stack, readout
        self.n = len(next(iter(inputs.values())))
        self.apart = self.whole = True
        self.held: list[int] = []
        weights = {where for p in model.parameters() for where in storage(p)}
        holding: dict[int, int] = {}
        self._saved: dict[int, Others] = {}
        self._after: dict[int, Tensor] = {}  # each segment's output, to compare a replay with
        self._kept: dict[int, Scene] = {}
        self._entered: dict[int, tuple[Tensor, int]] = {}  # by a leaf's id the leaf, so that it stays, and its segment
        recorder = Recorder(self.modules, self.n, expand=expand)
        leaf: Tensor | None = None

        def note(x: Tensor) -> Tensor:
            holding.update(storage(x))
            return x.detach()  # not x itself: an output saved by its own node would never be freed

        def count() -> None:
            for calls in recorder.calls.values():
                for t in (t for call in calls for t, _ in call.versions):
                    note(t)
            self.held.append(sum(size for where, size in holding.items() if where not in weights))
            holding.clear()

        def enter(segment: int, hidden: Tensor, others: Others | None) -> Tensor:
            nonlocal leaf
            if any(t.requires_grad if isinstance(t, Tensor) else holds_tensors(t) for t in tree_flatten(others)[0]):
                self.apart = False
            count()
            self._note(hidden, segment - 1)
            if keep:
                self._kept[segment - 1] = Scene(hidden, leaf, dict(recorder.calls))
            recorder.calls.clear()
            leaf = hidden.detach().requires_grad_(True)
            self._entered[id(leaf)] = leaf, segment
            if others is not None:
                self._saved[segment] = stack.put(*others, leaf)
            return leaf

        # These hooks hide overwritten tensors from autograd: never where its gradients are the truth.
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda x: x) if measure else nullcontext()
        with at_boundaries(stack, enter), recorder, hooks:
            out = readout(call_model(model, inputs), inputs)
        count()
        self.expand = frozenset(recorder.expanded)
        self._note(out, stack.head)
        self.f, self.depends = out.detach(), out.requires_grad
        self._kept[stack.head] = Scene(out, leaf, dict(recorder.calls))

    def _note(self, out: Tensor, segment: int) -> None:
        self.whole &= out.shape[:1] == (self.n,)
        self._after[segment] = out.detach()
        ahead: list[Any] = [out.grad_fn]
        while ahead:
            node = ahead.pop()
            if node is None:
                continue
            if hasattr(node, "variable"):  # a parameter may be used anywhere, what entered a block only there
                self.apart &= self._entered.get(id(node.variable), (None, segment))[1] == segment
                continue
            tag = node.metadata.get(_TAG)
            if tag is None:
                node.metadata[_TAG] = segment
                ahead += [parent for parent, _ in node.next_functions]
            elif tag != segment:
                self.apart = False

    def scene(self, segment: int) -> Scene | None:
        """Return a segment with its graph, run again from what entered it; None when that gives another output."""
        if segment in self._kept:
            return self._kept.pop(segment)
        recorder = Recorder(self.modules, self.n, expand=self.expand)
        if segment == 0:
            leaf = None
            with recorder:
                out = before_blocks(self.model, self.inputs, self.stack)
        else:
            args, kwargs = self._saved[segment]
            leaf = self.stack.take(args, kwargs).detach().requires_grad_(True)
            args, kwargs = self.stack.put(args, kwargs, leaf)
            with recorder:
                out = first_tensor(self.stack.blocks[segment - 1](*args, **kwargs))
        return Scene(out, leaf, dict(recorder.calls)) if close(out.detach(), self._after[segment]) else None


def storage(x: Tensor) -> dict[int, int]:
    """Return {address: bytes} of a tensor's memory; nothing for one that has none of its own (sparse, quantised)."""
    try:
        return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}
    except (NotImplementedError, RuntimeError):
        return {}


def close(got: Tensor, truth: Tensor) -> bool:
    """Whether two tensors of outputs agree but for rounding, and are finite."""
    scale = float(truth.abs().max()) if truth.numel() else 0.0
    return float((got - truth).norm()) <= agreement(truth.dtype) * float(truth.norm()) + rounding(truth.dtype) * scale


def agreement(dtype: torch.dtype) -> float:
    """Relative error two equal gradients may have: two different ones differ by O(1), rounding by far less."""
    return {torch.float64: 1e-4, torch.float32: 1e-3}.get(dtype, 5e-2)


def rounding(dtype: torch.dtype) -> float:
    """Share of a segment's largest gradient below which another one is nothing but rounding."""
    return 100 * torch.finfo(dtype).eps
