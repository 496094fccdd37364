"""Low-rank approximations F Fᵀ ≈ K from a few products, and the preconditioners that low-rank approximations make.

Shapes: n rows of K, r columns of F, k columns of a vector block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike
from scipy.sparse.linalg import LinearOperator

from ntkengine.arguments import number, whole
from ntkengine.errors import InputError
from ntkengine.ridge.pivoted import Columns, LowRank, random_cholesky
from ntkengine.spectrum.matrices import EPS, noise_of
from ntkengine.spectrum.operators import DenseOperator, multiply, rounding_of
from ntkengine.spectrum.panels import operator_of


def nystrom(operator: LinearOperator, rank: int, *, noise: float = 0.0, seed: int = 0) -> LowRank:
    """Return the Nyström approximation from a random subspace: products with K in place of its columns.

    Args:
        operator: (n, n) symmetric positive semi-definite; or a matrix.
        rank: r.
        noise: how far below zero an eigenvalue may be, in the unit of K.
        seed: of the subspace.

    Returns:
        The factor; no pivots, and `residual`, `trace` are NaN: the diagonal of K is not known.

    Raises:
        InputError: bad rank, or products that show K not to be positive semi-definite.

    Cost: r products, 4nr² flops.
    Source: Frangella, Tropp and Udell 2021 (arXiv 2110.02820), algorithm 2.1.
    """
    operator = operator_of(operator)
    n = operator.shape[0]
    rank, noise, seed = whole("rank", rank, 1, n), number("noise", noise, 0), whole("seed", seed)
    test = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, rank)))[0]
    Y, unknown = multiply(operator, test), np.full(n, np.nan)
    if not Y.any():
        return LowRank(Y, np.empty(0, dtype=np.int64), unknown, float("nan"))
    rounding = np.sqrt(n) * max(EPS, rounding_of(operator)) * float(np.linalg.norm(Y))
    core = test.T @ Y
    core = 0.5 * (core + core.T)
    lowest = float(scipy.linalg.eigvalsh(core, subset_by_index=[0, 0])[0])
    if -lowest > max(rounding, noise):
        raise InputError(
            f"operator: expected a positive semi-definite matrix, its projection has the eigenvalue {lowest:.3g}"
        )
    shift = rounding + 2.0 * max(-lowest, 0.0)
    Y = Y + shift * test
    C = scipy.linalg.cholesky(core + shift * np.eye(len(core)), lower=True)
    U, s, _ = np.linalg.svd(scipy.linalg.solve_triangular(C, Y.T, lower=True).T, full_matrices=False)
    return LowRank(U * np.sqrt(np.maximum(s**2 - shift, 0.0)), np.empty(0, dtype=np.int64), unknown, float("nan"))


class Preconditioner(LinearOperator):
    """P⁻¹ for P = F Fᵀ + ridge·I.

    Args:
        low: the approximation of K.
        ridge: > 0.

    Attributes:
        factor: F.

    Cost: nr² once; 4nrk flops a product.
    """

    def __init__(self, low: LowRank, ridge: float) -> None:
        if not isinstance(low, LowRank):
            raise InputError(f"low: expected a LowRank, got {type(low).__name__}")
        self.factor, self.ridge = low.factor, number("ridge", ridge, above=0)
        n = len(self.factor)
        # From the singular values: F Fᵀ and the ridge may be many orders of magnitude apart.
        self._U, s, _ = np.linalg.svd(self.factor, full_matrices=False)
        self._gain = s**2 / (s**2 + ridge)
        super().__init__(dtype=np.dtype(np.float64), shape=(n, n))  # type: ignore[call-arg]

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self._matmat(np.reshape(x, (-1, 1)))[:, 0]

    def _matmat(self, X: np.ndarray) -> np.ndarray:
        inner = self._U.T @ X
        return (X - self._U @ (self._gain[:, None] * inner)) / self.ridge

    def _adjoint(self) -> Preconditioner:
        return self


def preconditioner(
    gram: Any,
    ridge: float,
    rank: int,
    *,
    columns: Columns | None = None,
    diagonal: ArrayLike | None = None,
    seed: int = 0,
) -> Preconditioner:
    """Return a preconditioner of K + ridge·I of the given rank.

    By randomly pivoted Cholesky where columns of K can be had (`columns` and `diagonal`, or a matrix in memory), else
    by Nyström with `rank` products.

    Args:
        gram: (n, n) array-like, Gram-like or LinearOperator.
        ridge: > 0.
        rank: about twice the effective dimension tr K(K + ridge·I)⁻¹ makes the iterations few.
        columns: (b,) indices -> (n, b), as for `random_cholesky`.
        diagonal: (n,) of K, with `columns`.
        seed: of the draws.

    Returns:
        The operator P⁻¹.

    Raises:
        InputError: bad argument, or a K that is not positive semi-definite.
    """
    operator = operator_of(gram)
    ridge, rank = number("ridge", ridge, above=0), min(whole("rank", rank, 1), operator.shape[0])
    noise, seed = noise_of(operator), whole("seed", seed)
    if columns is not None:
        if diagonal is None:
            raise InputError("diagonal: expected with columns, got None")
        low = random_cholesky(columns, diagonal, rank, noise=noise, seed=seed, shift=ridge)
    elif isinstance(operator, DenseOperator):
        matrix = operator.matrix
        low = random_cholesky(
            lambda at: matrix[:, at],
            np.maximum(matrix.diagonal(), 0.0),
            rank,
            noise=noise,
            seed=seed,
            shift=ridge,
        )
    else:
        low = nystrom(operator, rank, noise=max(noise, ridge), seed=seed)  # K + ridge·I is what must be positive
    return Preconditioner(low, ridge)
