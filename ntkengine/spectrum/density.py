"""What the spectrum says: condition number with its error, density, effective rank and dimension."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
from scipy.sparse.linalg import LinearOperator

from ntkengine.errors import InputError
from ntkengine.spectrum.lanczos import eigsh
from ntkengine.spectrum.operators import EPS, as_matrix, noise_of


@dataclass(frozen=True)
class ConditionNumber:
    """λ_max / λ_min of a Gram, or what can be said of it.

    Attributes:
        lambda_max: largest computed eigenvalue. Unit of K.
        lambda_min: smallest computed eigenvalue.
        noise: how far each of the two may be off: the Gram's noise + the solver's residual; at least −λ_min, since a
            true Gram has no negative eigenvalue and a negative one therefore shows an error of that size (Weyl).
        lower: smallest condition number compatible with the noise, >= 1.
        upper: largest one; infinite when unresolved.
        resolved: whether λ_min − noise > 0.
    """

    lambda_max: float
    lambda_min: float
    noise: float
    lower: float
    upper: float
    resolved: bool

    def __str__(self) -> str:
        if self.resolved:
            return f"{self.lambda_max / self.lambda_min:.3g} ({self.lower:.3g} to {self.upper:.3g})"
        return (
            f"> {self.lower:.3g} (unresolved: the smallest eigenvalue {self.lambda_min:.2g} is not above "
            f"its error {self.noise:.2g})"
        )


@dataclass(frozen=True)
class SpectralDensity:
    """Density of the resolved eigenvalues on a log axis.

    Attributes:
        grid: (points,) float64, eigenvalues λ, equally spaced in log₁₀. Unit of K.
        density: (points,) (1/N) Σ_i N(log₁₀ λ; log₁₀ λ_i, width²), the sum over the eigenvalues above the noise. Its
            integral over log₁₀ λ is the fraction of eigenvalues above the noise, `1 - unresolved / rows`.
        width: standard deviation of the broadening, in decades.
        rows: N.
        unresolved: number of eigenvalues at or below the noise, left out.
        noise: the error of each eigenvalue. Unit of K.
    """

    grid: np.ndarray
    density: np.ndarray
    width: float
    rows: int
    unresolved: int
    noise: float


def condition_number(gram: Any) -> ConditionNumber:
    """Return λ_max/λ_min with its error, or a lower bound where the noise hides λ_min.

    Args:
        gram: (N, N) array-like, Gram-like object, or symmetric LinearOperator (then by Lanczos).

    Returns:
        The condition number; `str()` of it prints only what is known.

    Raises:
        InputError: not a symmetric finite matrix.
        NotConverged: operators only, when Lanczos stops short.

    Cost: (4/3)N³ flops for a matrix.
    Source: Weyl's inequality.
    """
    if isinstance(gram, LinearOperator):
        ritz = eigsh(gram, k=min(2, gram.shape[0]), which="BE")
        return condition_from_eigenvalues(ritz.values, noise=float(ritz.bounds.max()), rounding=0.0)
    return condition_from_eigenvalues(_eigenvalues(gram), noise_of(gram))


def condition_from_eigenvalues(eigenvalues: np.ndarray, noise: float, rounding: float | None = None) -> ConditionNumber:
    """Return the condition number from eigenvalues already at hand.

    Args:
        eigenvalues: (N,) float64 in any order. Unit of K.
        noise: error of the matrix in the spectral norm, same unit.
        rounding: error of the solver, same unit; default √N · eps · |λ|_max, LAPACK's in practice.

    Returns:
        As `condition_number`.
    """
    top, bottom = float(np.max(eigenvalues)), float(np.min(eigenvalues))
    if rounding is None:
        rounding = float(np.sqrt(len(eigenvalues)) * EPS * np.abs(eigenvalues).max())
    error = max(float(noise) + rounding, -bottom)
    resolved = bottom > error
    floor = max(bottom, 0.0) + error
    lower = max((top - error) / floor, 1.0) if floor > 0 else 1.0
    upper = (top + error) / (bottom - error) if resolved else float("inf")
    return ConditionNumber(top, bottom, error, lower, upper, resolved)


def spectral_density(gram: Any, points: int = 200, width: float | None = None) -> SpectralDensity:
    """Return the density of the exact eigenvalues on a log axis, Gaussian-broadened.

    Args:
        gram: (N, N) array-like or Gram-like object.
        points: grid points, >= 2.
        width: broadening in decades, > 0; default 1/40 of the range, at least 0.05.

    Returns:
        The density; see `SpectralDensity` for its normalisation.

    Raises:
        InputError: bad argument, or no eigenvalue above the noise.

    Cost: (4/3)N³ flops, plus N·points.
    """
    if points < 2:
        raise InputError(f"points: expected at least 2, got {points!r}")
    if width is not None and not width > 0:
        raise InputError(f"width: expected a number of decades > 0, got {width!r}")
    values = _eigenvalues(gram)
    error = condition_from_eigenvalues(values, noise_of(gram)).noise
    resolved = values[values > error]
    if not len(resolved):
        raise InputError(f"gram: expected an eigenvalue above its noise {error:.3g}, the largest is {values[-1]:.3g}")
    logs = np.log10(resolved)
    spread = float(logs[-1] - logs[0])
    sigma = max(spread / 40.0, 0.05) if width is None else float(width)
    axis = np.linspace(logs[0] - 4.0 * sigma, logs[-1] + 4.0 * sigma, int(points))
    density = np.array([np.exp(-0.5 * ((x - logs) / sigma) ** 2).sum() for x in axis])
    density /= sigma * np.sqrt(2.0 * np.pi) * len(values)
    return SpectralDensity(10.0**axis, density, sigma, len(values), len(values) - len(resolved), error)


def effective_dimension(gram: Any, ridge: float) -> float:
    """Return tr K(K + ridge·I)⁻¹, the degrees of freedom a ridge leaves.

    Eigenvalues that the noise made negative count as 0.

    Args:
        gram: (N, N) array-like or Gram-like object.
        ridge: > 0, in the unit of K.

    Returns:
        Between 0 and N: a sum over eigenvalues, not divided.

    Raises:
        InputError: ridge not positive and finite.

    Cost: (4/3)N³ flops.
    """
    if not (np.isfinite(ridge) and ridge > 0):
        raise InputError(f"ridge: expected a finite number > 0, got {ridge!r}")
    values = np.maximum(_eigenvalues(gram), 0.0)
    return float((values / (values + ridge)).sum())


def effective_rank(gram: Any) -> float:
    """Return (tr K)² / ‖K‖_F², between 1 and N: how many equal eigenvalues would give the same two sums.

    Args:
        gram: (N, N) array-like or Gram-like object.

    Returns:
        The participation ratio of the spectrum.

    Raises:
        InputError: the matrix is zero.

    Cost: one pass over N² entries.
    """
    matrix = as_matrix(gram)
    norm = float(np.linalg.norm(matrix))
    if norm == 0.0:
        raise InputError("gram: expected a non-zero matrix, got all zeros")
    return float((np.trace(matrix) / norm) ** 2)


def _eigenvalues(gram: Any) -> np.ndarray:
    return scipy.linalg.eigh(as_matrix(gram), eigvals_only=True)
