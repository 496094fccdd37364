"""Extreme eigenpairs with a bound on each: LAPACK while it is quicker, thick-restart Lanczos beyond.

Shapes: N rows, k wanted pairs, m basis vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
from scipy.sparse.linalg import LinearOperator

from ntkengine.errors import InputError, NotConverged
from ntkengine.spectrum.operators import EPS, DenseOperator, noise_of

# The 20 top pairs of an empirical NTK take Lanczos about 120 products at any N, of a spectrum without gaps 200 to 400:
# level with LAPACK near N = 500, ahead beyond (measured, two cores). The low end of a Gram is clustered, where Lanczos
# needs nearly N products and more: there LAPACK is used as long as its memory is no trouble.
_DENSE_TOP, _DENSE_ROWS = 500, 12_000


@dataclass(frozen=True)
class Ritz:
    """Approximate eigenpairs and how far each can be off.

    Attributes:
        values: (k,) float64, ascending. Unit of K.
        vectors: (N, k) float64, orthonormal columns.
        residuals: (k,) ‖K v − θ v‖₂, computed explicitly with the K at hand.
        bounds: (k,) residual + rounding + noise. Some eigenvalue of the true K lies within `bounds[i]` of `values[i]`,
            provided `noise` bounds ‖K̃ − K‖₂. Rounding is √N · eps · ‖K‖.
        products: matrix-vector products spent (0 for LAPACK, plus k to check).
        method: "dense" or "lanczos".
    """

    values: np.ndarray
    vectors: np.ndarray
    residuals: np.ndarray
    bounds: np.ndarray
    products: int
    method: str


def eigsh(
    gram: Any,
    k: int = 20,
    which: str = "LA",
    tol: float = 1e-8,
    max_products: int | None = None,
    seed: int = 0,
    method: str = "auto",
) -> Ritz:
    """Return k extreme eigenpairs of a symmetric Gram, each with its bound.

    A pair counts as converged when ‖K v − θ v‖ <= max(tol·|θ|, 10·√N·eps·‖K‖₂, noise/10): relative to its own
    eigenvalue, not to the outlier that an empirical NTK usually has, and never tighter than the arithmetic or the Gram.

    Multiple eigenvalues: a Krylov space holds one copy of each eigenvalue. After convergence the search is therefore
    restarted from a random direction orthogonal to what was found, until a restart whose own extreme pair has converged
    changes nothing. That finds further copies with probability one in exact arithmetic. The bounds of the returned
    values are rigorous; that no eigenvalue in between was missed is not proved but checked in this way.
    `method="dense"` has no such caveat.

    Args:
        gram: (N, N) array-like, Gram-like object, or a symmetric LinearOperator (float64 products).
        k: number of pairs, 1 <= k <= N.
        which: "LA" largest, "SA" smallest, "BE" both ends (k//2 from the low end, the rest from the high end).
        tol: relative tolerance, > 0.
        max_products: Lanczos only; default max(1000, 4 N).
        seed: of the random start vectors; same seed, same result.
        method: "dense" (LAPACK), "lanczos", or "auto". Auto takes LAPACK for a matrix of up to 500 rows (12,000 for
            "SA" and "BE") or when k is above N/5, else Lanczos; when that has not converged after N products it goes on
            with LAPACK, up to 12,000 rows, unless `max_products` is given.

    Returns:
        The pairs, values ascending.

    Raises:
        InputError: bad argument, or an operator that is not symmetric or not finite.
        NotConverged: products used up; `.partial` holds the Ritz pairs so far, `.residual` the largest residual.

    Cost: dense about (4/3)N³ + 4N²k flops and N² extra memory; Lanczos 2N² a product plus 8Nm a step to
        orthogonalise, and N·m numbers with m = max(2k + 20, 40).
    Source: Wu and Simon 2000 (thick restart); Parlett 1998, theorem 4.5.1 (the residual bound).
    """
    operator, matrix, noise = _prepare(gram)
    rows = operator.shape[0]
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= rows:
        raise InputError(f"k: expected an integer from 1 to {rows}, got {k!r}")
    if which not in ("LA", "SA", "BE"):
        raise InputError(f"which: expected 'LA', 'SA' or 'BE', got {which!r}")
    if not 0 < tol < 1:
        raise InputError(f"tol: expected a number between 0 and 1, got {tol!r}")
    if method not in ("auto", "dense", "lanczos"):
        raise InputError(f"method: expected 'auto', 'dense' or 'lanczos', got {method!r}")
    limit = max(1000, 4 * rows) if max_products is None else int(max_products)
    if limit < 1:
        raise InputError(f"max_products: expected at least 1, got {max_products!r}")
    if method == "dense" and matrix is None:
        raise InputError("method: 'dense' needs a matrix, got a LinearOperator")
    size = _DENSE_TOP if which == "LA" else _DENSE_ROWS
    if matrix is not None and (method == "dense" or (method == "auto" and (rows <= size or 5 * k > rows))):
        return _dense(matrix, int(k), which, noise)
    if matrix is not None and method == "auto" and max_products is None and rows <= _DENSE_ROWS:
        try:
            return _Lanczos(operator, int(k), which, tol, rows, seed, noise).run()
        except NotConverged:
            return _dense(matrix, int(k), which, noise)
    return _Lanczos(operator, int(k), which, tol, limit, seed, noise).run()


def _prepare(gram: Any) -> tuple[LinearOperator, np.ndarray | None, float]:
    if isinstance(gram, DenseOperator):
        return gram, gram.matrix, gram.noise
    if isinstance(gram, LinearOperator):
        if gram.shape[0] != gram.shape[1]:
            raise InputError(f"gram: expected a square operator, got shape {gram.shape}")
        return gram, None, noise_of(gram)
    operator = DenseOperator(gram)
    return operator, operator.matrix, noise_of(gram)


def _dense(matrix: np.ndarray, k: int, which: str, noise: float) -> Ritz:
    rows = len(matrix)
    low, high = {"LA": (0, k), "SA": (k, 0), "BE": (k // 2, k - k // 2)}[which]
    if low and high:
        values, vectors = scipy.linalg.eigh(matrix)
        picked = np.r_[0:low, rows - high : rows]
        values, vectors = values[picked], vectors[:, picked]
    else:
        ends = [0, low - 1] if low else [rows - high, rows - 1]
        values, vectors = scipy.linalg.eigh(matrix, subset_by_index=ends)
    residuals = np.linalg.norm(matrix @ vectors - vectors * values, axis=0)
    # ‖K‖₂ <= the largest absolute row sum.
    rounding = np.sqrt(rows) * EPS * float(scipy.linalg.norm(matrix, np.inf))
    return Ritz(values, vectors, residuals, residuals + rounding + noise, k, "dense")


class _Lanczos:
    """Thick-restart Lanczos with full reorthogonalisation: one run.

    `V` (N, m+1) is the basis, its last column the next direction; `T` = VᵀKV (m, m).
    """

    def __init__(
        self, operator: LinearOperator, k: int, which: str, tol: float, limit: int, seed: int, noise: float
    ) -> None:
        self.operator, self.k, self.which, self.tol, self.limit, self.noise = operator, k, which, tol, limit, noise
        self.rows = operator.shape[0]
        self.size = min(self.rows, max(2 * k + 20, 40))
        self.random = np.random.default_rng(seed)
        self.products = 0
        self.scale = 0.0  # largest |Ritz value| met: a lower bound of ‖K‖₂ that is sharp after a few steps
        self.V = np.zeros((self.rows, self.size + 1))
        self.T = np.zeros((self.size, self.size))

    def run(self) -> Ritz:
        """Return the converged pairs, or raise NotConverged with what there is."""
        self._check_symmetry()
        self._inject(0)
        start, settled = 0, None
        while True:
            beta = self._extend(start)
            values, S = scipy.linalg.eigh(self.T)
            self.scale = max(self.scale, float(np.abs(values).max()))
            estimate = np.abs(beta * S[-1])
            order = self._order(values)
            wanted, following = order[: self.k], order[self.k : self.k + (2 if self.which == "BE" else 1)]
            if self.size == self.rows:
                return self._finish(S[:, wanted])  # the basis is the whole space
            done = bool((estimate[wanted] <= 0.25 * self._target(values[wanted])).all())
            if done and settled is not None and self._unchanged(settled, values[wanted]):
                gap = np.abs(values[following][:, None] - values[wanted]).min(axis=1)
                if (estimate[following] <= np.maximum(0.1 * gap, self._target(values[following]))).all():
                    return self._finish(S[:, wanted])
            if self.products >= self.limit:
                partial = self._measure(S[:, wanted])
                worst = float(partial.residuals.max())
                message = f"Lanczos stopped after {self.products} products with the largest residual {worst:.3g}"
                raise NotConverged(message, partial=partial, residual=worst)
            if done and (settled is None or not self._unchanged(settled, values[wanted])):
                settled = np.sort(values[wanted])
                start = self._restart(values, S, wanted)
                self._inject(start)
            else:
                keep = order[: self.k + (self.size - self.k) // 2]
                start = self._restart(values, S, keep)

    def _extend(self, start: int) -> float:
        """Grow the basis from `start` to full size; return the norm of the last remainder."""
        beta = 0.0
        for j in range(start, self.size):
            w = self._product(self.V[:, j])
            basis = self.V[:, : j + 1]
            column = np.zeros(j + 1)
            for _ in range(2):  # twice is enough (Parlett 1998, 6.9)
                h = basis.T @ w
                w -= basis @ h
                column += h
            self.T[: j + 1, j] = self.T[j, : j + 1] = column
            self.scale = max(self.scale, float(np.abs(column).max()))
            beta = float(np.linalg.norm(w))
            if beta <= np.sqrt(self.rows) * EPS * self.scale:
                beta = 0.0  # an invariant subspace: go on in a fresh direction, uncoupled
                if j + 1 < self.rows:
                    self._inject(j + 1)
            else:
                self.V[:, j + 1] = w / beta
        return beta

    def _restart(self, values: np.ndarray, S: np.ndarray, keep: np.ndarray) -> int:
        """Shrink the basis to the kept Ritz vectors and the remainder; return how many were kept."""
        count = len(keep)
        last = self.V[:, self.size].copy()
        self.V[:, :count] = self.V[:, : self.size] @ S[:, keep]
        self.V[:, count] = last
        self.T[:] = 0.0
        self.T[np.arange(count), np.arange(count)] = values[keep]
        return count

    def _inject(self, j: int) -> None:
        """Put a random unit vector orthogonal to the first j basis vectors into column j."""
        w = self.random.standard_normal(self.rows)
        for _ in range(3):
            w -= self.V[:, :j] @ (self.V[:, :j].T @ w)
            w /= np.linalg.norm(w)
        self.V[:, j] = w

    def _order(self, values: np.ndarray) -> np.ndarray:
        """Indices of the ascending values, most wanted first."""
        ascending = np.arange(len(values))
        if self.which == "SA":
            return ascending
        if self.which == "LA":
            return ascending[::-1]
        low = self.k // 2
        picked = np.r_[ascending[::-1][: self.k - low], ascending[:low]]
        rest = np.setdiff1d(ascending, picked)
        mixed = np.empty_like(rest)  # the next ones of both ends in turn, high end first
        mixed[::2], mixed[1::2] = rest[::-1][: (len(rest) + 1) // 2], rest[: len(rest) // 2]
        return np.r_[picked, mixed]

    def _target(self, values: np.ndarray) -> np.ndarray:
        floor = max(10.0 * np.sqrt(self.rows) * EPS * self.scale, 0.1 * self.noise)
        return np.maximum(self.tol * np.abs(values), floor)

    def _unchanged(self, before: np.ndarray, now: np.ndarray) -> bool:
        return bool((np.abs(before - np.sort(now)) <= self._target(before)).all())

    def _measure(self, S: np.ndarray) -> Ritz:
        vectors = self.V[:, : self.size] @ S
        images = np.column_stack([self._product(v) for v in vectors.T])
        values = np.einsum("ij,ij->j", vectors, images)
        order = np.argsort(values)
        residuals = np.linalg.norm(images - vectors * values, axis=0)[order]
        bounds = residuals + np.sqrt(self.rows) * EPS * self.scale + self.noise
        return Ritz(values[order], vectors[:, order], residuals, bounds, self.products, "lanczos")

    def _finish(self, S: np.ndarray) -> Ritz:
        ritz = self._measure(S)
        excess = ritz.residuals - self._target(ritz.values)
        if (excess > 0).any():
            worst = float(ritz.residuals[np.argmax(excess)])
            message = f"Lanczos: a pair that looked converged has the residual {worst:.3g}; is the operator linear?"
            raise NotConverged(message, partial=ritz, residual=worst)
        return ritz

    def _product(self, v: np.ndarray) -> np.ndarray:
        self.products += 1
        w = np.array(self.operator.matvec(v), dtype=np.float64).reshape(-1)
        if not np.isfinite(w).all():
            raise InputError(f"gram: expected finite products, got NaN or infinity in product {self.products}")
        return w

    def _check_symmetry(self) -> None:
        u, v = self.random.standard_normal((2, self.rows))
        Ku, Kv = self._product(u), self._product(v)
        size = np.linalg.norm(u) * np.linalg.norm(Kv) + np.linalg.norm(v) * np.linalg.norm(Ku)
        if abs(u @ Kv - v @ Ku) > 1e-10 * size:
            raise InputError(f"gram: expected a symmetric operator, got u.Kv = {u @ Kv:.9g} and v.Ku = {v @ Ku:.9g}")
