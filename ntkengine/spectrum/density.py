"""The density of a spectrum on a log axis, with error bars where it is sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg import eigh_tridiagonal

from ntkengine.errors import InputError
from ntkengine.spectrum.condition import condition_from_eigenvalues
from ntkengine.spectrum.functions import is_small
from ntkengine.spectrum.operators import EPS, DenseOperator, eigenvalues_of, noise_of
from ntkengine.spectrum.panels import operator_of
from ntkengine.spectrum.quadrature import quadrature, spread


@dataclass(frozen=True)
class SpectralDensity:
    """Density of the resolved eigenvalues on a log axis.

    Attributes:
        grid: (points,) float64, eigenvalues λ, equally spaced in log₁₀. Unit of K.
        density: (points,) (1/N) Σ_i N(log₁₀ λ; log₁₀ λ_i, width²), the sum over the eigenvalues above the noise. Its
            integral over log₁₀ λ is the fraction of eigenvalues above the noise, `1 - unresolved / rows`.
        width: standard deviation of the broadening, in decades.
        rows: N.
        unresolved: number of eigenvalues at or below the noise, left out; from probes, an estimate.
        noise: the error of each eigenvalue. Unit of K.
        error: (points,) how far off `density` may be: 0 when exact, else the half-width of its 99 % confidence interval
            over probes plus its change from half of the Lanczos steps to all.
    """

    grid: np.ndarray
    density: np.ndarray
    width: float
    rows: int
    unresolved: float
    noise: float
    error: np.ndarray


def spectral_density(
    gram: Any,
    points: int = 200,
    width: float | None = None,
    *,
    method: str = "auto",
    probes: int = 16,
    steps: int = 80,
    seed: int = 0,
) -> SpectralDensity:
    """Return the density of the eigenvalues on a log axis, Gaussian-broadened.

    Args:
        gram: (N, N) array-like, Gram-like object or symmetric LinearOperator.
        points: grid points, >= 2.
        width: broadening in decades, > 0; default 1/40 of the range, at least 0.05 (0.25 from probes, whose Lanczos
            steps resolve less).
        method: "exact", "lanczos" (probes), or "auto": exact for a matrix of up to 4,000 rows.
        probes: random vectors.
        steps: of Lanczos for each. The resolution is relative to the whole range: an outlier costs small eigenvalues
            theirs, and `error` says so.
        seed: of the probes.

    Returns:
        The density; see `SpectralDensity` for its normalisation.

    Raises:
        InputError: bad argument, or no eigenvalue above the noise.

    Cost: (4/3)N³ flops, or probes·steps products; plus N·points.
    """
    if points < 2:
        raise InputError(f"points: expected at least 2, got {points!r}")
    if width is not None and not width > 0:
        raise InputError(f"width: expected a number of decades > 0, got {width!r}")
    exact = is_small(gram, method)
    if exact:
        values = eigenvalues_of(gram.matrix if isinstance(gram, DenseOperator) else gram)
        rows, error = len(values), condition_from_eigenvalues(values, noise_of(gram)).noise
    else:
        operator = operator_of(gram)
        found = quadrature(operator, probes, steps, seed)
        rows, error = found.rows, max(noise_of(gram), 10.0 * np.sqrt(found.rows) * EPS * found.scale)
        values = np.sort(np.concatenate([eigh_tridiagonal(a, b[:-1], eigvals_only=True) for a, b in found.pairs()]))
    resolved = values[values > error]
    if not len(resolved):
        raise InputError(f"gram: expected an eigenvalue above its noise {error:.3g}, the largest is {values[-1]:.3g}")
    low, high = np.log10(resolved[[0, -1]])
    sigma = max((high - low) / 40.0, 0.05 if exact else 0.25) if width is None else float(width)
    axis = np.linspace(low - 4.0 * sigma, high + 4.0 * sigma, int(points))

    def bumps(x: np.ndarray) -> np.ndarray:
        logs = np.log10(np.where(x > error, x, 1.0))
        height = np.exp(-0.5 * ((axis[None, :] - logs[:, None]) / sigma) ** 2) / (sigma * np.sqrt(2.0 * np.pi))
        return np.where(x[:, None] > error, height, 0.0)

    if exact:
        density = sum(bumps(part).sum(axis=0) for part in np.array_split(values, max(1, rows // 256))) / rows
        unresolved, bars = float(rows - len(resolved)), np.zeros(len(axis))
    else:
        means = found.means(bumps)
        density = means.mean(axis=0)
        coarse = found.means(bumps, max(1, steps // 2)).mean(axis=0)
        bars = spread(means, found.deviation(bumps)) + np.abs(density - coarse)
        unresolved = rows * float(found.means(lambda x: (x <= error).astype(np.float64)).mean())
    return SpectralDensity(10.0**axis, np.asarray(density), sigma, rows, unresolved, error, bars)
