"""The published bounds on fine-tuning near its start, as functions of numbers.

Source of all: Rahimi Afzal et al. 2025, "Linearization Explains Fine-Tuning in Large Language Models" (arXiv
2602.08239). Their loss is the *sum* ‖f − y‖² over all entries; every function says where another scale enters.
"""

from __future__ import annotations

import numpy as np

from ntkengine.arguments import number
from ntkengine.errors import InputError


def risk_bounds(ridge: float, residual_norm: float, lambda_min: float, lambda_max: float) -> tuple[float, float]:
    """Return bounds on the training risk of kernel ridge regression, (lower, upper).

    (σ‖y‖/(σ + λ_max))² <= R <= (σ‖y‖/(σ + λ_min))², R = ‖y − f‖² summed over all entries, not divided. With an offset,
    y is the residual y − f0.

    Args:
        ridge: σ > 0, in the unit of K.
        residual_norm: ‖y − f0‖, the Euclidean norm over all entries.
        lambda_min: smallest eigenvalue of K, >= 0.
        lambda_max: largest eigenvalue of K.

    Returns:
        Two sums of squares.

    Raises:
        InputError: ridge not positive, a negative norm, or eigenvalues not ordered.
    """
    ridge, residual_norm = number("ridge", ridge, above=0), number("residual_norm", residual_norm, 0)
    lambda_min, lambda_max = number("lambda_min", lambda_min, 0), number("lambda_max", lambda_max, 0)
    if lambda_min > lambda_max:
        raise InputError(f"lambda_min: expected between 0 and lambda_max = {lambda_max!r}, got {lambda_min!r}")
    return (ridge * residual_norm / (ridge + lambda_max)) ** 2, (ridge * residual_norm / (ridge + lambda_min)) ** 2


def displacement_bound(
    lipschitz: float, residual_norm: float, proximal: float, time: float, scale: float = 2.0
) -> float:
    """Return a bound on how far gradient flow moves the parameters, ‖θ_t − θ_0‖.

    scale · Lip(f) · ‖f0 − y‖ · (1 − e^{−λt})/λ, → scale · Lip(f) · ‖f0 − y‖ · t as λ → 0, where λ is the strength of
    the proximal term (λ/2)‖θ − θ_0‖².

    Args:
        lipschitz: Lip(f); locally √λ_max(K).
        residual_norm: ‖f0 − y‖ over all entries.
        proximal: λ >= 0.
        time: t >= 0: learning rate × steps.
        scale: 2 for the loss ‖f − y‖²; 1/n for the mean over n examples of ½‖f − y‖².

    Returns:
        The bound, a Euclidean norm over the parameters.

    Raises:
        InputError: a negative argument.
    """
    proximal, time, scale = number("proximal", proximal, 0), number("time", time, 0), number("scale", scale, 0)
    lipschitz, residual_norm = number("lipschitz", lipschitz, 0), number("residual_norm", residual_norm, 0)
    reach = -np.expm1(-proximal * time) / proximal if proximal > 0 else time
    return float(scale * lipschitz * residual_norm * reach)


def linearisation_gap_bound(
    lipschitz: float, gradient_lipschitz: float, radius: float, initial_loss: float, time: float
) -> float:
    """Return a bound on the distance between the network and its linearisation, ‖f_{θ_t} − f̄_{θ̄_t}‖.

    2 · Lip(f) · R̃(θ_0) · (2 r Lip(∇f) + Lip(f)) · t.

    Args:
        lipschitz: Lip(f).
        gradient_lipschitz: Lip(∇f).
        radius: r >= 0, of the ball that θ stays in.
        initial_loss: R̃(θ_0) >= 0: read as ‖f0 − y‖, which both sides' unit requires.
        time: t >= 0 of the loss ‖f − y‖²; that of the mean over n examples of ½‖f − y‖² divided by 2n.

    Returns:
        The bound, a Euclidean norm over the outputs.

    Raises:
        InputError: a negative argument.
    """
    given = {"radius": radius, "initial_loss": initial_loss, "time": time, "lipschitz": lipschitz}
    for name, value in {**given, "gradient_lipschitz": gradient_lipschitz}.items():
        number(name, value, 0)
    return float(2.0 * lipschitz * initial_loss * (2.0 * radius * gradient_lipschitz + lipschitz) * time)
