"""The objective of kernel logistic regression, its derivatives, and full Newton steps on it.

Shapes: n examples, c columns of f (1 for two classes, else one a class), r kept eigenvalues.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import scipy.linalg
from scipy.sparse.linalg import LinearOperator, cg
from scipy.special import expit, log_expit, logsumexp, softmax

from ntkengine.spectrum.matrices import EPS


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
        self.weights, self.f0, self.ridge = weights[:, None], f0, ridge
        self.one = f0.shape[1] == 1
        self.targets = codes[:, None] * 1.0 if self.one else (codes[:, None] == np.arange(f0.shape[1])) * 1.0
        self.width = len(f0) * f0.shape[1] // len(matrix)  # columns of θ: 1 on the full layout
        self.size = self.Phi.shape[1] * self.width

    def discrepancy(self, theta: np.ndarray, matrix: np.ndarray) -> float:
        """Return how far α is from the minimum that θ is taken for.

        The largest of three: of f0 + Kα from f0 + Φθ, entry by entry relative to 1 + |f − f0|; of the probabilities at
        both; and of ridge·α from w·(target − p) at f0 + Kα, relative in the norm.
        """
        f, alpha = self._f(theta), self.pull(theta)
        moved = (matrix @ (alpha / self.ridge).reshape(-1, self.width)).reshape(f.shape)
        whole, norm = self.f0 + moved, float(np.linalg.norm(alpha))
        return max(
            float((np.abs(moved - (f - self.f0)) / (1.0 + np.abs(f - self.f0))).max()),
            float(np.abs(self._p(whole) - self._p(f)).max()),
            float(np.linalg.norm(self.weights * self._missing(whole) - alpha)) / (norm or 1.0),
        )

    def loss(self, theta: np.ndarray) -> float:
        """Return the objective."""
        entropy = -log_expit(self._lead(self._f(theta)))
        return float((self.weights * entropy).sum() + 0.5 * theta @ theta)

    def gradient(self, theta: np.ndarray) -> np.ndarray:
        """Return its gradient."""
        return theta - self._transpose(self.pull(theta))

    def hessian(self, theta: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Return the Hessian's product with v."""
        f, g = self._f(theta), self._f(v) - self.f0
        if self.one:
            curved = expit(f) * expit(-f) * g
        else:  # against the own class, whose p may be 1 but for less than rounding
            p, g = self._p(f), g - (self.targets * g).sum(axis=1, keepdims=True)
            curved = p * (g - (p * g).sum(axis=1, keepdims=True))
        return v + self._transpose(self.weights * curved)

    def pull(self, theta: np.ndarray) -> np.ndarray:
        """Return w·(target − p), (n, c)."""
        return self.weights * self._missing(self._f(theta))

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

    def _lead(self, f: np.ndarray) -> np.ndarray:
        """Return f of the own class less the log of Σ exp f of the others, (n, 1): log(p/(1 − p))."""
        if self.one:
            return np.where(self.targets > 0.0, f, -f)
        others = logsumexp(np.where(self.targets > 0.0, -np.inf, f), axis=1, keepdims=True)
        return (self.targets * f).sum(axis=1, keepdims=True) - others

    def _missing(self, f: np.ndarray) -> np.ndarray:
        """Return target − p, (n, c): that of the own class is what the others have, not the rounding of 1 − p."""
        if self.one:
            return np.where(self.targets > 0.0, expit(-f), -expit(f))
        return np.where(self.targets > 0.0, expit(-self._lead(f)), -self._p(f))

    def _p(self, f: np.ndarray) -> np.ndarray:
        return expit(f) if self.one else softmax(f, axis=1)
