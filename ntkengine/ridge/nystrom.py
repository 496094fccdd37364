"""Low-rank approximations F Fᵀ ≈ K from a few columns, and the preconditioners they make.

Shapes: n rows of K, r columns of F, k columns of a vector block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike
from scipy.sparse.linalg import LinearOperator

from ntkengine.errors import InputError
from ntkengine.spectrum.operators import EPS, DenseOperator, noise_of
from ntkengine.spectrum.panels import operator_of

Columns = Callable[[np.ndarray], np.ndarray]

_OFF = 0.02  # of a diagonal entry, between two ways to it: bfloat16 gradients differ by some 3e-3


@dataclass(frozen=True)
class LowRank:
    """K̂ = F Fᵀ with 0 <= K̂ <= K, for a K that is exact; else up to its noise, which few pivots can amplify.

    Attributes:
        factor: (n, r) float64 F.
        pivots: (r,) rows whose columns of K were read; K̂ equals K there.
        residual: (n,) diagonal of K − K̂, >= 0.
        trace: tr K.
    """

    factor: np.ndarray
    pivots: np.ndarray
    residual: np.ndarray
    trace: float

    @property
    def error(self) -> float:
        """Return tr(K − K̂), which bounds ‖K − K̂‖₂ since K − K̂ is positive semi-definite. Unit of K."""
        return float(self.residual.sum())


def random_cholesky(
    columns: Columns,
    diagonal: ArrayLike,
    rank: int,
    *,
    block: int = 64,
    tol: float = 0.0,
    noise: float = 0.0,
    seed: int = 0,
) -> LowRank:
    """Return a partial Cholesky factorisation of K whose pivots are drawn by the residual diagonal.

    Only the drawn columns of K are ever asked for, `block` at a time. Of a block of candidates drawn at once, each is
    kept with the probability its residual has left after those before it: the same distribution as one by one.

    Args:
        columns: (b,) ascending row indices -> (n, b) those columns of K. `gram.landmarks` makes one from a model.
        diagonal: (n,) of K, >= 0.
        rank: columns to keep at most, r.
        block: candidates drawn at once.
        tol: stop when tr(K − K̂) <= tol · tr K.
        noise: of K in the spectral norm: what is left below it is no pivot.
        seed: of the draws.

    Returns:
        The factor; fewer columns than `rank` when K is exhausted to its rounding or noise, or `tol` reached.

    Raises:
        InputError: bad argument, columns of another shape, not finite, or at odds with the diagonal.

    Cost: up to r + block columns of K a kept one or so, and n·r² flops; n·r numbers.
    Source: Chen, Epperly, Tropp and Webber 2022 (arXiv 2207.06503); in blocks, arXiv 2410.03969.
    """
    start = np.asarray(diagonal, dtype=np.float64)
    if start.ndim != 1 or not start.size or not np.isfinite(start).all() or (start < 0).any():
        raise InputError("diagonal: expected (n,) finite numbers >= 0")
    n, trace = len(start), float(start.sum())
    if not rank >= 1 or block < 1:
        raise InputError(f"rank, block: expected at least 1, got {rank!r} and {block!r}")
    rank, rng = min(int(rank), n), np.random.default_rng(seed)
    F, residual, pivots = np.zeros((n, rank), order="F"), start.copy(), np.empty(rank, dtype=np.int64)
    floor = max(10.0 * n * EPS * float(start.max()), noise)
    kept = 0
    while kept < rank and residual.sum() > max(tol * trace, n * floor):
        order = rng.choice(n, size=min(block, rank - kept), p=residual / residual.sum())
        drawn, places = np.unique(order, return_inverse=True)
        K = _checked(columns(drawn), start, drawn)
        G = K - F[:, :kept] @ F[drawn, :kept].T  # what K̂ lacks in these columns
        proposed = residual[drawn]
        chosen = _accepted(G[drawn], proposed, places, floor, rng)
        residual[drawn] = np.clip(G[drawn, np.arange(len(drawn))], 0.0, proposed)  # the column knows better
        if not len(chosen):
            continue
        G, rows = G[:, chosen], drawn[chosen]
        L = scipy.linalg.cholesky(G[rows], lower=True)  # its pivots are those accepted
        new = scipy.linalg.solve_triangular(L, G.T, lower=True).T
        left = residual - (new**2).sum(axis=1)
        smallest = float(L.diagonal().min()) ** 2
        if left.min() < -floor - 0.1 * smallest:  # F Fᵀ would be more than K is: that pivot was noise
            floor = 2.0 * max(floor, smallest)
            continue
        F[:, kept : kept + len(rows)] = new
        pivots[kept : kept + len(rows)] = rows
        kept += len(rows)
        residual = np.maximum(left, 0.0)
        residual[rows] = 0.0
    return LowRank(np.ascontiguousarray(F[:, :kept]), pivots[:kept], residual, trace)


def nystrom(operator: LinearOperator, rank: int, *, noise: float = 0.0, seed: int = 0) -> LowRank:
    """Return the Nyström approximation from a random subspace: products with K in place of its columns.

    Args:
        operator: (n, n) symmetric positive semi-definite.
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
    n = operator.shape[0]
    if not 1 <= rank <= n:
        raise InputError(f"rank: expected 1 to {n}, got {rank!r}")
    test = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, int(rank))))[0]
    Y = operator.matmat(test)
    rounding = np.sqrt(n) * max(EPS, getattr(operator, "rounding", EPS)) * float(np.linalg.norm(Y))
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
    unknown = np.full(n, np.nan)
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
        if not (np.isfinite(ridge) and ridge > 0):
            raise InputError(f"ridge: expected a finite number > 0, got {ridge!r}")
        self.factor, self.ridge = low.factor, float(ridge)
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
    rank, noise = min(int(rank), operator.shape[0]), noise_of(operator)
    if columns is not None:
        if diagonal is None:
            raise InputError("diagonal: expected with columns, got None")
        low = random_cholesky(columns, diagonal, rank, noise=noise, seed=seed)
    elif isinstance(operator, DenseOperator):
        matrix = operator.matrix
        low = random_cholesky(
            lambda at: matrix[:, at], np.maximum(matrix.diagonal(), 0.0), rank, noise=noise, seed=seed
        )
    else:
        low = nystrom(operator, rank, noise=max(noise, ridge), seed=seed)  # K + ridge·I is what must be positive
    return Preconditioner(low, ridge)


