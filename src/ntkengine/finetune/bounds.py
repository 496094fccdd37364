"""The published bounds on how far training moves, and how far it leaves its linearisation, for one job."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn

from ntkengine.errors import InputError
from ntkengine.finetune.curvature import gradient_lipschitz
from ntkengine.forecast.bounds import displacement_bound, linearisation_gap_bound
from ntkengine.gram.jacobian import TangentProducts
from ntkengine.inputs.readout import ReadoutFunction
from ntkengine.inputs.sources import Source
from ntkengine.spectrum import eigsh
from ntkengine.spectrum.implicit import ImplicitOperator

ASSUMPTIONS = (
    "The bounds are of gradient flow on all examples at once, ½‖f − y‖² in the mean, with the proximal term.",
    "Lip(f) and Lip(∇f) are those at the start, the latter from below: the figures are estimates of the bounds.",
)


@dataclass(frozen=True)
class LinearityBounds:
    """The published bounds with a job's own constants; norms are over all outputs of all examples.

    Attributes:
        lipschitz: √λ_max of the N·C × N·C tangent kernel.
        gradient_lipschitz: `Curvature.value`.
        residual_norm: ‖f_θ0 − y‖.
        time: as given.
        proximal: as given.
        displacement: bound on ‖θ_t − θ_0‖.
        gap: bound on ‖f_θt − f̄_θ̄t‖, the network against its trained linearisation.
        linear_radius: 2 Lip(f)/Lip(∇f), the ‖θ − θ_0‖ at which a movement along the worst directions bends f by as much
            as it moves it: ½ Lip(∇f) r² = Lip(f) r. Forecasts say nothing beyond it, and may fail well before.
        assumptions: what they rest on.
    """

    lipschitz: float
    gradient_lipschitz: float
    residual_norm: float
    time: float
    proximal: float
    displacement: float
    gap: float
    linear_radius: float
    assumptions: tuple[str, ...] = ASSUMPTIONS

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-able values."""
        return asdict(self)


def linearity_bounds(
    model: nn.Module,
    inputs: Source,
    targets: Any,
    *,
    time: float,
    proximal: float = 0.0,
    params: str | Iterable[str] = "trainable",
    readout: str | ReadoutFunction = "logits",
    iterations: int = 50,
    seed: int = 0,
) -> LinearityBounds:
    """Return the published bounds for training this model on these examples.

    ‖θ_t − θ_0‖ <= Lip(f)·‖f0 − y‖·(1 − e^{−λt})/(λn) =: r, and
    ‖f_θt − f̄_θ̄t‖ <= Lip(f)·‖f0 − y‖·(2r·Lip(∇f) + Lip(f))·t/n. The published gap has R̃(θ_0) where ‖f0 − y‖ stands here:
    only with the norm, not its square, are both sides in the unit of f, and does the bound follow. The published loss
    is the sum of squares; t here, of the mean of ½ squares, is 2n times the published one.

    Args:
        model: as for `compute_gram`; left as it is.
        inputs: likewise.
        targets: (N, C).
        time: t, learning rates summed over the steps of gradient descent.
        proximal: λ.
        params: as for `compute_gram`.
        readout: likewise.
        iterations: of the power iteration for Lip(∇f).
        seed: of its starts.

    Raises:
        InputError: arguments that cannot be used.
        NonFinite, NotConverged: as `gradient_lipschitz` and `eigsh`.

    Cost: some dozen sweeps for λ_max; those of `gradient_lipschitz`.
    Source: Rahimi Afzal et al. 2025 (arXiv 2602.08239).
    """
    products = TangentProducts(model, inputs, params=params, readout=readout, precision="high", seed=seed)
    y = np.asarray(targets, dtype=np.float64)
    if y.shape != products.outputs.shape or not np.isfinite(y).all():
        raise InputError(f"targets: expected {products.outputs.shape} finite numbers, got shape {y.shape}")
    top = float(eigsh(ImplicitOperator.of(products), k=1, tol=1e-3).values[0])
    lipschitz, residual, n = max(top, 0.0) ** 0.5, float(np.linalg.norm(products.outputs - y)), len(y)
    turn = gradient_lipschitz(model, inputs, params=params, readout=readout, iterations=iterations, seed=seed).value
    radius = displacement_bound(lipschitz, residual, proximal, time, scale=1.0 / n)
    gap = linearisation_gap_bound(lipschitz, turn, radius, residual, time / (2.0 * n))
    reach = 2.0 * lipschitz / turn if turn > 0 else float("inf")
    return LinearityBounds(lipschitz, turn, residual, time, proximal, radius, gap, reach)
