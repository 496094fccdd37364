"""Per-sample gradients by recorded factors and by plain autograd, side by side on a few samples."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ntkengine.errors import InputError
from ntkengine.inputs.readout import Readout
from ntkengine.tangents.blocks import Stack
from ntkengine.tangents.boundaries import cut_forward
from ntkengine.tangents.capture import Call, PathFailed, Pulled, Recorder
from ntkengine.tangents.factors import Lookup, ParameterFactors, merge
from ntkengine.tangents.paths import matrix_shape, path_for, uses_of
from ntkengine.tangents.rehearsal import Scene, agreement, rounding

log = logging.getLogger(__name__)

_NOTHING = torch.empty(0)
Owners = tuple[tuple[str, str, str], ...]


class Recording:
    """A cut pass with recorded calls, by segment."""

    def __init__(
        self,
        model: nn.Module,
        modules: dict[str, nn.Module],
        inputs: Mapping[str, Tensor],
        stack: Stack,
        readout: Readout,
        *,
        expand: Collection[str],
    ) -> None:
        n = len(next(iter(inputs.values())))
        ends: list[dict[str, int]] = []
        with Recorder(modules, n, expand=expand) as recorder:
            self.cut = cut_forward(
                model, inputs, stack, readout, lambda _s: ends.append({m: len(c) for m, c in recorder.calls.items()})
            )
        ends.append({m: len(c) for m, c in recorder.calls.items()})
        self.calls = [
            {m: c[a.get(m, 0) : b.get(m, 0)] for m, c in recorder.calls.items() if b.get(m, 0) > a.get(m, 0)}
            for a, b in zip(ends, ends[1:], strict=False)
        ]

    def drop(self, segment: int) -> None:
        """Let go of a segment's graph and recorded inputs."""
        self.cut.leaves[segment] = None
        self.cut.outs[segment] = _NOTHING
        self.calls[segment] = {}


class Met(NamedTuple):
    """The autograd graph of an output: how often each parameter enters it, and its nodes."""

    counts: Counter[str]
    nodes: set[Any]


