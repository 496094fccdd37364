"""The density of a spectrum on a log axis, with error bars where it is sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg import eigh_tridiagonal

from ntkengine.arguments import number, whole
from ntkengine.errors import InputError
from ntkengine.spectrum.condition import condition_from_eigenvalues
from ntkengine.spectrum.functions import is_small
from ntkengine.spectrum.matrices import EPS, eigenvalues_of, noise_of
from ntkengine.spectrum.operators import DenseOperator, rounding_of
from ntkengine.spectrum.panels import operator_of
from ntkengine.spectrum.quadrature import Function, quadrature, sampling, spread


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
            over probes plus what the Lanczos steps leave open.
        unresolved_error: how far off `unresolved` may be, likewise. Eigenvalues that so few steps do not tell apart may
            lie left of the grid, which begins at the lowest Ritz value above the noise: they are counted here.
    """

    grid: np.ndarray
    density: np.ndarray
    width: float
    rows: int
    unresolved: float
    noise: float
    error: np.ndarray
    unresolved_error: float


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
    points, (probes, steps, seed) = whole("points", points, 2), sampling(probes, steps, seed)
    if width is not None:
        width = number("width", width, above=0, what="a number of decades")
    exact = is_small(gram, method)
    if exact:
        dense = gram if isinstance(gram, DenseOperator) else DenseOperator(gram)
        values = eigenvalues_of(dense.matrix)
        rows, error = len(values), condition_from_eigenvalues(values, dense.noise).noise
    else:
        operator = operator_of(gram)
        found = quadrature(operator, probes, steps, seed)
        rows, error = (
            found.rows,
            max(noise_of(operator), 10.0 * np.sqrt(found.rows) * max(EPS, rounding_of(operator)) * found.scale),
        )
        values = np.sort(np.concatenate([eigh_tridiagonal(a, b[:-1], eigvals_only=True) for a, b in found.pairs()]))
    resolved = values[values > error]
    if not len(resolved):
        raise InputError(f"gram: expected an eigenvalue above its noise {error:.3g}, the largest is {values[-1]:.3g}")
    low, high = np.log10(resolved[[0, -1]])
    sigma = max((high - low) / 40.0, 0.05 if exact else 0.25) if width is None else float(width)
    axis = np.linspace(low - 4.0 * sigma, high + 4.0 * sigma, points)

    def bumps(x: np.ndarray) -> np.ndarray:
        logs = np.log10(np.where(x > error, x, error or 1.0))
        height = np.exp(-0.5 * ((axis[None, :] - logs[:, None]) / sigma) ** 2) / (sigma * np.sqrt(2.0 * np.pi))
        return np.where(x[:, None] > error, height, 0.0)

    if exact:
        density = sum(bumps(part).sum(axis=0) for part in np.array_split(values, max(1, rows // 256))) / rows
        unresolved, open_, bars = float(rows - len(resolved)), 0.0, np.zeros(len(axis))
    else:
        density, share = found.means(bumps).mean(axis=0), found.means(_at_most(error)).mean(axis=0)
        bars = _reach(density, found.hats(bumps, 10.0**axis), found.deviation(bumps)) + 10.0 * EPS / sigma
        open_ = rows * float(_reach(share, found.below(error), found.deviation(_at_most(error))))
        unresolved = rows * float(share)
        open_ = min(open_, max(unresolved, rows - unresolved))  # between none and all
    return SpectralDensity(10.0**axis, np.asarray(density), sigma, rows, unresolved, error, bars, open_)


def _at_most(limit: float) -> Function:
    return lambda x: (x <= limit).astype(np.float64)


def _reach(value: np.ndarray, limits: tuple[np.ndarray, np.ndarray], deviation: np.ndarray) -> np.ndarray:
    """Return how far from a value the confidence intervals of each probe's lowest and highest value reach."""
    low, high = limits
    above = high.mean(axis=0) + spread(high, deviation) - value
    return np.maximum(above, value - low.mean(axis=0) + spread(low, deviation))
