"""The condition number with its error."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.sparse.linalg import LinearOperator

from ntkengine.arguments import number, real_array
from ntkengine.digits import above, below, between, nearest
from ntkengine.errors import InputError, NotConverged
from ntkengine.spectrum.lanczos import eigsh
from ntkengine.spectrum.matrices import EPS, eigenvalues_of
from ntkengine.spectrum.operators import DenseOperator
from ntkengine.spectrum.panels import operator_of

_PRODUCTS = 500  # for the low end of an operator, which rarely converges


@dataclass(frozen=True)
class ConditionNumber:
    """λ_max / λ_min of a Gram, or what can be said of it.

    Attributes:
        lambda_max: largest computed eigenvalue. Unit of K.
        lambda_min: smallest computed eigenvalue.
        noise: how far each of the two may be off: the Gram's noise + the solver's residual; at least −λ_min, since a
            true Gram has no negative eigenvalue and a negative one therefore shows an error of that size (Weyl); at
            least λ_min where an operator's low end has not settled, as the true one may then be anything below.
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

    @property
    def short(self) -> str:
        """The number with its interval, or its lower bound."""
        if self.resolved:
            return between(self.lambda_max / self.lambda_min, self.lower, self.upper)
        return f"> {below(self.lower, 3)}"

    def __str__(self) -> str:
        if self.resolved:
            return self.short
        if self.lambda_min >= self.noise:
            return f"{self.short} (unresolved: the smallest eigenvalue is at most {above(self.lambda_min, 2)})"
        return (
            f"{self.short} (unresolved: the smallest eigenvalue {nearest(self.lambda_min, 2)} is not above "
            f"its error {above(self.noise, 2)})"
        )


def condition_number(gram: Any) -> ConditionNumber:
    """Return λ_max/λ_min with its error, or a lower bound where the noise hides λ_min.

    Args:
        gram: (N, N) array-like, Gram-like object, or symmetric LinearOperator, whose products are taken to be right to
            its `rounding`, else to that of its dtype; a Gram on disk of more than 12,000 rows is streamed as one.

    Returns:
        The condition number; `str()` of it prints only what is known.

    Raises:
        InputError: not a symmetric finite matrix.

    Cost: (4/3)N³ flops for a matrix. An operator gets up to 500 products of Lanczos; where these do not settle the low
        end, the smallest Ritz value is above λ_min (Cauchy) and the condition number unresolved, with a lower bound.
    Source: Weyl's inequality.
    """
    operator = operator_of(gram)
    if isinstance(gram, LinearOperator) or not isinstance(operator, DenseOperator):
        try:
            ritz = eigsh(operator, k=min(2, operator.shape[0]), which="BE", max_products=_PRODUCTS)
        except NotConverged as stopped:
            ritz = stopped.partial
            error = float((ritz.bounds - ritz.residuals).max())
            found = condition_from_eigenvalues(ritz.values, noise=error, rounding=0.0)
            return replace(found, noise=max(found.noise, found.lambda_min), upper=float("inf"), resolved=False)
        return condition_from_eigenvalues(ritz.values, noise=float(ritz.bounds.max()), rounding=0.0)
    return condition_from_eigenvalues(eigenvalues_of(operator.matrix), operator.noise)


def condition_from_eigenvalues(eigenvalues: np.ndarray, noise: float, rounding: float | None = None) -> ConditionNumber:
    """Return the condition number from eigenvalues already at hand.

    Args:
        eigenvalues: (N,) float64 in any order. Unit of K.
        noise: error of the matrix in the spectral norm, same unit; NaN where it is not known: then nothing is resolved.
        rounding: error of the solver, same unit; default √N · eps · |λ|_max, LAPACK's in practice.

    Returns:
        As `condition_number`.

    Raises:
        InputError: eigenvalues, noise or rounding that are no finite numbers.
    """
    values = real_array("eigenvalues", eigenvalues).astype(np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise InputError(f"eigenvalues: expected finite numbers (N,), got shape {values.shape}")
    top, bottom = float(values.max()), float(values.min())
    if rounding is None:
        rounding = float(np.sqrt(len(values)) * EPS * np.abs(values).max())
    if not (isinstance(noise, float) and np.isnan(noise)):
        number("noise", noise, 0)
    error = max(noise + number("rounding", rounding, 0), -bottom)
    resolved = bottom > error
    floor = max(bottom, 0.0) + error
    lower = max((top - error) / floor, 1.0) if floor > 0 else 1.0
    upper = (top + error) / (bottom - error) if resolved else float("inf")
    return ConditionNumber(top, bottom, error, lower, upper, resolved)
