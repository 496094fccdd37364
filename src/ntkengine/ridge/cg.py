"""Conjugate gradients for (K + ridge·I) x = r: many right-hand sides in step, a tolerance reached or reported.

Shapes: n rows of K, m right-hand sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse.linalg import LinearOperator

from ntkengine.arguments import number, whole
from ntkengine.errors import InputError, NotConverged
from ntkengine.ridge.checks import as_columns
from ntkengine.spectrum.operators import multiply
from ntkengine.spectrum.panels import operator_of


@dataclass(frozen=True)
class Iterated:
    """What conjugate gradients found.

    Attributes:
        solution: (n,) or (n, m) as the right-hand side.
        residual: (m,) ‖r − (K + ridge·I) x‖₂ / ‖r‖₂ of each column, from an explicit product at the end.
        iterations: passes over K, each multiplying all columns that are still open.
        products: vectors multiplied, the check at the end included.
    """

    solution: np.ndarray
    residual: np.ndarray
    iterations: int
    products: int


def conjugate_gradients(
    gram: Any,
    right: ArrayLike,
    ridge: float,
    *,
    preconditioner: LinearOperator | None = None,
    tol: float = 1e-8,
    max_iterations: int | None = None,
) -> Iterated:
    """Solve (K + ridge·I) x = right to a stated relative residual.

    Args:
        gram: (n, n) array-like, Gram-like, or symmetric positive semi-definite LinearOperator.
        right: (n,) or (n, m).
        ridge: >= 0, in the unit of K.
        preconditioner: approximates (K + ridge·I)⁻¹, symmetric positive definite (`nystrom.preconditioner`).
        tol: wanted ‖r − (K + ridge·I) x‖ / ‖r‖ of each column, between 0 and 1.
        max_iterations: default 10 n.

    Returns:
        The solution with the residual it has.

    Raises:
        InputError: bad argument, K + ridge·I is not positive definite, or a solution that float64 cannot hold.
        NotConverged: stopped short, by `max_iterations` or because rounding lets the residual fall no further;
            `.partial` is the `Iterated` so far, `.residual` its largest residual.

    Cost: a product of m columns an iteration.
    Source: Hestenes and Stiefel 1952; Frangella, Tropp and Udell 2021 (the preconditioner).
    """
    operator = operator_of(gram)
    n = operator.shape[0]
    B = as_columns("right", right, n, any_size=True)
    ridge, tol = number("ridge", ridge, 0), number("tol", tol, above=0, below=1)
    limit = 10 * n if max_iterations is None else whole("max_iterations", max_iterations, 1)
    unit = np.abs(B).max(axis=0)
    B = B / np.where(unit > 0, unit, 1.0)  # squares of what is very small or large leave float64
    norms = np.linalg.norm(B, axis=0)
    size = np.where(norms > 0, norms, 1.0)
    X, R = np.zeros_like(B), B.copy()
    open_ = norms > 0
    iterations = products = 0
    best = np.inf
    while True:  # rounds: the recurrence, then the residual it really has
        spent, used = _recur(operator, R, X, ridge, preconditioner, tol * norms, open_, limit - iterations)
        iterations, products = iterations + spent, products + used
        R = B - _times(operator, X, ridge)
        products += B.shape[1]
        residual = np.linalg.norm(R, axis=0) / size
        shape = np.shape(right)
        found = Iterated(_rescaled(X, unit).reshape(shape), residual, iterations, products)
        open_ = residual > tol
        if not open_.any():
            return found
        worst = float(residual.max())
        if iterations >= limit or worst > 0.5 * best:
            why = "the iterations are used up" if iterations >= limit else "rounding lets it fall no further"
            message = (
                f"conjugate gradients: residual {worst:.3g} after {iterations} iterations, {tol:.3g} wanted; {why}"
            )
            raise NotConverged(message, partial=found, residual=worst)
        best = worst


def _rescaled(X: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Return X in the unit of the right-hand side; InputError where float64 holds it no more."""
    with np.errstate(over="ignore", under="ignore"):
        solution = X * unit
    largest = np.abs(solution).max(axis=0)
    lost = (X.any(axis=0) & (largest < np.finfo(np.float64).tiny)) | ~np.isfinite(largest)
    if lost.any():
        what = "large" if np.isinf(largest[lost][0]) else "small"
        raise InputError(f"right: expected numbers whose solution float64 can hold, that is too {what}; scale them")
    return solution


def _recur(
    operator: LinearOperator,
    R: np.ndarray,
    X: np.ndarray,
    ridge: float,
    preconditioner: LinearOperator | None,
    targets: np.ndarray,
    open_: np.ndarray,
    limit: int,
) -> tuple[int, int]:
    """Add to X the columns' conjugate-gradient solutions of the residuals R; return (iterations, products)."""
    at = np.flatnonzero(open_)
    if not len(at):
        return 0, 0
    r = R[:, at]
    z = r if preconditioner is None else preconditioner.matmat(r)
    p, rho, products = z.copy(), np.einsum("ij,ij->j", r, z), 0
    for iteration in range(limit):
        going = (np.linalg.norm(r, axis=0) > 0.5 * targets[at]) & (rho > 0)
        if not going.all():
            at, r, p, rho = at[going], r[:, going], p[:, going], rho[going]
            if not len(at):
                return iteration, products
        q = _times(operator, p, ridge)
        products += len(at)
        curvature = np.einsum("ij,ij->j", p, q)
        if not np.isfinite(curvature).all():
            raise InputError("gram: expected finite products, got NaN or infinity")
        if (curvature <= 0).any():
            raise InputError(f"ridge: expected a value that makes K + ridge*I positive definite, got {ridge!r}")
        step = rho / curvature
        X[:, at] += p * step
        r = r - q * step
        z = r if preconditioner is None else preconditioner.matmat(r)
        before, rho = rho, np.einsum("ij,ij->j", r, z)
        p = z + p * (rho / before)
    return limit, products


def _times(operator: LinearOperator, X: np.ndarray, ridge: float) -> np.ndarray:
    return multiply(operator, X) + ridge * X
