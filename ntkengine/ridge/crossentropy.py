"""The objective of kernel logistic regression, its derivatives, and full Newton steps on it.

Shapes: n examples, c columns of f (1 for two classes, else one a class), r kept eigenvalues.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import scipy.linalg
from scipy.sparse.linalg import LinearOperator, cg
from scipy.special import expit, log_expit, log_softmax, softmax

from ntkengine.spectrum.operators import EPS


class CrossEntropy:
    """Σ w·(cross-entropy) + ½ ‖θ‖² over θ with f = f0 + Φθ, Φ = U√(Λ/ridge): units in which K's does not matter.

    Eigenvalues at or below rounding, and negative ones, are left out.

    Args:
        matrix: (n, n), or (n·c, n·c) for one kernel over all (example, column) pairs.
        codes: (n,) classes as integers.
        weights: (n,).
        f0: (n, c).
        ridge: > 0, in the unit of K.

    Attributes:
        values: eigenvalues of K, ascending.
        rounding: what they may be off.
        size: of θ.

    Cost: 9 rows³ flops once, 4·rows·r·(columns of θ) a gradient or product of the Hessian.
    """

    def __init__(
        self, matrix: np.ndarray, codes: np.ndarray, weights: np.ndarray, f0: np.ndarray, ridge: float
    ) -> None:
        self.values, vectors = scipy.linalg.eigh(matrix)
        self.rounding = len(matrix) * EPS * float(np.abs(self.values).max())
        kept = self.values > self.rounding
        self.Phi = vectors[:, kept] * np.sqrt(self.values[kept] / ridge)
        self.codes, self.weights, self.f0, self.ridge = codes, weights[:, None], f0, ridge
        self.one = f0.shape[1] == 1
        self.targets = codes[:, None] * 1.0 if self.one else (codes[:, None] == np.arange(f0.shape[1])) * 1.0
        self.width = len(f0) * f0.shape[1] // len(matrix)  # columns of θ: 1 on the full layout
        self.size = self.Phi.shape[1] * self.width

    def discrepancy(self, theta: np.ndarray, matrix: np.ndarray) -> float:
        """Return how far f0 + Kα is from f0 + Φθ, relative to 1 + |f|."""
        f = self._f(theta)
        whole = self.f0 + (matrix @ (self.pull(theta) / self.ridge).reshape(-1, self.width)).reshape(f.shape)
        return float(np.abs(whole - f).max() / (1.0 + np.abs(f).max()))

    def loss(self, theta: np.ndarray) -> float:
        """Return the objective."""
        f = self._f(theta)
        if self.one:
            entropy = -(self.targets * log_expit(f) + (1.0 - self.targets) * log_expit(-f))
        else:
            entropy = -(self.targets * log_softmax(f, axis=1)).sum(axis=1, keepdims=True)
        return float((self.weights * entropy).sum() + 0.5 * theta @ theta)

    def gradient(self, theta: np.ndarray) -> np.ndarray:
        """Return its gradient."""
        return theta - self._transpose(self.pull(theta))

    def hessian(self, theta: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Return the Hessian's product with v."""
        p, g = self._p(self._f(theta)), self._f(v) - self.f0
        curved = p * (1.0 - p) * g if self.one else p * (g - (p * g).sum(axis=1, keepdims=True))
        return v + self._transpose(self.weights * curved)

    def pull(self, theta: np.ndarray) -> np.ndarray:
        """Return w·(target − p), (n, c)."""
        return self.weights * (self.targets - self._p(self._f(theta)))

    def polished(self, theta: np.ndarray) -> np.ndarray:
        """Return θ after full Newton steps while they help: the trust region stops where the loss no longer changes."""
        size = float(np.linalg.norm(self.gradient(theta)))
        for _ in range(5):
            gradient = self.gradient(theta)
            H = LinearOperator((self.size, self.size), matvec=partial(self.hessian, theta), dtype=np.float64)
            step, _ = cg(H, gradient, rtol=1e-10, maxiter=10 * self.size)  # as far as it goes
            smaller = float(np.linalg.norm(self.gradient(theta - step)))
            if not smaller < 0.5 * size:
                break
            theta, size = theta - step, smaller
        return theta

    def _f(self, theta: np.ndarray) -> np.ndarray:
        return self.f0 + (self.Phi @ theta.reshape(-1, self.width)).reshape(self.f0.shape)

    def _transpose(self, f: np.ndarray) -> np.ndarray:
        return (self.Phi.T @ f.reshape(-1, self.width)).reshape(-1)

    def _p(self, f: np.ndarray) -> np.ndarray:
        return expit(f) if self.one else softmax(f, axis=1)
