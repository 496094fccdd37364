"""Which ridge: a grid that respects the noise, and the choice on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ntkengine.arguments import choice, number, real_array, whole
from ntkengine.errors import InputError
from ntkengine.ridge.checks import check_block
from ntkengine.ridge.solve import SINGULAR, RidgePath
from ntkengine.spectrum.checks import check_size


@dataclass(frozen=True)
class RidgeCurve:
    """Errors along a path of ridges. All means are over the n·m entries of the residual.

    Attributes:
        ridges: (R,) ascending. Unit of K.
        train_mse: (R,) mean squared training residual.
        loo_mse: (R,) mean squared leave-one-out residual.
        gcv: (R,) generalised cross-validation.
        effective_dimension: (R,) tr K(K + ridge·I)⁻¹.
        cv_mse: (R,) mean squared residual of held-out folds; None when there are none.
    """

    ridges: np.ndarray
    train_mse: np.ndarray
    loo_mse: np.ndarray
    gcv: np.ndarray
    effective_dimension: np.ndarray
    cv_mse: np.ndarray | None = None


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

    From max(noise, λ_min⁺/10, 2·max(−λ_min, 0), 6e4·eps·λ_max) to 10·λ_max, with λ_min⁺ the smallest eigenvalue above
    the noise. Never below the noise: there the ridge would be smaller than the error of the matrix it is added to; nor
    where the eigenvalues' own rounding shows (`RidgePath`).

    Args:
        eigenvalues: (N,) of K, any order.
        noise: error of K in the spectral norm, same unit, >= 0.
        n: points, >= 2.

    Returns:
        (n,) ascending, in the unit of K.

    Raises:
        InputError: noise so large, or K so small, that no ridge is left.
    """
    values = real_array("eigenvalues", eigenvalues).astype(np.float64).reshape(-1)
    n, noise = whole("n", n, 2), number("noise", noise, 0)
    if not values.size or not np.isfinite(values).all():
        raise InputError(f"eigenvalues: expected finite numbers, got {values.size} values")
    check_size("eigenvalues", float(np.abs(values).max()))
    top, bottom = float(values.max()), float(values.min())
    floor = max(noise, 2.0 * max(-bottom, 0.0), 2.0 * SINGULAR * abs(top))
    if top <= floor:
        raise InputError(f"eigenvalues: expected one above the noise {floor:.3g}, the largest is {top:.3g}")
    low = max(floor, 0.1 * float(values[values > floor].min()))
    return np.geomspace(low, 10.0 * top, n)


def ridge_curve(path: RidgePath, ridges: ArrayLike, folds: ArrayLike | None = None) -> RidgeCurve:
    """Return all errors of a path on a grid.

    Args:
        path: the decomposed problem.
        ridges: (R,) ridges, unit of K; sorted here.
        folds: (n,) the fold of each row, for `cv_mse`.

    Returns:
        The curve.

    Raises:
        InputError: ridges that are no list of numbers, or too small.

    Cost: R·2n²(m + block) flops, for leave-one-out; R·2n³/folds for cross-validation.
    """
    if not isinstance(path, RidgePath):
        raise InputError(f"path: expected a RidgePath, got {type(path).__name__}")
    grid = np.sort(np.atleast_1d(real_array("ridges", ridges).astype(np.float64)))
    if grid.ndim != 1 or not grid.size:
        raise InputError(f"ridges: expected numbers (R,), got shape {grid.shape}")
    held = None if folds is None else path.held_out_mse(grid, folds)
    return RidgeCurve(
        grid, path.train_mse(grid), path.loo_mse(grid), path.gcv(grid), path.effective_dimension(grid), held
    )


def choose(curve: RidgePath | RidgeCurve, criterion: str = "loo", ridges: ArrayLike | None = None) -> Choice:
    """Return the ridge with the smallest leave-one-out, GCV or cross-validation error.

    Args:
        curve: a curve, or a path together with `ridges`.
        criterion: "loo", "gcv" or, for a curve made with folds, "cv".
        ridges: (R,) the grid for a path; default `ridge_grid` of its eigenvalues with no noise.

    Returns:
        The choice, with `edge` set when it lies on the border of the grid.

    Raises:
        InputError: unknown criterion, or "cv" without folds.
    """
    choice("criterion", criterion, ("loo", "gcv", "cv"))
    if isinstance(curve, RidgePath):
        curve = ridge_curve(curve, ridge_grid(curve.eigenvalues, 0.0) if ridges is None else ridges)
    if not isinstance(curve, RidgeCurve):
        raise InputError(f"curve: expected a RidgeCurve or RidgePath, got {type(curve).__name__}")
    scores = {"loo": curve.loo_mse, "gcv": curve.gcv, "cv": curve.cv_mse}[criterion]
    if scores is None:
        raise InputError("criterion: 'cv' needs a curve made with folds")
    return pick(curve.ridges, scores)


def draw_folds(folds: int, rows: int, block: int = 1, seed: int = 0) -> np.ndarray:
    """Return a random fold for each row, the rows of an example in one fold.

    Args:
        folds: how many, from 2 to the number of examples.
        rows: n.
        block: rows an example owns.
        seed: of the shuffle; examples are often sorted by label.

    Returns:
        (n,) integers in [0, folds), as even as can be.

    Raises:
        InputError: a number of folds that does not fit.
    """
    rows = whole("rows", rows, 1)
    block = check_block(block, rows, 1)
    examples = rows // block
    folds, seed = whole("cv", folds, 2, examples), whole("seed", seed)
    return np.repeat(np.random.default_rng(seed).permutation(np.arange(examples) % folds), block)


def pick(ridges: np.ndarray, scores: np.ndarray) -> Choice:
    """Return the minimiser of scores on an ascending grid.

    Args:
        ridges: (R,) ascending.
        scores: (R,) one per ridge.

    Returns:
        The choice; ties go to the larger ridge, the smoother fit.

    Raises:
        InputError: scores that are no finite numbers, among which there is no least.
    """
    if not np.isfinite(scores).all():
        raise InputError(f"scores: expected finite numbers, got {int((~np.isfinite(scores)).sum())} that are not")
    last = len(scores) - 1
    index = last - int(np.argmin(scores[::-1]))
    edge = "" if 0 < index < last else ("upper" if index else "lower")
    return Choice(float(ridges[index]), float(scores[index]), index, edge)
