"""A Gram matrix as the solvers see it: products with vectors, counted.

Every operator here is a `GramOperator`, a SciPy LinearOperator:
    DenseOperator      the matrix in memory                                     2N² flops a product
    DeviceOperator     the matrix as a tensor on another device (`implicit`)    the same, there
    PanelOperator      an array on disk, streamed in row panels (`panels`)      half of the file a product
    FactorOperator     Φ with K = Φ Φᵀ (`implicit`)                             4NP flops
    ImplicitOperator   K as a function, e.g. v -> J(Jᵀ v) (`implicit`)          two sweeps of the model
    ShardedOperator    row panels on several processes (`sharded`)              2N²/ranks flops, one Allgatherv

Shapes: N rows, k columns.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.linalg.blas import dsymv
from scipy.sparse.linalg import LinearOperator

from ntkengine.arguments import number, whole
from ntkengine.errors import InputError
from ntkengine.spectrum.checks import check_size
from ntkengine.spectrum.matrices import EPS, symmetric, told_noise


class GramOperator(LinearOperator):
    """A symmetric N × N matrix through its products, counted.

    Attributes:
        noise: error of the matrix in the spectral norm, as `noise_of` gives it. Unit of K.
        rounding: what one product may be off, relative to ‖K‖·‖x‖: float64's unless the products are coarser.
        products: matrix-vector products so far; a product with k columns counts k.
        passes: times the matrix was gone through; a product with k columns is one pass.
        block: how many columns cost hardly more than one: what a solver should multiply at once.
    """

    def __init__(self, rows: int, noise: float = 0.0, *, block: int = 1, rounding: float = EPS) -> None:
        rows, self.block = whole("rows", rows, 1), whole("block", block, 1)
        self.noise, self.rounding = number("noise", noise, 0), number("rounding", rounding, 0)
        self.products = self.passes = 0
        super().__init__(dtype=np.dtype(np.float64), shape=(rows, rows))  # type: ignore[call-arg]

    @abstractmethod
    def product(self, X: np.ndarray) -> np.ndarray:
        """Return K X, (N, k) float64, of X (N, k) float64."""

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self._matmat(np.reshape(x, (-1, 1)))[:, 0]

    def _matmat(self, X: np.ndarray) -> np.ndarray:
        self.products += X.shape[1]
        self.passes += 1
        return self.product(np.asarray(X, dtype=np.float64))

    def _adjoint(self) -> GramOperator:
        return self


class DenseOperator(GramOperator):
    """A symmetric matrix in memory.

    Attributes:
        matrix: (N, N) float64.
        shown: the noise that differing triangles show.
    """

    def __init__(self, gram: Any) -> None:
        self.matrix, self.shown = symmetric(gram)
        super().__init__(len(self.matrix), max(told_noise(gram), self.shown))

    def product(self, X: np.ndarray) -> np.ndarray:
        """Return K X; a single vector reads one triangle only."""
        if X.shape[1] == 1:
            return dsymv(1.0, self.matrix.T, X[:, 0], lower=1)[:, None]
        return self.matrix @ X


def rounding_of(operator: LinearOperator) -> float:
    """Return what one product may be off, relative to ‖K‖·‖x‖: what the operator tells, else its type's rounding."""
    told = getattr(operator, "rounding", None)
    dtype = np.dtype(operator.dtype)
    return float(told) if told is not None else float(np.finfo(dtype).eps) if dtype.kind == "f" else EPS


def multiply(operator: LinearOperator, X: np.ndarray) -> np.ndarray:
    """Return an operator's product with X, (N, k) float64.

    Raises:
        InputError: products that are complex or not finite.
    """
    Y = operator.matvec(X[:, 0]) if X.shape[1] == 1 else operator.matmat(X)
    if np.iscomplexobj(Y):
        raise InputError("gram: expected real products, got complex ones")
    Y = np.array(Y, dtype=np.float64, order="F").reshape(X.shape)
    if not np.isfinite(Y).all():
        raise InputError("gram: expected finite products, got NaN or infinity")
    return Y


def check_symmetry(
    product: Callable[[np.ndarray], np.ndarray], operator: LinearOperator, random: np.random.Generator
) -> None:
    """Refuse an operator whose products with two random vectors show that it is not symmetric.

    Args:
        product: (N, k) -> (N, k), the operator's.
        operator: for its size and rounding.
        random: of the vectors.

    Raises:
        InputError: not symmetric, or products too large or too small to be squared.

    Cost: two products.
    """
    u, v = X = random.standard_normal((operator.shape[0], 2)).T
    Ku, Kv = product(X.T).T
    check_size("gram", max(float(np.abs(Ku).max()), float(np.abs(Kv).max())))
    size = np.linalg.norm(u) * np.linalg.norm(Kv) + np.linalg.norm(v) * np.linalg.norm(Ku)
    if abs(u @ Kv - v @ Ku) > max(1e-10, 100.0 * rounding_of(operator)) * size:
        raise InputError(f"gram: expected a symmetric operator, got u.Kv = {u @ Kv:.9g} and v.Ku = {v @ Ku:.9g}")
