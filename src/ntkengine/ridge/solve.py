"""Kernel ridge regression on arrays: one eigendecomposition for a whole path of ridges.

Shapes: n rows of K, m residual columns, b rows an example owns, R ridges. Every mean is over all n·m entries.
"""

from __future__ import annotations

import copy

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike

from ntkengine.arguments import number, real_array
from ntkengine.errors import InputError
from ntkengine.ridge.checks import as_columns, check_block, fold_labels
from ntkengine.spectrum import as_matrix
from ntkengine.spectrum.matrices import EPS

# Of λ_max: eigenvalues from LAPACK are off by one to three eps·λ_max at any n (measured). Where K + ridge·I is below
# this, a fit is off by more than 1e-4.
SINGULAR = 3e4 * EPS
_TINY = float(np.finfo(np.float64).tiny)


class RidgePath:
    """K = U Λ Uᵀ once, then every ridge in closed form.

    With r = y − f0 and Q = (K + ridge·I)⁻¹ the fit leaves the residual ridge·Q r on its own rows. No eigenvalue is
    clipped: the numbers are those of the K given, and a ridge for which K + ridge·I is not positive definite, or so
    nearly singular that the rounding of the eigenvalues shows, is refused: λ_min + ridge <= 3e4·eps·λ_max. Above that
    dual coefficients and leave-one-out residuals are right to some 1e-4 of their norm, and better by as much as the
    ridge is above.

    Args:
        gram: (n, n) symmetric, array-like or Gram-like.
        residual: (n,) or (n, m) float64, targets minus offset.
        block: rows an example owns. 1: row i is example i. b > 1 (then m = 1): rows i·b .. i·b + b − 1 are example i,
            and leave-one-out leaves out all of them.

    Attributes:
        eigenvalues: (n,) ascending. Unit of K.
        vectors: (n, n) columns of U.
        residual: (n, m) float64.
        coefficients: (n, m) Uᵀ r.
        block: rows an example owns.

    Raises:
        InputError: shapes that do not fit, entries not finite.

    Cost: 9 n³ flops, 3 n² numbers.
    """

    def __init__(self, gram: object, residual: ArrayLike, block: int = 1) -> None:
        matrix = as_matrix(gram)
        self.residual = as_columns("residual", residual, len(matrix))
        self.block = check_block(block, *self.residual.shape)
        self.eigenvalues, self.vectors = scipy.linalg.eigh(matrix)
        self.coefficients = self.vectors.T @ self.residual

    def with_residual(self, residual: ArrayLike) -> RidgePath:
        """Return the path of the same K for another residual, sharing the decomposition; cost 2n²m flops."""
        other = copy.copy(self)
        other.residual = as_columns("residual", residual, len(self.eigenvalues))
        check_block(self.block, *other.residual.shape)
        other.coefficients = self.vectors.T @ other.residual
        return other

    def dual(self, ridge: float) -> np.ndarray:
        """Return Q r, (n, m): the dual coefficients. Unit of r / unit of K.

        Raises:
            InputError: ridge too small, or so large that they are below what float64 holds.
        """
        dual = self.vectors @ (self.coefficients / self._shifted(ridge)[:, None])
        if (self.residual.any(axis=0) & (np.abs(dual).max(axis=0) < _TINY)).any():
            raise InputError(f"ridge: expected a value whose dual coefficients float64 can hold, got {ridge!r}")
        return dual

    def train_residual(self, ridge: float) -> np.ndarray:
        """Return y − f on the training rows, ridge·Q r, (n, m)."""
        return self.vectors @ (self.coefficients * (ridge / self._shifted(ridge))[:, None])

    def loo_residuals(self, ridge: float) -> np.ndarray:
        """Return the leave-one-out residuals, (n, m): y_i − f₋ᵢ(x_i) with example i out of the fit, without refits.

        e_i = [Q r]_i / Q_ii; with b rows an example, Q_ii is its b × b block and is solved with.

        Args:
            ridge: K + ridge·I must be positive definite.

        Returns:
            (n, m) float64.

        Raises:
            InputError: ridge too small.

        Cost: 2n²(m + b) flops.
        Source: Allen 1974 (PRESS); the block form is the Schur complement of the same system.
        """
        q, _ = self._scaled(ridge)
        return self._left_out(q, self.vectors @ (self.coefficients * q[:, None]))

    def left_out(self, ridge: float, dual: np.ndarray) -> np.ndarray:
        """Return the leave-one-out residuals that belong to dual coefficients, (n, m), as `loo_residuals` does."""
        q, unit = self._scaled(ridge)
        return self._left_out(q, dual * unit)

    def _left_out(self, q: np.ndarray, dual: np.ndarray) -> np.ndarray:
        if self.block == 1:
            return dual / (self.vectors**2 @ q)[:, None]
        rows = self.vectors.reshape(-1, self.block, len(q))
        return solve_blocks((rows * q) @ rows.transpose(0, 2, 1), dual)

    def held_out_residuals(self, ridge: float, folds: ArrayLike) -> np.ndarray:
        """Return y − f on each fold, (n, m), f fitted without that whole fold, without refits.

        e_F = Q_FF⁻¹ [Q r]_F, the block form of leave-one-out.

        Args:
            ridge: K + ridge·I must be positive definite.
            folds: (n,) the fold of each row.

        Returns:
            (n, m) float64.

        Raises:
            InputError: ridge too small, or folds of another length.

        Cost: 2n³/folds flops.
        """
        labels = fold_labels("folds", folds, len(self.eigenvalues))
        q, _ = self._scaled(ridge)
        dual = self.vectors @ (self.coefficients * q[:, None])
        left = np.empty_like(dual)
        for label in np.unique(labels):
            out = np.flatnonzero(labels == label)
            rows = self.vectors[out]
            left[out] = scipy.linalg.solve((rows * q) @ rows.T, dual[out], assume_a="pos")
        return left

    def train_mse(self, ridges: ArrayLike) -> np.ndarray:
        """Return the mean of (y − f)² over the n·m training entries for each ridge, (R,)."""
        return np.array([((r / self._shifted(r)) ** 2 @ self._power()) for r in _ridges(ridges)]) / self.residual.size

    def loo_mse(self, ridges: ArrayLike) -> np.ndarray:
        """Return the mean of the squared leave-one-out residuals over the n·m entries for each ridge, (R,)."""
        return np.array([np.mean(self.loo_residuals(r) ** 2) for r in _ridges(ridges)])

    def held_out_mse(self, ridges: ArrayLike, folds: ArrayLike) -> np.ndarray:
        """Return the mean of the squared held-out residuals over the n·m entries for each ridge, (R,)."""
        return np.array([np.mean(self.held_out_residuals(r, folds) ** 2) for r in _ridges(ridges)])

    def gcv(self, ridges: ArrayLike) -> np.ndarray:
        """Return generalised cross-validation for each ridge, (R,).

        (1/(n·m)) ‖Q r‖_F² / (tr Q/n)²: an estimate of the mean squared test error.
        Source: Golub, Heath and Wahba 1979; for empirical NTKs Wei, Hu and Steinhardt 2022.
        """
        scaled = [self._scaled(r)[0] for r in _ridges(ridges)]
        return np.array([q**2 @ self._power() / np.mean(q) ** 2 for q in scaled]) / self.residual.size

    def effective_dimension(self, ridges: ArrayLike) -> np.ndarray:
        """Return tr K Q for each ridge, (R,): between 0 and n. A negative eigenvalue, which is error, counts as 0."""
        kept = np.maximum(self.eigenvalues, 0.0)
        return np.array([np.sum(kept / self._shifted(r)) for r in _ridges(ridges)])

    def _power(self) -> np.ndarray:
        return (self.coefficients**2).sum(axis=1)

    def _shifted(self, ridge: float) -> np.ndarray:
        ridge = number("ridge", ridge, 0)
        low, high = float(self.eigenvalues[0]), float(self.eigenvalues[-1])
        if low + ridge <= SINGULAR * abs(high):
            raise InputError(
                f"ridge: expected a value that makes K + ridge*I positive definite and no more singular than rounding "
                f"allows (smallest eigenvalue {low:.3g}, largest {high:.3g}), got {ridge!r}"
            )
        return self.eigenvalues + ridge

    def _scaled(self, ridge: float) -> tuple[np.ndarray, float]:
        """Return the eigenvalues of Q times λ_min + ridge, so that the largest is 1, and that factor."""
        shifted = self._shifted(ridge)
        return shifted[0] / shifted, float(shifted[0])