def _checked(found: np.ndarray, diagonal: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    K = np.asarray(found, dtype=np.float64)
    if K.shape != (len(diagonal), len(drawn)):
        raise InputError(f"columns: expected shape ({len(diagonal)}, {len(drawn)}), got {K.shape}")
    if not np.isfinite(K).all():
        raise InputError("columns: expected finite entries, got NaN or infinity")
    off = np.abs(K[drawn, np.arange(len(drawn))] - diagonal[drawn])
    if (off > _OFF * diagonal[drawn]).any():
        bad = int(drawn[np.argmax(off)])
        raise InputError(
            f"columns: entry ({bad}, {bad}) differs from the diagonal {diagonal[bad]:.6g} by {off.max():.3g}"
        )
    return K


def _accepted(
    block: np.ndarray, proposed: np.ndarray, order: np.ndarray, floor: float, rng: np.random.Generator
) -> np.ndarray:
    """Return which candidates to keep: in the order drawn, each with the probability left after those kept before."""
    left, chosen = block.copy(), []
    for i in order:  # one drawn again has nothing left
        if left[i, i] > floor and rng.random() * proposed[i] < left[i, i]:
            chosen.append(i)
            column = left[:, i] / np.sqrt(left[i, i])
            left -= np.outer(column, column)
    return np.array(chosen, dtype=np.int64)