def uses_in_graph(out: Tensor, parameters: Mapping[str, nn.Parameter]) -> Met:
    """Return how often each parameter enters the computation of `out`: edges to it in the autograd graph."""
    names = {id(p): name for name, p in parameters.items()}
    found: Counter[str] = Counter()
    seen: set[Any] = set()
    ahead: list[Any] = [out.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for parent, _ in node.next_functions:
            name = names.get(id(getattr(parent, "variable", None)))
            if name is not None:
                found[name] += 1
            ahead.append(parent)
    return Met(found, seen)


def calls_of(owners: Owners, calls: Mapping[str, Sequence[Call]], met: Met) -> int:
    """Return how many recorded calls of the owners' modules the graph has: one whose output is dropped uses nothing."""
    made = [call for m in {m for m, _, _ in owners} for call in calls.get(m, ())]
    return sum(call.edge is not None and call.edge.node in met.nodes for call in made)


@dataclass
class Truth:
    """One parameter's gradients by plain autograd, for each sample, and their norms; None where it was not used.

    Those of an embedding are sparse: the rows the sample touches.
    """

    like: Tensor
    gradients: list[Tensor | None]
    norms: list[float]


def reference_gradients(
    model: nn.Module, scenes: Sequence[Scene], selected: Mapping[str, nn.Parameter], v: Tensor
) -> dict[str, Truth]:
    """Return each used parameter's gradient of ⟨v, segment output⟩ by plain autograd, sample by sample.

    Args:
        model: the model, for messages.
        scenes: one segment with its graph, one for each sample.
        selected: parameters by name.
        v: (n, …) the cotangent.

    Raises:
        InputError: the model's own backward pass fails.
    """
    truth: dict[str, Truth] = {}
    for i, scene in enumerate(scenes):
        if not scene.out.requires_grad:
            continue
        try:
            grads = torch.autograd.grad(
                scene.out, list(selected.values()), v[i : i + 1], retain_graph=True, allow_unused=True
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            msg = f"model: {type(model).__name__} cannot be differentiated: {str(error).splitlines()[0]}"
            raise InputError(msg) from error
        found = {n: g.coalesce() if g.is_sparse else g for n, g in zip(selected, grads, strict=True) if g is not None}
        for (name, g), norm in zip(found.items(), _norms(list(found.values())), strict=True):
            if name not in truth:
                truth[name] = Truth(selected[name], [None] * len(scenes), [0.0] * len(scenes))
            truth[name].gradients[i], truth[name].norms[i] = g, norm
    return truth


def agreeing(
    model: nn.Module,
    name: str,
    here: list[tuple[str, str]],
    pulled: Sequence[dict[str, list[Pulled]]],
    sizes: Sequence[int],
    truth: Truth,
    scale: float,
) -> Owners | None:
    """Return the owners and kinds of the first path that reproduces the true per-sample gradients, or None.

    Args:
        model: the model.
        name: the parameter.
        here: modules that own it and were called, with its own name there.
        pulled: recordings: one of all samples, or one of each.
        sizes: samples in each recording.
        truth: plain autograd.
        scale: the largest gradient in the segment, for what counts as rounding.
    """
    # A module that hands its parameter to one inside it (a bias shared with its linear) uses it there, not twice.
    innermost = [(m, local) for m, local in here if not any(other.startswith(f"{m}.") for other, _ in here)]
    for places, general in ((here, False), (innermost, False), (here, True), (innermost, True)):
        kinds = tuple((m, local, "leaf" if general else path_for(model.get_submodule(m), local)) for m, local in places)
        if max(sizes) == 1 and any(kind == "leaf" for _, _, kind in kinds):
            continue  # one sample's plain autograd costs less than a VJP of its own
        at = 0
        for recording, n in zip(pulled, sizes, strict=True):
            got = _gradient(model, name, kinds, recording, n, truth.like)
            if got is None or not _same(got, truth, at, scale):
                break
            at += n
        else:
            return kinds
    return None


def _same(got: Sequence[Tensor], truth: Truth, at: int, scale: float) -> bool:
    """Whether gradients, which are overwritten, are the true ones of the samples from position `at` on."""
    off = []
    for g, expected in zip(got, truth.gradients[at : at + len(got)], strict=True):
        if expected is not None and g.is_sparse == expected.is_sparse:
            g = g - expected if g.is_sparse else g.sub_(expected)
        elif expected is not None:
            g = (g.to_dense() if g.is_sparse else g) - (expected.to_dense() if expected.is_sparse else expected)
        off.append(g.coalesce() if g.is_sparse else g)
    norms = truth.norms[at : at + len(off)]
    allowed = [agreement(g.dtype) * norm + rounding(g.dtype) * scale for g, norm in zip(off, norms, strict=True)]
    return all(error <= limit for error, limit in zip(_norms(off), allowed, strict=True))


def _norms(gradients: Sequence[Tensor]) -> list[float]:
    """Return the norms of coalesced or dense tensors of one dtype."""
    if not gradients:
        return []
    return torch.stack(torch._foreach_norm([g.values() if g.is_sparse else g for g in gradients])).tolist()


def _gradient(
    model: nn.Module, name: str, kinds: Owners, pulled: dict[str, list[Pulled]], n: int, like: Tensor
) -> Sequence[Tensor] | None:
    """Return the per-sample gradients (parameter shape) that these paths give, or None when one does not fit."""
    transposed = [k == "outer-transposed" for _, _, k in kinds]
    if not kinds or any(transposed) != all(transposed):
        return None
    try:
        factors = factors_of(model, name, kinds, pulled, n, like)
        if factors.kind == "lookup":
            return [
                torch.sparse_coo_tensor(ids[None], d[0], like.shape, check_invariants=True)
                for use in factors.chunks[0]
                if isinstance(use, Lookup)
                for ids, d in zip(use.ids, use.d, strict=True)
            ]
        g = factors.dense(0, 1, like)[:, 0]
    except (PathFailed, RuntimeError, IndexError) as error:  # shapes that this path cannot mean
        log.debug("%s: %s does not fit: %s", name, kinds, error)
        return None
    return list((g.transpose(1, 2) if all(transposed) else g).reshape(n, *like.shape))


def factors_of(
    model: nn.Module, name: str, kinds: Owners, pulled: dict[str, list[Pulled]], n: int, like: Tensor
) -> ParameterFactors:
    """Return the parameter's factors on the recorded samples, as one microbatch."""
    shape = matrix_shape(like)[::-1] if kinds[0][2] == "outer-transposed" else matrix_shape(like)
    uses = [u for m, local, k in kinds for u in uses_of(k, model.get_submodule(m), m, local, pulled.get(m, ()), n)]
    return ParameterFactors(name, shape, [n], [merge(uses)])
