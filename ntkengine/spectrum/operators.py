"""A Gram matrix as the solvers see it: a checked float64 matrix, its noise, and products counted.

Shapes: N rows, k columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse.linalg import LinearOperator

from ntkengine.errors import InputError

EPS = float(np.finfo(np.float64).eps)
_ROWS = 1024  # rows compared at a time when symmetry is checked, so that no second N×N array is made


def as_matrix(gram: Any) -> np.ndarray:
    """Return the Gram as a symmetric float64 matrix.

    An asymmetry within the rounding of the stored type (100 eps · max|K|), or within twice the Gram's own noise, is
    averaged away; a larger one is refused, because every solver here would silently read one triangle.

    Args:
        gram: (N, N) array-like, or an object whose `.values` is one.

    Returns:
        (N, N) float64. Not a copy when the input is already float64 and exactly symmetric: treat it as read-only.

    Raises:
        InputError: not square, not real, not finite, or not symmetric.

    Cost: one pass over N² entries.
    """
    raw = _stored(gram)
    if raw.ndim != 2 or raw.shape[0] != raw.shape[1] or not raw.size:
        raise InputError(f"gram: expected a square matrix (N, N), got shape {raw.shape}")
    if raw.dtype.kind not in "fiu":
        raise InputError(f"gram: expected real numbers, got dtype {raw.dtype}")
    matrix = np.asarray(raw, dtype=np.float64)
    largest, skew = 0.0, 0.0
    for start in range(0, len(matrix), _ROWS):
        rows = matrix[start : start + _ROWS]
        if not np.isfinite(rows).all():
            bad = start + int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
            raise InputError(f"gram: expected finite entries, row {bad} has NaN or infinity")
        largest = max(largest, float(np.abs(rows).max()))
        skew = max(skew, float(np.abs(rows - matrix[:, start : start + _ROWS].T).max()))
    if skew > max(100.0 * _eps(raw) * largest, 2.0 * (_declared_noise(gram) or 0.0)):
        raise InputError(
            f"gram: expected a symmetric matrix, got max|K - K^T| = {skew:.3g} with max|K| = {largest:.3g}"
        )
    return matrix if skew == 0.0 else 0.5 * (matrix + matrix.T)


def noise_of(gram: Any) -> float:
    """Return the Gram's error in the spectral norm, an estimate of ‖K̃ − K‖₂.

    By Weyl every eigenvalue of the true K lies within it. A Gram that carries `.noise` speaks for itself; a bare array
    is taken to be right to the rounding of its stored entries, (eps/2)·‖K‖_F with the eps of its dtype; an operator
    without `.noise` is taken to be exact.

    Args:
        gram: array-like, Gram-like object or LinearOperator.

    Returns:
        >= 0. Unit of K (gradient²).

    Raises:
        InputError: the noise it carries is negative or not finite.
    """
    declared = _declared_noise(gram)
    if declared is not None:
        return declared
    if isinstance(gram, LinearOperator):
        return 0.0
    raw = _stored(gram)
    return 0.5 * _eps(raw) * float(np.linalg.norm(np.asarray(raw, dtype=np.float64)))


class DenseOperator(LinearOperator):
    """A symmetric matrix as a SciPy LinearOperator that counts its products.

    Attributes:
        matrix: (N, N) float64.
        noise: error of the matrix in the spectral norm, as `noise_of` gives it.
        products: matrix-vector products so far; a product with k columns counts k.
    """

    def __init__(self, gram: Any) -> None:
        self.matrix = as_matrix(gram)
        self.noise = noise_of(gram)
        self.products = 0
        super().__init__(dtype=np.dtype(np.float64), shape=self.matrix.shape)  # type: ignore[call-arg]

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        self.products += 1
        return self.matrix @ x

    def _matmat(self, X: np.ndarray) -> np.ndarray:
        self.products += X.shape[1]
        return self.matrix @ X

    def _adjoint(self) -> DenseOperator:
        return self


def _stored(gram: Any) -> np.ndarray:
    """Return the array behind a Gram, in the type it is stored in."""
    if isinstance(gram, LinearOperator):
        raise InputError("gram: expected a matrix, got a LinearOperator; give its dense matrix")
    values = gram if isinstance(gram, np.ndarray) else getattr(gram, "values", gram)
    return np.asarray(values)


def _eps(raw: np.ndarray) -> float:
    return float(np.finfo(raw.dtype).eps) if raw.dtype.kind == "f" else EPS


def _declared_noise(gram: Any) -> float | None:
    noise = getattr(gram, "noise", None)
    if noise is None:
        return None
    if not np.isscalar(noise) or not np.isfinite(noise) or noise < 0:  # type: ignore[operator]
        raise InputError(f"noise: expected a finite number >= 0, got {noise!r}")
    return float(noise)  # type: ignore[arg-type]
