"""The smallest eigenpairs of a matrix in memory: Lanczos on (K − σI)⁻¹ from one Cholesky factorisation.

Shapes: N rows, k wanted pairs.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

from ntkengine.errors import NotConverged
from ntkengine.spectrum.certify import Ritz, pair_bounds
from ntkengine.spectrum.implicit import ImplicitOperator
from ntkengine.spectrum.krylov import Krylov
from ntkengine.spectrum.matrices import EPS

_TRIES = 8
_BLOCK = 8  # solves at once: a factor of 3,000 rows takes 7 ms for one and 8 ms for eight (measured)
_TRIAL = 120  # solves before a better σ is tried


def smallest(matrix: np.ndarray, k: int, tol: float, limit: int, seed: int, noise: float) -> Ritz:
    """Return the k smallest eigenpairs.

    σ lies just below λ_min, where the inverse spreads the smallest eigenvalues of a Gram far apart; that K − σI has a
    Cholesky factor shows that nothing lies below. The pairs are refined by one step of inverse iteration and judged by
    their residuals with K itself.

    Args:
        matrix: (N, N) float64, symmetric.
        k: pairs.
        tol: relative to the eigenvalue, as in `eigsh`.
        limit: solves to spend.
        seed: of the random vectors.
        noise: of the matrix.

    Returns:
        The pairs, values ascending, method "shift-invert".

    Raises:
        NotConverged: solves used up, or residuals above the tolerance (`.partial` has the pairs with their residuals).

    Cost: N³/3 flops for each σ tried (one or two, for a Gram) and 2N² a solve; N² extra numbers.
    Source: Ericsson and Ruhe 1980.
    """
    rows = len(matrix)
    scale = float(scipy.linalg.norm(matrix, np.inf)) or 1.0
    rounding = 10.0 * np.sqrt(rows) * EPS * scale
    factor, shift = _factor(matrix, max(rounding, min(noise, scale)), scale)
    spent, budget, inner = 0, _TRIAL, min(tol, 1e-10)
    while True:

        def solve(X: np.ndarray, factor: np.ndarray = factor) -> np.ndarray:
            return scipy.linalg.cho_solve((factor, True), X, check_finite=False)

        inverse = ImplicitOperator(solve, rows)
        try:
            found = Krylov(inverse, k, "LA", inner, min(budget, limit - spent), seed, 0.0, _BLOCK).run()
        except NotConverged as stopped:
            found = stopped.partial
        basis = np.linalg.qr(solve(found.vectors))[0]
        images = matrix @ basis
        values, S = scipy.linalg.eigh(basis.T @ images)
        vectors, images = basis @ S, images @ S
        residuals = np.linalg.norm(images - vectors * values, axis=0)
        spent += found.products + k
        bounds = pair_bounds(values, residuals) + rounding + noise
        ritz = Ritz(values, vectors, residuals, bounds, spent, "shift-invert")
        if (residuals <= np.maximum(tol * np.abs(values), max(rounding, 0.1 * noise))).all():
            return ritz
        if spent >= limit or inner < EPS:
            worst = float(residuals.max())
            raise NotConverged(f"shift-invert: the largest residual is {worst:.3g}", partial=ritz, residual=worst)
        # From where the wanted eigenvalues begin they stand further apart; on top of one of them, it alone is seen.
        distance = max(0.3 * float(values[-1] - values[0]), rounding)
        if not 0.5 < (values[0] + shift) / distance < 2.0:
            factor, shift = _factor(matrix, distance - float(values[0]), scale, distance)
        elif budget == _TRIAL:
            budget = limit
        else:
            inner *= 1e-2


def _factor(matrix: np.ndarray, shift: float, scale: float, step: float = 0.0) -> tuple[np.ndarray, float]:
    """Return the Cholesky factor of K + shift·I and the shift, which is raised until there is one."""
    step = step or 1e-8 * scale
    for _ in range(_TRIES):
        shifted = matrix.copy(order="F")
        shifted[np.diag_indices_from(shifted)] += shift
        try:
            return scipy.linalg.cholesky(shifted, lower=True, overwrite_a=True, check_finite=False), shift
        except np.linalg.LinAlgError:
            shift, step = shift + step, 30.0 * step
    raise NotConverged(f"shift-invert: K + {shift:.3g}·I has no Cholesky factor")
