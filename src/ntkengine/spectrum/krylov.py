"""Block Lanczos with thick restart and full reorthogonalisation: one run on one operator.

Shapes: N rows, k wanted pairs, m basis vectors, w vectors of a block.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
from scipy.sparse.linalg import LinearOperator

from ntkengine.errors import NotConverged
from ntkengine.spectrum.certify import Ritz, pair_bounds
from ntkengine.spectrum.operators import DenseOperator, check_symmetry, multiply, rounding_of


class Krylov:
    """One search for k extreme pairs.

    A converged pair stays in the basis through every restart and all else is kept orthogonal to it: the outlier that an
    empirical NTK has is found in a few products and deflated from then on.

    `V` (N, m + w) is the basis with the next block behind it; `T` = VᵀKV (m, m); `B` (w, w) couples the last block to
    the next: K V_last = V T[:, last] + V_next B.

    Args:
        operator: symmetric.
        k: pairs wanted.
        which: "LA", "SA" or "BE".
        tol: relative tolerance.
        limit: products to spend.
        seed: of the random vectors.
        noise: of the matrix.
        block: vectors multiplied at once.
    """

    def __init__(
        self,
        operator: LinearOperator,
        k: int,
        which: str,
        tol: float,
        limit: int,
        seed: int,
        noise: float,
        block: int,
    ) -> None:
        self.operator, self.k, self.which, self.tol, self.limit, self.noise = operator, k, which, tol, limit, noise
        self.rows = operator.shape[0]
        self.block = min(block, self.rows)
        self.rounding = np.sqrt(self.rows) * rounding_of(operator)
        self.capacity = min(self.rows, max(2 * k + 20, 40, k + 8 * block))
        self.random = np.random.default_rng(seed)
        self.products = 0
        self.scale = 0.0  # largest |Ritz value| met: a lower bound of ‖K‖₂ that is sharp after a few steps
        self.V = np.zeros((self.rows, self.capacity + self.block), order="F")
        self.T = np.zeros((self.capacity, self.capacity))
        self.size = self.width = 0  # basis vectors in T; columns of the next block

    def run(self) -> Ritz:
        """Return the converged pairs, or raise NotConverged with what there is."""
        if not isinstance(self.operator, DenseOperator):  # which has looked at every entry
            check_symmetry(self._product, self.operator, self.random)
        self._draw(0, self.block)
        start, settled = 0, None
        stride = max(3, self.capacity // 16)  # vectors between two looks at the Ritz values
        while True:
            B = self._extend(start, max(start + stride, self.k + 1))
            values, S = scipy.linalg.eigh(self.T[: self.size, : self.size])
            self.scale = max(self.scale, float(np.abs(values).max()))
            estimate = np.linalg.norm(B @ S[self.size - B.shape[1] :], axis=0)
            order = self._order(values)
            wanted, following = order[: self.k], order[self.k : self.k + (2 if self.which == "BE" else 1)]
            if self.size == self.rows:
                return self._finish(S[:, wanted])  # the basis is the whole space
            done = bool((estimate[wanted] <= 0.5 * self._target(values[wanted])).all())
            if done and settled is not None and self._unchanged(settled, values[wanted]):
                gap = np.abs(values[following][:, None] - values[wanted]).min(axis=1)
                if (estimate[following] <= np.maximum(0.3 * gap, self._target(values[following]))).all():
                    return self._finish(S[:, wanted])
            if self.products >= self.limit:
                partial = self._measure(S[:, wanted])
                worst = float(partial.residuals.max())
                message = f"Lanczos stopped after {self.products} products with the largest residual {worst:.3g}"
                raise NotConverged(message, partial=partial, residual=worst)
            if done and (settled is None or not self._unchanged(settled, values[wanted])):
                settled = np.sort(values[wanted])
                start = self._restart(values, S, wanted)
                self._draw(start, min(self.block, self.rows - start))
            elif self.size + self.width > self.capacity:
                start = self._restart(values, S, order[: self.k + (self.size - self.k) // 2])
            else:
                start = self.size

    def _extend(self, start: int, stop: int) -> np.ndarray:
        """Grow the basis block by block from `start` to `stop` or as far as it goes; return B."""
        at, width = start, self.width
        while True:
            end = at + width
            basis = self.V[:, :end]
            W = self._product(basis[:, at:])
            coefficients = np.zeros((end, width))
            for _ in range(2):  # twice is enough (Parlett 1998, 6.9)
                h = basis.T @ W
                W -= basis @ h
                coefficients += h
            self.T[:end, at:end] = coefficients
            self.T[at:end, :end] = coefficients.T
            self.T[at:end, at:end] = 0.5 * (coefficients[at:] + coefficients[at:].T)
            self.scale = max(self.scale, float(np.abs(coefficients).max()))
            following = min(width, self.rows - end)
            B = self._append(W, end, following)
            if end >= stop or end + following > self.capacity or not following:
                self.size, self.width = end, following
                return B
            at, width = end, following

    def _append(self, W: np.ndarray, end: int, count: int) -> np.ndarray:
        """Put an orthonormal basis of the remainder W into the next `count` columns, random where it has no more."""
        if not count:
            return np.zeros((0, W.shape[1]))
        if W.shape[1] == 1:
            size = np.linalg.norm(W, axis=0)
            Q = W / (size or 1.0)
        else:
            Q, R, _ = scipy.linalg.qr(W, mode="economic", pivoting=True, check_finite=False)
            size = np.abs(np.diagonal(R))
        rank = min(count, int((size > self.rounding * self.scale).sum()))  # below: an invariant subspace
        if rank > 1 and size[rank - 1] < 0.1 * size[0]:  # nearly dependent columns lost their orthogonality to V
            Q[:, :rank] -= self.V[:, :end] @ (self.V[:, :end].T @ Q[:, :rank])
            Q[:, :rank] = np.linalg.qr(Q[:, :rank])[0]
        B = np.zeros((count, W.shape[1]))
        B[:rank] = Q[:, :rank].T @ W
        self.V[:, end : end + rank] = Q[:, :rank]
        self._draw(end + rank, count - rank)
        return B

    def _restart(self, values: np.ndarray, S: np.ndarray, keep: np.ndarray) -> int:
        """Shrink the basis to the kept Ritz vectors and the next block; return how many were kept."""
        count = len(keep)
        last = self.V[:, self.size : self.size + self.width].copy()
        self.V[:, :count] = self.V[:, : self.size] @ S[:, keep]
        self.V[:, count : count + self.width] = last
        self.T[:] = 0.0
        self.T[np.arange(count), np.arange(count)] = values[keep]
        return count

    def _draw(self, at: int, count: int) -> None:
        """Put random unit vectors, orthogonal to all before, into `count` columns from `at` on."""
        for j in range(at, at + count):
            w = self.random.standard_normal(self.rows)
            for _ in range(3):
                w -= self.V[:, :j] @ (self.V[:, :j].T @ w)
                w /= np.linalg.norm(w)
            self.V[:, j] = w
        if count:
            self.width = count

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
        floor = max(10.0 * self.rounding * self.scale, 0.1 * self.noise)
        return np.maximum(self.tol * np.abs(values), floor)

    def _unchanged(self, before: np.ndarray, now: np.ndarray) -> bool:
        return bool((np.abs(before - np.sort(now)) <= self._target(before)).all())

    def _measure(self, S: np.ndarray) -> Ritz:
        vectors = np.linalg.qr(self.V[:, : self.size] @ S)[0]  # the basis is orthonormal to some hundred eps
        step = max(self.block, 16)
        images = np.hstack([self._product(vectors[:, i : i + step]) for i in range(0, self.k, step)])
        values, turn = scipy.linalg.eigh(vectors.T @ images)
        vectors, images = vectors @ turn, images @ turn
        residuals = np.linalg.norm(images - vectors * values, axis=0)
        bounds = pair_bounds(values, residuals) + 10.0 * self.rounding * self.scale + self.noise
        return Ritz(values, vectors, residuals, bounds, self.products, "lanczos")

    def _finish(self, S: np.ndarray) -> Ritz:
        ritz = self._measure(S)
        excess = ritz.residuals - self._target(ritz.values)
        if (excess > 0).any():
            worst = float(ritz.residuals[np.argmax(excess)])
            message = f"Lanczos: a pair that looked converged has the residual {worst:.3g}; is the operator linear?"
            raise NotConverged(message, partial=ritz, residual=worst)
        return ritz

    def _product(self, X: np.ndarray) -> np.ndarray:
        self.products += X.shape[1]
        return multiply(self.operator, X)
