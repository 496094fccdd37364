"""A Gram as a matrix in memory: read as symmetric float64, with how far it may be off.

Shapes: N rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse
from scipy.sparse.linalg import LinearOperator

from ntkengine.arguments import matrix_of, meta_of, number, real_array
from ntkengine.errors import InputError
from ntkengine.spectrum.checks import SIZES, check_size

EPS = float(np.finfo(np.float64).eps)
_BFLOAT16 = 2.0**-7
_TILE = 512  # symmetry is compared tile by tile: no second N×N array, and transposed reads stay in cache


def as_matrix(gram: Any) -> np.ndarray:
    """Return the Gram as a symmetric float64 matrix.

    An asymmetry within the rounding of the stored type (100 eps · max|K|), or within twice the Gram's own noise, is
    averaged away, and shows in `noise_of`; a larger one is refused, because every solver here would silently read one
    triangle.

    Args:
        gram: (N, N) array-like, or an object whose `.values` is one.

    Returns:
        (N, N) float64. Not a copy when the input is already float64 and exactly symmetric: treat it as read-only.

    Raises:
        InputError: not square, not real, not finite, not symmetric, or its largest entry outside 1e-70..1e70.

    Cost: one pass over N² entries.
    """
    return symmetric(gram)[0]


def symmetric(gram: Any) -> tuple[np.ndarray, float]:
    """Return the matrix of `as_matrix`, and ‖K − Kᵀ‖_F/2 of what is stored."""
    raw = _stored(gram)
    if raw.ndim != 2 or raw.shape[0] != raw.shape[1] or not raw.size:
        raise InputError(f"gram: expected a square matrix (N, N), got shape {raw.shape}")
    if raw.dtype.kind == "b":
        raise InputError(f"gram: expected real numbers, got dtype {raw.dtype}")
    matrix = np.asarray(raw, dtype=np.float64)
    skew = squares = 0.0
    for tile, times in _differences(matrix):
        high, low = float(tile.max()), float(tile.min())
        if not np.isfinite(high - low):  # what is not finite shows in the difference, even infinity - infinity
            raise InputError(f"gram: expected finite entries, row {_first_bad(matrix)} has NaN or infinity")
        if high > 0.0 or low < 0.0:
            skew, squares = max(skew, high, -low), squares + times * _squares(tile)
    largest = max(float(matrix.max()), -float(matrix.min()))
    check_size("gram", largest)
    if skew == 0.0:
        return matrix, 0.0
    if skew > max(100.0 * _eps(gram) * largest, 2.0 * (declared_noise(gram) or 0.0)):
        raise InputError(
            f"gram: expected a symmetric matrix, got max|K - K^T| = {skew:.3g} with max|K| = {largest:.3g}"
        )
    return 0.5 * (matrix + matrix.T), 0.5 * float(np.sqrt(squares))


def _differences(K: np.ndarray) -> Iterator[tuple[np.ndarray, float]]:
    """Yield the tiles of K − Kᵀ at and below the diagonal, and how often each stands for one of all."""
    for start in range(0, len(K), _TILE):
        rows = np.asarray(K[start : start + _TILE], dtype=np.float64)
        for j in range(0, start + 1, _TILE):
            with np.errstate(invalid="ignore"):
                yield rows[:, j : j + _TILE] - K[j : j + _TILE, start : start + _TILE].T, 1.0 if j == start else 2.0


def _squares(tile: np.ndarray) -> float:
    """Return Σ x², of entries whose squares may be no numbers: what matters of them is seen in max|K|."""
    with np.errstate(over="ignore"):
        return float(np.einsum("ij,ij->", tile, tile))


def noise_of(gram: Any) -> float:
    """Return the Gram's error in the spectral norm, an estimate of ‖K̃ − K‖₂.

    By Weyl every eigenvalue of the true K lies within it. A Gram that carries `.noise` speaks for itself; a bare array
    is taken to be right to the rounding of its stored entries, (eps/2)·‖K‖_F with the eps of its dtype; an operator
    without `.noise` is taken to be exact. Where the triangles of an array in memory differ, it is no less than they
    show: ‖K − Kᵀ‖_F/2, the error of their mean when each is off by as much on its own.

    Args:
        gram: array-like, Gram-like object or LinearOperator.

    Returns:
        >= 0. Unit of K (gradient²).

    Raises:
        InputError: the noise it carries is negative or not finite, or it is not square.
    """
    told = told_noise(gram)
    if isinstance(gram, LinearOperator):
        return told
    values = matrix_of(gram)
    if declared_noise(gram) is not None and (not isinstance(values, np.ndarray) or isinstance(values, np.memmap)):
        return told  # not read for this
    matrix = _stored(gram)
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        return told
    stack = matrix.reshape(-1, *matrix.shape[-2:])
    squares = sum(times * _squares(tile) for K in stack for tile, times in _differences(K) if tile.any())
    shown = 0.5 * float(np.sqrt(squares))
    return max(told, shown) if np.isfinite(shown) else told


def told_noise(gram: Any) -> float:
    """Return the noise a Gram carries, or that of its stored entries' rounding."""
    declared = declared_noise(gram)
    if declared is not None:
        return declared
    if isinstance(gram, LinearOperator):
        return 0.0
    raw = _stored(gram)
    matrix = np.asarray(raw, dtype=np.float64)
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:  # one for each output is square too
        raise InputError(f"gram: expected a square matrix (N, N), got shape {matrix.shape}")
    with np.errstate(over="ignore", invalid="ignore"):
        norm = float(np.linalg.norm(matrix))
    if matrix.size and not SIZES[0] <= norm <= SIZES[1]:
        check_size("gram", float(np.abs(matrix).max()))  # squares that are no numbers
    return 0.5 * _eps(gram) * norm


def eigenvalues_of(gram: Any) -> np.ndarray:
    """Return all eigenvalues of a Gram in memory, (N,) ascending; (4/3)N³ flops."""
    return scipy.linalg.eigh(as_matrix(gram), eigvals_only=True)


def _stored(gram: Any) -> np.ndarray:
    """Return the array behind a Gram, in the type it is stored in."""
    if isinstance(gram, LinearOperator):
        raise InputError("gram: expected a matrix, got a LinearOperator; give its dense matrix")
    values = matrix_of(gram)
    if scipy.sparse.issparse(values):
        raise InputError(f"gram: expected a dense square matrix, got {type(values).__name__}")
    return real_array("gram", values)


def _first_bad(matrix: np.ndarray) -> int:
    return int(np.flatnonzero(~np.isfinite(matrix).all(axis=1))[0])


def _eps(gram: Any) -> float:
    """Return the eps of the type a Gram is stored in; NumPy has no bfloat16, a tensor tells."""
    values = getattr(gram, "values", gram)
    if "bfloat16" in str(getattr(gram if callable(values) else values, "dtype", "")):
        return _BFLOAT16
    dtype = _stored(gram).dtype
    return float(np.finfo(dtype).eps) if dtype.kind == "f" else EPS


def declared_noise(gram: Any) -> float | None:
    """Return the `.noise` a Gram carries, None without one; InputError when it is negative or not finite."""
    noise = getattr(gram, "noise", None)
    if noise is None:
        return None
    if isinstance(noise, float) and math.isnan(noise) and hasattr(gram, "values"):
        checked = meta_of(gram).get("checked", False)
        why = "its model does not run in float64" if checked else "it was computed with check=False"
        cure = "" if checked else "compute it with the check, or "
        raise InputError(
            f"gram: its noise is not known, as {why}; {cure}give its `values` alone, which are then taken to be right "
            "to their last digit"
        )
    return number("noise", noise, 0)