def solve_blocks(blocks: np.ndarray, dual: np.ndarray) -> np.ndarray:
    """Solve with each example's (b, b) block of Q; `dual` (n, 1)."""
    return np.linalg.solve(blocks, dual.reshape(len(blocks), -1, 1)).reshape(dual.shape)


def restored(matrix: np.ndarray, w: np.ndarray, r: np.ndarray, dual: np.ndarray, ridge: float) -> np.ndarray:
    """Return a weighted problem's dual coefficients, those of little weight not lost in the rounding of the others.

    At the solution ridge·dual = w·(r − K w·dual): where that rounds less, they are taken from there.

    Args:
        matrix: (n, n) K.
        w: (n, 1) square roots of the weights, > 0.
        r: (n, m).
        dual: (n, m) coefficients of (w K w + ridge·I) dual = w·r.
        ridge: >= 0.
    """
    if (w == 1.0).all() or not ridge:
        return dual
    fitted, rounding = matrix @ (w * dual), w * (np.abs(matrix) @ np.abs(w * dual))
    lost = rounding < ridge * np.abs(dual).max(axis=0)
    return np.where(lost, w * (r - fitted) / ridge, dual)


def _ridges(ridges: ArrayLike) -> np.ndarray:
    return np.atleast_1d(real_array("ridges", ridges).astype(np.float64, copy=False))
