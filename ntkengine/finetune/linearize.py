"""The model's first-order expansion in its parameters, exact, as a module of its own."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntkengine.errors import InputError
from ntkengine.inputs.differentiable import check_differentiable
from ntkengine.inputs.parameters import select_parameters
from ntkengine.inputs.readout import Readout, ReadoutFunction, resolve_readout
from ntkengine.inputs.running import arguments, evaluation

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
        self._model = [model]  # in a list: its parameters are none of this module's
        self._readout = readout
        self._statistics = {name: b.detach().clone() for name, b in model.named_buffers()}
        check_differentiable(model)
        self._frozen = _states(model, self.names)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return f̄, (N, C), of a batch.

        Args:
            inputs: tensors with a leading sample axis, as for `compute_gram`.

        Raises:
            InputError: no tensors by name, or a parameter that was not selected has changed since.

        Cost: about two forward passes and one reading of the weights; backwards about two more passes.
        """
        if not isinstance(inputs, Mapping) or not inputs:
            raise InputError(f"inputs: expected a mapping of tensors, got {type(inputs).__name__}")
        model, origin = self._model[0], self.origin
        now = _states(model, self.names)
        for name in sorted(self._frozen.keys() | now.keys()):
            if now.get(name) != self._frozen.get(name):
                raise InputError(f"linearize: {name} of the model has changed since, and is no parameter of this one")
        args, kwargs = arguments(model, inputs)
        buffers = {name: b.clone() for name, b in self._statistics.items()}  # some models write to theirs
        delta = {name: d.to(origin[name]) for name, d in zip(self.names, self.displacement, strict=True)}

        def f(parameters: dict[str, Tensor]) -> Tensor:
            return self._readout(functional_call(model, {**buffers, **parameters}, args, kwargs), inputs)

        grad = torch.is_grad_enabled()
        with evaluation(model), torch.set_grad_enabled(grad), sdpa_kernel(SDPBackend.MATH):
            try:
                value, tangent = jvp(f, (origin,), (delta,))[:2]
            except (NotImplementedError, RuntimeError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                reason = " ".join(str(error).partition(". ")[0].split())[:200]
                msg = f"linearize: {type(model).__name__} has no forward-mode derivative ({reason})"
                raise InputError(msg) from error
        return value + tangent


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
    found = {}
    for name, p in model.named_parameters():
        if name not in left_out:
            try:
                found[name] = _bits(p.detach())
            except (NotImplementedError, AssertionError, RuntimeError) as error:
                if type(p.data) is Tensor:
                    raise
                msg = f"linearize: expected plain tensors as weights, {name} is one of {type(p.data).__name__}"
                raise InputError(msg) from error
    return {name: int(bits) for name, bits in found.items()}


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
