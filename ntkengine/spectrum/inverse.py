"""The smallest eigenpairs of a matrix in memory: Lanczos on (K − σI)⁻¹ from one Cholesky factorisation.

Shapes: N rows, k wanted pairs.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

from ntkengine.errors import NotConverged
from ntkengine.spectrum.certify import Ritz, pair_bounds
from ntkengine.spectrum.krylov import Krylov
from ntkengine.spectrum.implicit import ImplicitOperator
from ntkengine.spectrum.operators import EPS

_TRIES = 6


def smallest(matrix: np.ndarray, k: int, tol: float, limit: int, seed: int, noise: float, block: int = 1) -> Ritz:
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
        block: right-hand sides solved at once.

    Returns:
        The pairs, values ascending, method "shift-invert".

    Raises:
        NotConverged: solves used up, or residuals above the tolerance (`.partial` has the pairs with their residuals).

    Cost: N³/3 flops for each σ tried (one or two, for a Gram) and 2N² a solve; N² extra numbers.
    Source: Ericsson and Ruhe 1980.
    """
    rows = len(matrix)
    scale = float(scipy.linalg.norm(matrix, np.inf)) or 1.0
    rounding = np.sqrt(rows) * EPS * scale
    shift, spent = max(10.0 * rounding, min(noise, scale)), 0
    for last in (False, True):
        factor = _factor(matrix, shift, scale)

        def solve(X: np.ndarray, factor: np.ndarray = factor) -> np.ndarray:
            return scipy.linalg.cho_solve((factor, True), X, check_finite=False)

        found = Krylov(ImplicitOperator(solve, rows), k, "LA", min(tol, 1e-10), limit, seed, 0.0, block).run()
        basis = np.linalg.qr(solve(found.vectors))[0]
        images = matrix @ basis
        values, S = scipy.linalg.eigh(basis.T @ images)
        vectors, images = basis @ S, images @ S
        residuals = np.linalg.norm(images - vectors * values, axis=0)
        spent += found.products + k
        if (residuals <= np.maximum(tol * np.abs(values), max(10.0 * rounding, 0.1 * noise))).all():
            break
        # One eigenvalue at σ hides the others from the inverse, as an outlier does: from further away they stand apart.
        further = 1e-2 * float(values[-1]) - float(values[0])
        if last or not further > 10.0 * shift:
            worst = float(residuals.max())
            ritz = _ritz(values, vectors, residuals, rounding + noise, spent)
            raise NotConverged(f"shift-invert: the largest residual is {worst:.3g}", partial=ritz, residual=worst)
        shift = further
    return _ritz(values, vectors, residuals, rounding + noise, spent)


def _ritz(values: np.ndarray, vectors: np.ndarray, residuals: np.ndarray, error: float, products: int) -> Ritz:
    return Ritz(values, vectors, residuals, pair_bounds(values, residuals) + error, products, "shift-invert")


def _factor(matrix: np.ndarray, shift: float, scale: float) -> np.ndarray:
    """Return the Cholesky factor of K + shift·I, the shift raised until there is one."""
    for _ in range(_TRIES):
        shifted = matrix.copy(order="F")
        shifted[np.diag_indices_from(shifted)] += shift
        try:
            return scipy.linalg.cholesky(shifted, lower=True, overwrite_a=True, check_finite=False)
        except np.linalg.LinAlgError:
            shift = min(max(100.0 * shift, 1e-8 * scale), 1.01 * scale)
    raise NotConverged(f"shift-invert: K + {shift:.3g}·I has no Cholesky factor")
