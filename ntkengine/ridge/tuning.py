"""Which ridge: a grid that respects the noise, and the choice on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ntkengine.errors import InputError
from ntkengine.ridge.solve import RidgePath
from ntkengine.spectrum.operators import EPS


@dataclass(frozen=True)
class RidgeCurve:
    """Errors along a path of ridges. All means are over the n·m entries of the residual.

    Attributes:
        ridges: (R,) ascending. Unit of K.
        train_mse: (R,) mean squared training residual.
        loo_mse: (R,) mean squared leave-one-out residual.
        gcv: (R,) generalised cross-validation.
        effective_dimension: (R,) tr K(K + ridge·I)⁻¹.
    """

    ridges: np.ndarray
    train_mse: np.ndarray
    loo_mse: np.ndarray
    gcv: np.ndarray
    effective_dimension: np.ndarray


@dataclass(frozen=True)
class Choice:
    """A ridge chosen on a grid.

    Attributes:
        ridge: the minimiser. Unit of K.
        score: the criterion there.
        index: its place on the grid.
        edge: "" inside the grid; "lower": the least regularisation that the noise allows is best so far, the optimum
            may lie below; "upper": the most is best, the kernel adds little to f0.
    """

    ridge: float
    score: float
    index: int
    edge: str


def ridge_grid(eigenvalues: ArrayLike, noise: float, n: int = 60) -> np.ndarray:
    """Return a log grid of ridges from near-interpolation to near no fit.

    From max(noise, λ_min⁺/10, 2·max(−λ_min, 0), √N·eps·λ_max) to 10·λ_max, with λ_min⁺ the smallest eigenvalue above
    the noise. Never below the noise: there the ridge would be smaller than the error of the matrix it is added to.

    Args:
        eigenvalues: (N,) of K, any order.
        noise: error of K in the spectral norm, same unit, >= 0.
        n: points, >= 2.

    Returns:
        (n,) ascending, in the unit of K.

    Raises:
        InputError: noise so large, or K so small, that no ridge is left.
    """
    values = np.asarray(eigenvalues, dtype=np.float64).reshape(-1)
    if n < 2:
        raise InputError(f"n: expected at least 2 grid points, got {n!r}")
    if not values.size or not np.isfinite(values).all():
        raise InputError(f"eigenvalues: expected finite numbers, got {values.size} values")
    if not np.isfinite(noise) or noise < 0:
        raise InputError(f"noise: expected a finite number >= 0, got {noise!r}")
    top, bottom = float(values.max()), float(values.min())
    rounding = np.sqrt(values.size) * EPS * abs(top)
    floor = max(float(noise), 2.0 * max(-bottom, 0.0), 2.0 * rounding)
    if top <= floor:
        raise InputError(f"eigenvalues: expected one above the noise {floor:.3g}, the largest is {top:.3g}")
    low = max(floor, 0.1 * float(values[values > floor].min()))
    return np.geomspace(low, 10.0 * top, int(n))


def ridge_curve(path: RidgePath, ridges: ArrayLike) -> RidgeCurve:
    """Return all errors of a path on a grid.

    Args:
        path: the decomposed problem.
        ridges: (R,) ridges, unit of K; sorted here.

    Returns:
        The curve.

    Cost: R·2n²(m + block) flops, for leave-one-out.
    """
    grid = np.sort(np.atleast_1d(np.asarray(ridges, dtype=np.float64)))
    return RidgeCurve(grid, path.train_mse(grid), path.loo_mse(grid), path.gcv(grid), path.effective_dimension(grid))


def choose(curve: RidgePath | RidgeCurve, criterion: str = "loo", ridges: ArrayLike | None = None) -> Choice:
    """Return the ridge with the smallest leave-one-out or GCV error.

    Args:
        curve: a curve, or a path together with `ridges`.
        criterion: "loo" or "gcv".
        ridges: (R,) the grid for a path; default `ridge_grid` of its eigenvalues with no noise.

    Returns:
        The choice, with `edge` set when it lies on the border of the grid.

    Raises:
        InputError: unknown criterion.
    """
    if criterion not in ("loo", "gcv"):
        raise InputError(f"criterion: expected 'loo' or 'gcv', got {criterion!r}")
    if isinstance(curve, RidgePath):
        curve = ridge_curve(curve, ridge_grid(curve.eigenvalues, 0.0) if ridges is None else ridges)
    return pick(curve.ridges, curve.loo_mse if criterion == "loo" else curve.gcv)


def pick(ridges: np.ndarray, scores: np.ndarray) -> Choice:
    """Return the minimiser of scores on an ascending grid.

    Args:
        ridges: (R,) ascending.
        scores: (R,) one per ridge.

    Returns:
        The choice; ties go to the larger ridge, the smoother fit.
    """
    last = len(scores) - 1
    index = last - int(np.argmin(scores[::-1]))
    edge = "" if 0 < index < last else ("upper" if index else "lower")
    return Choice(float(ridges[index]), float(scores[index]), index, edge)
