"""The model's first-order expansion in its parameters, exact, as a module of its own."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from reprlib import repr as shown

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntkengine.descent import norm
from ntkengine.errors import CheckFailed, InputError
from ntkengine.inputs.attributes import settings
from ntkengine.inputs.differentiable import check_differentiable
from ntkengine.inputs.parameters import select_parameters
from ntkengine.inputs.readout import Readout, ReadoutFunction, resolve_readout
from ntkengine.inputs.running import arguments, coarsest, evaluation, explained
from ntkengine.inputs.streaming import entry_of
from ntkengine.tangents.rehearsal import agreement, rounding

_LEAST = 1e-2  # of the largest gradient: what a comparison takes a smaller one's size for
_PIECE = 1 << 16  # words digested at a time, in cache
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # mixes places


class Linearized(nn.Module):
    """f̄(x; δ) = f(x; θ_0) + J(x) δ: linear in its parameters, the displacement δ, which starts at 0.

    J(x) δ is one forward-mode derivative, so nothing of J is stored. Its tangent kernel is that of the model at θ_0,
    everywhere. The model itself is referred to, not copied; θ_0 is.

    Attributes:
        displacement: δ, one parameter for each selected one, in their order.
        names: their names in the model.
        origin: θ_0 of each, by name.
    """

    def __init__(self, model: nn.Module, selected: Mapping[str, nn.Parameter], readout: Readout) -> None:
        super().__init__()
        self.names = list(selected)
        self.displacement = nn.ParameterList([torch.zeros_like(p) for p in selected.values()])
        self.origin = {name: p.detach().clone() for name, p in selected.items()}
        for name, p in selected.items():
            if entry_of(p) is not None:
                raise InputError(f"linearize: {name} stays in its file; load it without stream, or leave it out")
        self._model = [model]  # in a list: its parameters are none of this module's
        self._readout = readout
        self._statistics = {name: b.detach().clone() for name, b in model.named_buffers()}
        check_differentiable(model)
        self._frozen, self._settings = _states(model, self.names), settings(model)
        self._compared = False

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return f̄, (N, C), of a batch.

        Args:
            inputs: tensors with a leading sample axis, as for `compute_gram`.

        Raises:
            InputError: no tensors by name, or a parameter that was not selected, or a setting of a module, has changed
                since.
            CheckFailed: as `compare`, at the first call.

        Cost: about two forward passes and one reading of the weights; backwards about two more passes.
            The first call compares the two modes on two examples.
        """
        _check_batch(inputs)
        model, origin = self._model[0], self.origin
        for before, now, what in (
            (self._frozen, _states(model, self.names), ", and is no parameter of this one"),
            (self._settings, settings(model), ""),
        ):
            if now != before:
                name = min(n for n in before.keys() | now.keys() if now.get(n, now) != before.get(n, before))
                raise InputError(f"linearize: {name.lstrip('.')} of the model has changed since{what}")
        if not self._compared:
            self.compare(inputs)
        delta = {name: d.to(origin[name]) for name, d in zip(self.names, self.displacement, strict=True)}
        grad = torch.is_grad_enabled()
        with evaluation(model), torch.set_grad_enabled(grad), sdpa_kernel(SDPBackend.MATH):
            value, tangent = self._expanded(inputs, delta)
        return value + tangent

    def compare(self, inputs: Mapping[str, Tensor]) -> None:
        """Compare ⟨w, J δ⟩ in forward mode with ⟨Jᵀ w, δ⟩ of plain autograd, on the first and last example of a batch.

        w is random, and δ too, of a length at which each parameter has about the same share.

        Raises:
            InputError: no derivative in one of the modes.
            CheckFailed: they differ, as where a part under `torch.no_grad`, a hook or a custom function has another
                derivative in the one mode than in the other.
        """
        _check_batch(inputs)
        model, n = self._model[0], len(next(iter(inputs.values())))
        if torch.is_inference_mode_enabled():
            raise InputError("linearize: derivatives cannot be taken inside torch.inference_mode()")
        few = {k: v[sorted({0, n - 1})] for k, v in inputs.items()}
        generator = torch.Generator().manual_seed(0)
        versions = [p._version for p in self.origin.values()]
        with torch.no_grad(), evaluation(model), sdpa_kernel(SDPBackend.MATH):
            leaves = {name: p.detach().requires_grad_(True) for name, p in self.origin.items()}
            f = self._f(few)(leaves)
            dtype, w = coarsest(model, f), torch.randn(f.shape, generator=generator).to(f)
            found: Sequence[Tensor | None] = [None] * len(leaves)
            if f.requires_grad:
                found = torch.autograd.grad(f, list(leaves.values()), w, allow_unused=True)
            grads = [torch.zeros_like(p) if g is None else g for g, p in zip(found, leaves.values(), strict=True)]
            sizes = [norm([g]) for g in grads]
            least = max(sizes) * max(_LEAST, rounding(dtype)) or 1.0
            delta, shares = {}, []
            for (name, p), g, size in zip(self.origin.items(), grads, sizes, strict=True):
                delta[name] = (torch.randn(p.shape, generator=generator) / max(size, least)).to(p)
                shares.append(float((g.double() * delta[name].double()).sum()))
            value, tangent = self._expanded(few, delta)
        if [p._version for p in self.origin.values()] != versions:
            raise InputError(
                f"linearize: the first call of {type(model).__name__} writes to its weights; call it once in eval "
                "mode before"
            )
        if float((value - f.detach()).norm()) > (agreement(dtype) + rounding(dtype)) * float(f.detach().norm()):
            msg = (
                f"linearize: {type(model).__name__} gives another output on the same input: it is drawn, or kept state"
            )
            raise CheckFailed(msg)
        back, forth = sum(shares), float((w.double() * tangent.double()).sum())
        scale = sum(share * share for share in shares) ** 0.5
        if math.isfinite(scale) and not abs(forth - back) <= agreement(dtype) * max(scale, 1.0):
            msg = (
                f"linearize: {type(model).__name__} has another derivative in forward mode than in reverse: a random "
                f"one is {forth:.6g} in the one, {back:.6g} in the other, as behind torch.no_grad, hooks or custom "
                "functions; its tangent kernel has no linearised model here"
            )
            raise CheckFailed(msg)
        self._compared = True

    def _expanded(self, inputs: Mapping[str, Tensor], delta: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return f at the origin and J δ, both (n, C)."""
        try:
            with explained(self._model[0], "these inputs", kinds=(LookupError, ValueError)):
                return jvp(self._f(inputs), (self.origin,), (delta,))[:2]
        except (NotImplementedError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = " ".join(str(error).partition(". ")[0].split())[:200]
            msg = f"linearize: {type(self._model[0]).__name__} has no forward-mode derivative ({reason})"
            raise InputError(msg) from error

    def _f(self, inputs: Mapping[str, Tensor]) -> Callable[[dict[str, Tensor]], Tensor]:
        model = self._model[0]
        args, kwargs = arguments(model, inputs)
        buffers = {name: b.clone() for name, b in self._statistics.items()}  # some models write to theirs
        return lambda given: self._readout(functional_call(model, {**buffers, **given}, args, kwargs), inputs)


def _check_batch(inputs: object) -> None:
    """Refuse what is no mapping of tensors with examples."""
    values = list(inputs.values()) if isinstance(inputs, Mapping) else []
    if not values or not all(isinstance(v, Tensor) and v.ndim and len(v) for v in values):
        raise InputError(f"inputs: expected a mapping of tensors with a leading sample axis, got {shown(inputs)}")


def linearize(
    model: nn.Module, params: str | Iterable[str] = "trainable", *, readout: str | ReadoutFunction = "logits"
) -> Linearized:
    """Return the exact first-order model around the current parameters, as a module whose parameters are displacements.

    Args:
        model: any module; it is run in eval mode and left as it is.
        params: which parameters it is expanded in, as for `compute_gram`.
        readout: which outputs, likewise.

    Raises:
        InputError: no such parameters, a quantised weight whose bits cannot be read, a layer that has no derivative, or
            an operation that has no forward-mode derivative (when called).
    """
    return Linearized(model, select_parameters(model, params), resolve_readout(readout, "full"))


def _states(model: nn.Module, but: Iterable[str]) -> dict[str, int]:
    """Return a digest of every other parameter's bits: fused optimisers write without a trace but the values."""
    left_out = set(but)
    found: dict[str, Tensor] = {}
    inside: dict[str, int] = {}
    for name, p in model.named_parameters():
        if name in left_out:
            continue
        if (entry := entry_of(p)) is not None:
            inside[name] = id(entry)
            continue
        try:
            found[name] = _bits(p.detach())
        except (NotImplementedError, AssertionError, RuntimeError) as error:
            if type(p.data) is Tensor:
                raise
            msg = f"linearize: expected plain tensors as weights, {name} is one of {type(p.data).__name__}"
            raise InputError(msg) from error
    return {name: int(bits) for name, bits in found.items()} | inside


def _bits(p: Tensor) -> Tensor:
    """Return Σ w·mix(word) mod 2⁶⁴: odd weights tell places apart, and high bits, as signs, are mixed into low ones."""
    flat = p.contiguous().view(-1).view(torch.uint8)
    whole = flat.numel() // 8 * 8
    total = flat[whole:].to(torch.int64).mul_(torch.arange(1, len(flat) - whole + 1, device=p.device)).sum()
    weights = _weights(p.device)
    for i, words in enumerate(flat[:whole].view(torch.int64).split(_PIECE)):
        total += (2 * i + 1) * (words ^ (words >> 32)).mul_(weights[: len(words)]).sum()
    return total


@functools.cache
def _weights(device: torch.device) -> Tensor:
    return torch.arange(1, 2 * _PIECE, 2, device=device).mul_(_ODD)
