"""Stochastic Lanczos quadrature: tr f(K) and the density of eigenvalues from products with random vectors.

A probe z with entries ±1 gives zᵀ f(K) z = N Σ_j τ_j f(θ_j) in the limit of many Lanczos steps, with θ_j, τ_j from the
tridiagonal matrix of its Krylov space; the mean over probes estimates tr f(K).

Shapes: N rows, m probes, s steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.stats
from scipy.sparse.linalg import LinearOperator

from ntkengine.errors import InputError
from ntkengine.spectrum.operators import EPS, DenseOperator, check_symmetry

CONFIDENCE = 0.99  # of the error bars

Function = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Quadrature:
    """The tridiagonal matrices of m probes.

    Attributes:
        rows: N.
        diagonals: m arrays of up to s numbers.
        couplings: m arrays as long: β_1 .. β_s, the last one towards the next, unmade vector; 0 when there is none.
        scale: the largest |Ritz value|.
    """

    rows: int
    diagonals: list[np.ndarray]
    couplings: list[np.ndarray]
    scale: float

    def means(self, f: Function, steps: int | None = None) -> np.ndarray:
        """Return Σ_j τ_j f(θ_j) of each probe, (m, ...): estimates of (1/N) tr f(K).

        Args:
            f: (s,) eigenvalues -> (s, ...).
            steps: use only the first so many.
        """
        return np.array([_apply(f, a[:steps], b[: len(a[:steps]) - 1]) for a, b in self.pairs()])

    def deviation(self, f: Function) -> np.ndarray:
        """Return the least standard deviation that `means` of f can have over sign probes, (...).

        A few probes may all happen to be short of the one direction that matters, and then agree too well. But every
        Ritz value stands for an eigenvalue, of which each, unless its vector has but a few entries, adds
        2 (f(λ) − mean f)² / N² to the variance.
        """
        mean = self.means(f).mean(axis=0)
        of_each = [np.square(f(_nodes(a, b[:-1])[0]) - mean).sum(axis=0) for a, b in self.pairs()]
        return np.sqrt(2.0 * np.mean(of_each, axis=0)) / self.rows

    def floor(self, f: Function, left: float) -> np.ndarray:
        """Return the Gauss–Radau rule with a node at `left` <= λ_min of each probe, (m, ...).

        For f with f'' < 0 and derivatives of alternating sign, such as log(λ + c) or λ/(λ + c), it is below the true
        quadratic form and `means` above.

        Raises:
            InputError: a Ritz value below `left`.
        """
        found = []
        for a, b in self.pairs():
            lowest = scipy.linalg.eigh_tridiagonal(a, b[:-1], eigvals_only=True, select="i", select_range=(0, 0))[0]
            if lowest <= left:
                raise InputError(f"gram: expected no eigenvalue below {left:.3g}, found one at {lowest:.3g} or below")
            if b[-1] <= EPS * self.scale * np.sqrt(self.rows):  # the Krylov space is invariant: the rule is exact
                found.append(_apply(f, a, b[:-1]))
                continue
            shifted = np.zeros((2, len(a)))
            shifted[0, 1:], shifted[1] = b[:-1], a - left
            unit = np.zeros(len(a))
            unit[-1] = b[-1] ** 2
            last = left + scipy.linalg.solveh_banded(shifted, unit)[-1]
            found.append(_apply(f, np.r_[a, last], b))
        return np.array(found)

    def pairs(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return (diagonal, couplings) of each probe."""
        return list(zip(self.diagonals, self.couplings, strict=True))


def quadrature(operator: LinearOperator, probes: int = 16, steps: int = 80, seed: int = 0) -> Quadrature:
    """Run Lanczos with full reorthogonalisation from random sign vectors.

    Args:
        operator: symmetric, (N, N).
        probes: m, >= 2.
        steps: s, >= 1.
        seed: of the probes.

    Returns:
        What every tr f(K) can be read from.

    Raises:
        InputError: bad argument, an operator that is not symmetric, or products that are not finite.

    Cost: m·s products, taken `operator.block` at a time; 4Ns flops a product, N·s·block numbers.
    Source: Ubaru, Chen and Saad 2017; Golub and Meurant 2010 (Gauss–Radau).
    """
    n = operator.shape[0]
    if probes < 2 or steps < 1:
        raise InputError(f"probes, steps: expected at least 2 and 1, got {probes!r} and {steps!r}")
    rng, steps = np.random.default_rng(seed), min(int(steps), n)
    if not isinstance(operator, DenseOperator):  # which has looked at every entry
        check_symmetry(operator.matmat, operator, np.random.default_rng(seed))
    diagonals: list[np.ndarray] = []
    couplings: list[np.ndarray] = []
    scale = 0.0
    while len(diagonals) < probes:
        width = min(getattr(operator, "block", 1), probes - len(diagonals))
        V = np.zeros((width, steps + 1, n))
        V[:, 0] = rng.choice([-1.0, 1.0], size=(width, n)) / np.sqrt(n)
        alpha, beta, length = np.zeros((width, steps)), np.zeros((width, steps)), np.full(width, steps)
        for j in range(steps):
            going = np.flatnonzero(length == steps)
            if not going.size:  # every Krylov space is closed
                break
            W = np.zeros((width, n))
            W[going] = np.asarray(operator.matmat(np.ascontiguousarray(V[going, j].T))).T
            if not np.isfinite(W).all():
                raise InputError("gram: expected finite products, got NaN or infinity")
            for i in map(int, going):
                w, basis = W[i], V[i, : j + 1]
                for turn in range(2):
                    h = basis @ w
                    w = w - h @ basis
                    alpha[i, j] += h[-1]
                    if not turn:
                        scale = max(scale, abs(float(h[-1])), float(np.linalg.norm(h)))
                beta[i, j] = np.linalg.norm(w)
                if beta[i, j] <= np.sqrt(n) * EPS * scale:
                    beta[i, j], length[i] = 0.0, j + 1
                else:
                    V[i, j + 1] = w / beta[i, j]
        for i in range(width):
            diagonals.append(alpha[i, : length[i]])
            couplings.append(beta[i, : length[i]])
    return Quadrature(n, diagonals, couplings, scale)


def spread(values: np.ndarray, least: np.ndarray) -> np.ndarray:
    """Return the half-width of the 99 % confidence interval of a mean over the first axis (Student's t).

    Args:
        values: (m, ...).
        least: (...) standard deviation that they have at least, whatever theirs is.
    """
    m = len(values)
    deviation = np.maximum(values.std(axis=0, ddof=1), least)
    return scipy.stats.t.ppf(0.5 + 0.5 * CONFIDENCE, m - 1) * deviation / np.sqrt(m)


def _nodes(diagonal: np.ndarray, off: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the nodes and weights of the Gauss rule."""
    values, vectors = scipy.linalg.eigh_tridiagonal(diagonal, off)
    return values, vectors[0] ** 2


def _apply(f: Function, diagonal: np.ndarray, off: np.ndarray) -> np.ndarray:
    values, weights = _nodes(diagonal, off)
    return np.tensordot(weights, f(values), axes=1)
