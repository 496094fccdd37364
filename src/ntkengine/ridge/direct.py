"""Kernel ridge regression on arrays for one ridge: one Cholesky factorisation.

Shapes: n rows of K, m residual columns, b rows an example owns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike

from ntkengine.arguments import number
from ntkengine.errors import InputError, NonFinite
from ntkengine.ridge.checks import as_columns, check_block
from ntkengine.ridge.solve import solve_blocks
from ntkengine.spectrum import as_matrix
from ntkengine.spectrum.matrices import EPS

_RESIDUAL = 1e-4  # of the right side: above it the pivots hid how singular the matrix is
_UNREFINED = 2e-4  # the same before refinement, which the inverse that leaves examples out does not get


@dataclass(frozen=True)
class CholeskySolution:
    """One ridge solved directly.

    Attributes:
        dual: (n, m) float64, Q r.
        loo_residuals: (n, m) float64, as `RidgePath.loo_residuals`.
        backward_error: ‖r − (K + ridge·I) dual‖_F / ‖r‖_F after the refinement step (0 when r = 0).
    """

    dual: np.ndarray
    loo_residuals: np.ndarray
    backward_error: float


def cholesky_solve(gram: object, residual: ArrayLike, ridge: float, block: int = 1) -> CholeskySolution:
    """Solve (K + ridge·I) dual = residual by Cholesky with one step of iterative refinement.

    The inverse of the same factor leaves each example out; its diagonal is right to some 1e-3, or it is refused.

    Args:
        gram: (n, n) symmetric, array-like or Gram-like.
        residual: (n,) or (n, m) float64.
        ridge: >= 0, in the unit of K.
        block: rows an example owns, as in `RidgePath`.

    Returns:
        Dual coefficients, leave-one-out residuals and the backward error.

    Raises:
        InputError: K + ridge·I is not positive definite or singular but for rounding, or shapes do not fit.
        NonFinite: the solution overflowed.

    Cost: n³ flops (factor and inverse), 2 n² numbers.
    Source: Higham 2002, chapter 12 (refinement).
    """
    matrix = as_matrix(gram)
    right = as_columns("residual", residual, len(matrix))
    block, ridge = check_block(block, *right.shape), number("ridge", ridge, 0)
    shifted = matrix.copy()
    shifted[np.diag_indices_from(shifted)] += ridge
    try:
        factor = scipy.linalg.cho_factor(shifted, lower=True)
    except np.linalg.LinAlgError:
        raise InputError(
            f"ridge: expected a value that makes K + ridge*I positive definite, got {ridge!r}: Cholesky broke down"
        ) from None
    check_pivots(factor[0].diagonal() ** 2, float(np.trace(shifted)), float(np.linalg.norm(shifted)), ridge)
    probes = draw_probes(len(matrix))
    check_unrefined(probes, _times(matrix, scipy.linalg.cho_solve(factor, probes), ridge), ridge)
    dual = scipy.linalg.cho_solve(factor, right)
    dual += scipy.linalg.cho_solve(factor, right - _times(matrix, dual, ridge))
    if not np.isfinite(dual).all():
        raise NonFinite(f"ridge {ridge!r}: the dual coefficients are not finite")
    norm = float(np.linalg.norm(right))
    error = float(np.linalg.norm(right - _times(matrix, dual, ridge))) / norm if norm else 0.0
    check_residual(error, ridge)
    inverse = scipy.linalg.cho_solve(factor, np.eye(len(matrix)))
    if block == 1:
        loo = dual / np.diag(inverse)[:, None]
    else:
        count = len(matrix) // block
        blocks = inverse.reshape(count, block, count, block)[np.arange(count), :, np.arange(count)]
        loo = solve_blocks(blocks, dual)
    return CholeskySolution(dual, loo, error)


def _times(matrix: np.ndarray, X: np.ndarray, ridge: float) -> np.ndarray:
    """Return (K + ridge·I) X; the ridge is not rounded to the digits of K's diagonal."""
    return matrix @ X + ridge * X


def check_residual(error: float, ridge: float) -> None:
    """Refuse a solution that refinement did not make one: K + ridge·I is singular but for rounding.

    Args:
        error: the backward error.
        ridge: for the message.
    """
    if not error <= _RESIDUAL:
        raise InputError(
            f"ridge: expected a value that makes K + ridge*I well enough conditioned, got {ridge!r}: Cholesky leaves a "
            f"residual of {error:.1e} of the right side's norm"
        )


def draw_probes(n: int) -> np.ndarray:
    """Return (n, 4) random right sides for `check_unrefined`: one may miss the direction that matters."""
    return np.random.default_rng(1).standard_normal((n, 4))


def check_unrefined(probes: np.ndarray, images: np.ndarray, ridge: float) -> None:
    """Refuse a factor whose inverse is off by what leave-one-out residuals show.

    Args:
        probes: (n, k) random.
        images: (n, k) K + ridge·I times their solutions: off by about as much as the diagonal of the inverse.
        ridge: for the message.
    """
    error = float((np.linalg.norm(probes - images, axis=0) / np.linalg.norm(probes, axis=0)).max())
    if not error <= _UNREFINED:
        raise InputError(
            f"ridge: expected a value that makes K + ridge*I well enough conditioned, got {ridge!r}: Cholesky leaves a "
            f"residual of {error:.1e} of a random right side's norm, too much to leave examples out"
        )


def check_pivots(pivots: np.ndarray, trace: float, norm: float, ridge: float) -> None:
    """Refuse a factorisation that only rounding let pass, where `RidgePath` would refuse the eigenvalues.

    Args:
        pivots: (n,) of Cholesky, none below λ_min.
        trace: of the matrix.
        norm: ‖·‖_F; ‖·‖_F²/trace is not above λ_max.
        ridge: for the message.
    """
    smallest, floor = float(pivots.min()), np.sqrt(len(pivots)) * EPS * norm * (norm / trace)
    if smallest <= floor:
        raise InputError(
            f"ridge: expected a value that makes K + ridge*I positive definite, got {ridge!r}: the pivot "
            f"{smallest:.3g} of Cholesky is not above its rounding {floor:.3g}"
        )
