"""Per-sample gradients by recorded factors and by plain autograd, side by side on a few samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ntkengine.inputs.readout import Readout
from ntkengine.tangents.blocks import CutPass, Stack, cut_forward
from ntkengine.tangents.capture import PathFailed, Pulled, Recorder, matrix_shape, path_for, uses_of
from ntkengine.tangents.factors import ParameterFactors, merge

Owners = tuple[tuple[str, str, str], ...]

# Two wrong paths differ by O(1); rounding, attention kernels and padding by far less.
_AGREE = {torch.float64: 1e-4, torch.float32: 1e-3}


class Recording:
    """A cut pass with recorded calls, by segment."""

    def __init__(
        self,
        model: nn.Module,
        modules: dict[str, nn.Module],
        inputs: Mapping[str, Tensor],
        stack: Stack,
        readout: Readout,
    ) -> None:
        self.n = len(next(iter(inputs.values())))
        ends: list[dict[str, int]] = []
        with Recorder(modules, self.n) as recorder:
            self.cut = cut_forward(
                model, inputs, stack, readout, lambda _s: ends.append({m: len(c) for m, c in recorder.calls.items()})
            )
        ends.append({m: len(c) for m, c in recorder.calls.items()})
        self.calls = [
            {m: c[a.get(m, 0) : b.get(m, 0)] for m, c in recorder.calls.items() if b.get(m, 0) > a.get(m, 0)}
            for a, b in zip(ends, ends[1:], strict=False)
        ]

    def pull(self, segment: int, v: Tensor) -> dict[str, list[Pulled]]:
        """Return each module's calls in a segment with the output gradient for cotangent v, C = 1."""
        calls = [(m, c) for m, cs in self.calls[segment].items() for c in cs if c.edge is not None]
        out = self.cut.outs[segment]
        pulled: dict[str, list[Pulled]] = defaultdict(list)
        if calls and out.requires_grad:
            grads = torch.autograd.grad(out, [c.edge for _, c in calls], v, retain_graph=True, allow_unused=True)
            for (m, c), g in zip(calls, grads, strict=True):
                if g is not None:
                    pulled[m].append(Pulled(c, g[None]))
        return pulled


def reference_gradients(
    references: list[CutPass], segment: int, selected: Mapping[str, nn.Parameter], v: Tensor
) -> dict[str, list[Tensor]] | None:
    """Return each used parameter's gradient of ⟨v, segment output⟩ by plain autograd, sample by sample.

    None when the output also depends on another segment's input.
    """
    names = list(selected)
    truth: dict[str, list[Tensor]] = {}
    for i, reference in enumerate(references):
        out, leaves = reference.outs[segment], [x for x in reference.leaves if x is not None]
        if not out.requires_grad:
            continue
        wanted = [*leaves, *selected.values()]
        grads = torch.autograd.grad(out, wanted, v[i : i + 1], retain_graph=True, allow_unused=True)
        for leaf, g in zip(leaves, grads, strict=False):
            if g is not None and leaf is not reference.leaves[segment]:
                return None
        for name, g in zip(names, grads[len(leaves) :], strict=True):
            if g is not None:
                truth.setdefault(name, [torch.zeros_like(selected[name]) for _ in references])[i] = g
    return truth


def agreeing(
    model: nn.Module,
    name: str,
    here: list[tuple[str, str]],
    pulled: dict[str, list[Pulled]],
    n: int,
    truth: list[Tensor],
    scale: float,
) -> Owners | None:
    """Return the owners and kinds of the first path that reproduces the true per-sample gradients, or None."""
    for general in (False, True):
        kinds = tuple((m, local, "leaf" if general else path_for(model.get_submodule(m), local)) for m, local in here)
        got = _gradient(model, name, kinds, pulled, n, truth[0])
        if got is not None and close(got, torch.stack(truth), scale):
            return kinds
    return None


def agreeing_alone(
    model: nn.Module,
    name: str,
    here: list[tuple[str, str]],
    pulled: list[dict[str, list[Pulled]]],
    truth: list[Tensor],
    scale: float,
) -> Owners | None:
    """Return as `agreeing`, from recordings of one sample each."""
    for general in (False, True):
        kinds = tuple((m, local, "leaf" if general else path_for(model.get_submodule(m), local)) for m, local in here)
        got = [_gradient(model, name, kinds, one, 1, truth[0]) for one in pulled]
        if all(g is not None and close(g[0], t, scale) for g, t in zip(got, truth, strict=True)):
            return kinds
    return None


def _gradient(
    model: nn.Module, name: str, kinds: Owners, pulled: dict[str, list[Pulled]], n: int, like: Tensor
) -> Tensor | None:
    """Return the per-sample gradients (n, *parameter shape) that these paths give, or None when one does not fit."""
    transposed = [k == "outer-transposed" for _, _, k in kinds]
    if not kinds or any(transposed) != all(transposed):
        return None
    try:
        factors = factors_of(model, name, kinds, pulled, n, like)
    except PathFailed:
        return None
    if not factors.chunks[0]:
        return torch.zeros(n, *like.shape, dtype=like.dtype, device=like.device)
    g = factors.dense(0, 1, like)[:, 0]
    return (g.transpose(1, 2) if all(transposed) else g).reshape(n, *like.shape)


def factors_of(
    model: nn.Module, name: str, kinds: Owners, pulled: dict[str, list[Pulled]], n: int, like: Tensor
) -> ParameterFactors:
    """Return the parameter's factors on the recorded samples, as one microbatch."""
    shape = matrix_shape(like)[::-1] if kinds[0][2] == "outer-transposed" else matrix_shape(like)
    uses = [u for m, local, k in kinds for u in uses_of(k, model.get_submodule(m), m, local, pulled.get(m, ()), n)]
    return ParameterFactors(name, shape, [n], [merge(uses)])


def close(got: Tensor, truth: Tensor, scale: float) -> bool:
    """Whether two tensors agree to far better than two different gradients would, and are finite."""
    tolerance = _AGREE.get(truth.dtype, 5e-2)
    floor = 100 * torch.finfo(truth.dtype).eps * scale
    error = (got - truth).reshape(len(got), -1).norm(dim=1) if got.ndim > 1 else (got - truth).norm()
    size = truth.reshape(len(truth), -1).norm(dim=1) if truth.ndim > 1 else truth.norm()
    return bool((error <= tolerance * size + floor).all())
