"""How fast the Jacobian turns as parameters move: Lip(∇f) at θ_0, by power iteration on second derivatives.

Shapes: N examples, C outputs, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntkengine.descent import norm
from ntkengine.errors import InputError, NonFinite
from ntkengine.inputs.batches import Chunk, Samples
from ntkengine.inputs.parameters import select_parameters
from ntkengine.inputs.readout import ReadoutFunction, resolve_readout
from ntkengine.inputs.running import call_model, evaluation, wanting_gradients
from ntkengine.inputs.sources import Source
from ntkengine.tangents.trial import settled


@dataclass(frozen=True)
class Curvature:
    """An estimate of the Lipschitz constant of the Jacobian around θ_0.

    Attributes:
        value: max over unit w, u, v found of |Σ_nc w_nc ∂²f_c(x_n)/∂θ² [u, v]|: never above the truth at θ_0.
        path: values by iteration, of the start that found the largest; none is below the one before.
        starts: the largest value of each start.
        converged: the last iterations of that start changed it by less than the tolerance.
    """

    value: float
    path: list[float]
    starts: list[float]
    converged: bool


def gradient_lipschitz(
    model: nn.Module,
    inputs: Source,
    *,
    params: str | Iterable[str] = "trainable",
    readout: str | ReadoutFunction = "logits",
    iterations: int = 50,
    starts: int = 2,
    tol: float = 1e-3,
    seed: int = 0,
) -> Curvature:
    """Return an estimate of Lip(∇f), f the vector of all N·C outputs, at the current parameters.

    lim sup ‖J(θ) − J(θ_0)‖₂ / ‖θ − θ_0‖ as θ → θ_0 is the largest |T[w, u, v]| over unit w in R^{NC} and u, v in R^P,
    T_{nc,p,q} = ∂²f_c(x_n)/∂θ_p∂θ_q; because T is symmetric in p, q, u = v reaches it: the largest ‖∂²f/∂θ²[u, u]‖.
    Alternating power iteration raises |T[w, u, v]| in u (a Hessian-vector product of ⟨w, f⟩) and in w (a directional
    second derivative) in turn. Every value on the way is reached, so the result is a *lower* bound of the local
    constant; with N·C = 1 it converges to the Hessian's spectral norm, else possibly to a local maximum, which is what
    several starts are for. Away from θ_0 the constant may be larger.

    Args:
        model: float32 or float64; run in eval mode and left as it is.
        inputs: examples, as for `compute_gram`.
        params: as for `compute_gram`.
        readout: likewise.
        iterations: at most, of each start.
        starts: random starts.
        tol: relative change of the value, over two iterations, at which a start ends.
        seed: of the starts.

    Raises:
        InputError: arguments that cannot be used, or an operation that cannot be differentiated three times.
        CheckFailed: the model draws random numbers or keeps a state, or f of an example depends on its batch.
        NonFinite: a second derivative is not finite.

    Cost: an iteration is two forward passes and five backward passes of all examples, attention in plain products.
    """
    if iterations < 1 or starts < 1:
        raise InputError(f"iterations, starts: expected at least 1, got {iterations!r} and {starts!r}")
    named = select_parameters(model, params)
    selected = list(named.values())
    chosen = resolve_readout(readout, "full")
    device, dtype = selected[0].device, selected[0].dtype
    if dtype not in (torch.float32, torch.float64):
        raise InputError(f"gradient_lipschitz: expected float32 or float64 parameters, got {dtype}")
    generator = torch.Generator().manual_seed(seed)
    paths: list[list[float]] = []
    with evaluation(model):
        samples = settled(model, inputs, chosen, named)
    sweep = _Sweep(model, selected, chosen, samples, device, dtype)
    with evaluation(model), sdpa_kernel(SDPBackend.MATH), wanting_gradients(selected):
        for _ in range(starts):
            w = _unit([torch.randn(s, generator=generator).to(device, dtype) for s in sweep.shapes()])[0]
            v = _unit([torch.randn(p.shape, generator=generator).to(p) for p in selected])[0]
            paths.append(_climb(sweep, w, v, iterations, tol))
    best = max(paths, key=lambda path: path[-1])
    return Curvature(best[-1], best, [path[-1] for path in paths], _settled(best, tol))


def _climb(sweep: _Sweep, w: list[Tensor], v: list[Tensor], iterations: int, tol: float) -> list[float]:
    path: list[float] = []
    for _ in range(iterations):
        u, value = _unit(sweep.hessian_product(w, v))
        if value:
            w, value = _unit(sweep.second_derivative(u, v))
        if not math.isfinite(value):
            raise NonFinite("gradient_lipschitz: a second derivative is not finite")
        path.append(value)
        v = u
        if not value or _settled(path, tol):
            break
    return path


def _settled(path: list[float], tol: float) -> bool:
    return path[-1] == 0 or len(path) > 2 and path[-1] - path[-3] <= tol * path[-1]


class _Sweep:
    """Second derivatives of all examples' outputs, summed over microbatches."""

    def __init__(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        readout: ReadoutFunction,
        samples: Samples,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._model, self._parameters, self._readout, self._samples = model, parameters, readout, samples
        self._device, self._dtype = device, dtype

    def shapes(self) -> list[torch.Size]:
        """Return the shape (n, C) of f of every microbatch."""
        with torch.no_grad():
            return [self._f(chunk).shape for chunk in self._samples.chunks]

    def hessian_product(self, w: list[Tensor], v: list[Tensor]) -> list[Tensor]:
        """Return T[w, ·, v], one tensor a parameter."""
        total = [torch.zeros_like(p) for p in self._parameters]
        for chunk, part in zip(self._samples.chunks, w, strict=True):
            slope = _directional(self._f(chunk), part, self._parameters, v)
            if slope is None:
                continue
            found = torch.autograd.grad(slope, self._parameters, allow_unused=True)
            for held, g in zip(total, found, strict=True):
                if g is not None:
                    held += g
        return total

    def second_derivative(self, u: list[Tensor], v: list[Tensor]) -> list[Tensor]:
        """Return T[·, u, v], (n, C) of every microbatch: the derivative with respect to w of the linear T[w, u, v]."""
        out = []
        for chunk in self._samples.chunks:
            f = self._f(chunk)
            w = torch.zeros_like(f, requires_grad=True)
            slope = _directional(f, w, self._parameters, v)
            twice = None if slope is None else _directional(slope, torch.ones_like(slope), self._parameters, u)
            out.append(torch.zeros_like(f) if twice is None else torch.autograd.grad(twice, w)[0].detach())
        return out

    def _f(self, chunk: Chunk) -> Tensor:
        batch = self._samples.inputs(chunk, self._device, self._dtype)
        return self._readout(call_model(self._model, batch), batch)


def _directional(y: Tensor, w: Tensor, parameters: list[nn.Parameter], v: list[Tensor]) -> Tensor | None:
    """Return the derivative of ⟨w, y⟩ along v, with a graph; None when it does not depend on the parameters."""
    if not y.requires_grad:
        return None
    try:
        grads = torch.autograd.grad(y, parameters, w, create_graph=True, allow_unused=True)
    except RuntimeError as error:
        raise InputError(f"gradient_lipschitz: the model cannot be differentiated so often: {error}") from error
    terms = [(g * x).sum() for g, x in zip(grads, v, strict=True) if g is not None and g.requires_grad]
    return torch.stack(terms).sum() if terms else None


def _unit(tensors: list[Tensor]) -> tuple[list[Tensor], float]:
    """Return the tensors divided by their common norm, and that norm; zeros as they are."""
    size = norm(tensors)
    return ([t / size for t in tensors] if size else tensors), size
