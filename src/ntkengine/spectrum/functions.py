"""Numbers that are sums over the spectrum: effective dimension, log-determinant, effective rank.

Exact for a matrix in memory, from stochastic Lanczos quadrature otherwise; each carries its error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse.linalg import LinearOperator

from ntkengine.arguments import choice, matrix_of, number, real_array
from ntkengine.digits import measured
from ntkengine.errors import InputError
from ntkengine.spectrum.matrices import EPS, as_matrix, eigenvalues_of, noise_of
from ntkengine.spectrum.operators import DenseOperator, rounding_of
from ntkengine.spectrum.panels import operator_of
from ntkengine.spectrum.quadrature import Function, quadrature, sampling, spread

_EXACT_ROWS = 4_000  # half a minute of LAPACK on one core


class Estimate(float):
    """A number with its error.

    Attributes:
        error: how far off it may be: the half-width of the 99 % confidence interval over probes, of the lower or the
            upper quadrature rule, whichever is wider, plus half the gap between them, plus what noise and rounding do
            when they move all eigenvalues one way (Weyl).
        exact: whether all eigenvalues were computed, so that only rounding and noise are left.
    """

    error: float
    exact: bool

    def __new__(cls, value: float, error: float, *, exact: bool) -> Estimate:
        """Return the number."""
        made = super().__new__(cls, value)
        made.error, made.exact = float(error), exact
        return made

    def __getnewargs_ex__(self) -> tuple[tuple[float, float], dict[str, bool]]:
        return (float(self), self.error), {"exact": self.exact}

    def __str__(self) -> str:
        return measured(self, self.error)


def effective_dimension(
    gram: Any, ridge: float, *, method: str = "auto", probes: int = 16, steps: int = 80, seed: int = 0
) -> Estimate:
    """Return tr K(K + ridge·I)⁻¹, the degrees of freedom a ridge leaves.

    Eigenvalues that the noise made negative count as 0.

    Args:
        gram: (N, N) array-like, Gram-like object, or symmetric positive semi-definite LinearOperator.
        ridge: > 0, in the unit of K.
        method: "exact", "lanczos", or "auto": exact for a matrix of up to 4,000 rows.
        probes: of the quadrature; its error falls as 1/√probes.
        steps: of Lanczos for each probe; products = probes·steps.
        seed: of the probes.

    Returns:
        Between 0 and N: a sum over eigenvalues, not divided; `.error` is its error.

    Raises:
        InputError: bad argument, or an eigenvalue below −noise, which no Gram has.

    Cost: (4/3)N³ flops, or probes·steps products.
    Source: Ubaru, Chen and Saad 2017; Golub and Meurant 2010.
    """
    ridge = number("ridge", ridge, above=0)
    return _trace(gram, _shrinkage(ridge), (method, probes, steps, seed))


def log_determinant(
    gram: Any, ridge: float, *, method: str = "auto", probes: int = 16, steps: int = 80, seed: int = 0
) -> Estimate:
    """Return log det(K + ridge·I), natural logarithm.

    Args:
        gram: (N, N) array-like, Gram-like object, or symmetric positive semi-definite LinearOperator.
        ridge: > 0, in the unit of K. Eigenvalues that the noise made negative count as 0.
        method: as in `effective_dimension`.
        probes: likewise.
        steps: likewise.
        seed: likewise.

    Returns:
        A sum over the N eigenvalues; `.error` is its error.

    Raises:
        InputError: as `effective_dimension`.

    Cost: as `effective_dimension`.
    """
    ridge = number("ridge", ridge, above=0)
    return _trace(gram, lambda x: np.log(np.maximum(x, 0.0) + ridge), (method, probes, steps, seed))


def effective_rank(gram: Any) -> Estimate:
    """Return (tr K)² / ‖K‖_F², between 1 and N: how many equal eigenvalues would give the same two sums.

    Args:
        gram: (N, N) array-like or Gram-like object.

    Returns:
        The participation ratio of the spectrum; `.error` is what the noise and rounding do to it.

    Raises:
        InputError: the matrix is zero, or its trace lies further below ‖K‖_F than noise explains, as no Gram's does.

    Cost: one pass over N² entries.
    """
    matrix = as_matrix(gram)
    norm, trace, noise = float(np.linalg.norm(matrix)), float(np.trace(matrix)), noise_of(gram)
    if norm == 0.0:
        raise InputError("gram: expected a non-zero matrix, got all zeros")
    rows = len(matrix)
    if trace + 2.0 * rows * noise < norm * (1.0 - 10.0 * rows * EPS):
        raise InputError(
            f"gram: expected no negative eigenvalue, and so a trace of at least the norm {norm:.6g}, got {trace:.6g}"
        )
    return rank_from_sums(trace, norm, rows, noise)


def rank_from_sums(trace: float, norm: float, rows: int, noise: float) -> Estimate:
    """Return the effective rank of a Gram from its trace and its Frobenius norm.

    An error E of the matrix with ‖E‖₂ <= noise moves the trace by N·noise at most, and the norm by √N·noise.

    Args:
        trace: of the matrix. Unit of K.
        norm: ‖K‖_F > 0, same unit.
        rows: N.
        noise: error of the matrix in the spectral norm, same unit.
    """
    value, off = (trace / norm) ** 2, np.sqrt(rows) * noise
    low = (max(trace - rows * noise, 0.0) / (norm + off)) ** 2
    high = ((trace + rows * noise) / (norm - off)) ** 2 if norm > off else np.inf
    error = max(value - max(low, 1.0), min(high, rows) - value, 0.0)
    return Estimate(value, error + 10.0 * rows * EPS * value, exact=True)


def dimension_from_eigenvalues(eigenvalues: np.ndarray, ridge: float, noise: float) -> Estimate:
    """Return tr K(K + ridge·I)⁻¹ from eigenvalues already at hand.

    Args:
        eigenvalues: (N,) float64 in any order. Unit of K. Those that the noise made negative count as 0.
        ridge: > 0, same unit.
        noise: error of each eigenvalue, same unit.
    """
    return _summed(eigenvalues, _shrinkage(ridge), noise)


def is_small(gram: Any, method: str) -> bool:
    """Return whether to compute all eigenvalues.

    Raises:
        InputError: an unknown method, or "exact" for an operator.
    """
    choice("method", method, ("auto", "exact", "lanczos"))
    matrix = isinstance(gram, DenseOperator) or not (isinstance(gram, LinearOperator) or callable(gram))
    if method == "exact" and not matrix:
        raise InputError("method: 'exact' needs a matrix, got a LinearOperator")
    if not matrix:
        return False
    values = matrix_of(gram)
    rows = max(getattr(values, "shape", None) or real_array("gram", values).shape, default=0)
    return method == "exact" or (method == "auto" and rows <= _EXACT_ROWS)


def _trace(gram: Any, f: Function, how: tuple[str, int, int, int]) -> Estimate:
    """Return Σ f(λ) for an f(max(λ, 0)) that increases and that, on λ >= 0, Gauss and Gauss–Radau rules bracket."""
    method, *drawn = how
    probes, steps, seed = sampling(*drawn)
    dense = None
    if is_small(gram, method):
        dense = gram if isinstance(gram, DenseOperator) else DenseOperator(gram)
    operator = operator_of(gram) if dense is None else dense
    noise = noise_of(operator)
    if dense is not None:
        values = eigenvalues_of(dense.matrix)
        off = noise + 10.0 * np.sqrt(len(values)) * EPS * float(np.abs(values).max())
        if values.min() < -off:
            raise InputError(f"gram: expected no eigenvalue below {-off:.3g}, found one at {values.min():.3g}")
        return _summed(values, f, off)
    found = quadrature(operator, probes, steps, seed)
    rounding = 10.0 * np.sqrt(found.rows) * max(EPS, rounding_of(operator)) * found.scale
    off = noise + rounding
    change = float(found.means(lambda x: _moved(f, x, off)).mean(axis=0).max())

    def shifted(x: np.ndarray) -> np.ndarray:
        return f(x + off)  # smooth down to the lowest eigenvalue that noise can make, where f has a kink

    upper, (lower, least) = found.means(shifted), found.floor(shifted, -off)
    gap = upper - lower
    middle = found.means(f) - 0.5 * gap
    # Either rule may be the exact one: an interval for each. The rules bracket tr f(K + off·I); what tells it from
    # tr f(K) is `change`, by quadrature as by noise.
    least = np.maximum(least, found.deviation(shifted))
    error = max(float(spread(upper, least)), float(spread(lower, least))) + 0.5 * float(gap.mean()) + 2.0 * change
    error += 10.0 * EPS * float(found.means(lambda x: np.abs(f(x))).mean())
    return Estimate(found.rows * float(middle.mean()), found.rows * error, exact=False)


def _summed(values: np.ndarray, f: Function, off: float) -> Estimate:
    """Return Σ f(λ), each eigenvalue right to `off`."""
    found = f(values)
    rounding = 10.0 * EPS * float(np.abs(found).sum())
    return Estimate(found.sum(), _moved(f, values, off).sum(axis=0).max() + rounding, exact=True)


def _moved(f: Function, x: np.ndarray, by: float) -> np.ndarray:
    return np.stack([f(x + by) - f(x), f(x) - f(x - by)], axis=-1)


def _shrinkage(ridge: float) -> Function:
    return lambda x: np.maximum(x, 0.0) / (np.maximum(x, 0.0) + ridge)
