"""Stochastic Lanczos quadrature: tr f(K) and the density of eigenvalues from products with random vectors.

A unit vector z gives zᵀ f(K) z = Σ_j τ_j f(θ_j) in the limit of many Lanczos steps, with θ_j, τ_j from the tridiagonal
matrix of its Krylov space; the mean over probes estimates (1/N) tr f(K). Probes are uniform on the sphere: each sees
every eigenvector, and how far off it is depends on the spectrum alone. Probes of signs can agree, all of them, on not
seeing an eigenvector of few entries.

Shapes: N rows, m probes, s steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import scipy.linalg
import scipy.stats
from scipy.sparse.linalg import LinearOperator

from ntkengine.arguments import whole
from ntkengine.errors import InputError
from ntkengine.spectrum.matrices import EPS
from ntkengine.spectrum.operators import DenseOperator, check_symmetry, multiply

# Of the error bars, which are to hold in 99 %: the normal 99 % of a few probes that lean to one side hold in 96 %.
CONFIDENCE = 0.997
_BETWEEN = 0.25, 0.5, 0.75  # of the way from the lowest node to the next: where the rules beside Gauss's have a node

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

    def means(self, f: Function) -> np.ndarray:
        """Return Σ_j τ_j f(θ_j) of each probe, (m, ...): estimates of (1/N) tr f(K).

        Args:
            f: (s,) eigenvalues -> (s, ...).
        """
        return np.array([_apply(f, a, b[:-1]) for a, b in self.pairs()])

    def deviation(self, f: Function) -> np.ndarray:
        """Return the least standard deviation that `means` of f can have, (...).

        A few probes may all happen to be short of the one direction that matters, and then agree too well. But every
        Ritz value stands for an eigenvalue, of which each adds 2 (f(λ) − mean f)² / N² to the variance.
        """
        return self._deviation(f, [_nodes(a, b[:-1])[0] for a, b in self.pairs()], self.means(f).mean(axis=0))

    def _deviation(self, f: Function, nodes: list[np.ndarray], mean: np.ndarray) -> np.ndarray:
        return np.sqrt(2.0 * np.mean([np.square(f(x) - mean).sum(axis=0) for x in nodes], axis=0)) / self.rows

    def limits(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Return (x, least, largest) of each probe: of its share at or below any number from x[i] to x[i + 1].

        The sum of a rule's weights below a node, and with it, enclose the share below that node in the limit of many
        steps; this holds for Gauss–Radau rules as well, whose nodes lie between.

        Source: Szegő 1939, section 3.41 (Chebyshev, Markov and Stieltjes).
        """
        found = []
        for a, b in self.pairs():
            nodes, weights = _nodes(a, b[:-1])
            rules, open_ = [(nodes, weights)], 1
            if b[-1] == 0.0:
                open_ = 0  # the Krylov space is closed: the rule is the measure
            elif len(nodes) > 1:
                rules += [_radau(a, b, (1.0 - f) * nodes[0] + f * nodes[1]) for f in _BETWEEN]
            x = np.sort(np.concatenate([[-np.inf], *(nodes for nodes, _ in rules)]))
            least, largest = np.zeros(len(x)), np.ones(len(x))
            for nodes, weights in rules:
                share, at = np.r_[0.0, np.cumsum(weights)], np.searchsorted(nodes, x, side="right")
                least = np.maximum(least, share[np.maximum(at - open_, 0)])
                largest = np.minimum(largest, share[np.minimum(at + open_, len(nodes))])
            found.append((x, least, largest))
        return found

    def below(self, x: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the least and the largest share of each probe's measure that can lie at or below x, (m,) each."""
        limits = self.limits()
        at = [int(np.searchsorted(nodes, x, side="right")) - 1 for nodes, _, _ in limits]
        found = np.array([(least[i], largest[i]) for i, (_, least, largest) in zip(at, limits, strict=True)])
        return found[:, 0], found[:, 1]

    def hats(self, f: Function, peaks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the least and the largest Σ_j τ_j f(θ_j) of each probe in the limit of many steps, (m, k) each.

        Args:
            f: (s,) eigenvalues -> (s, k), each column rising from 0 at −∞ to its peak and falling to 0 from there.
            peaks: (k,) where.
        """
        low, high = [], []
        top = f(peaks).diagonal()
        for x, least, largest in self.limits():
            values, before, at = f(x), x[:, None] < peaks, np.searchsorted(x, peaks, side="right") - 1
            left, right = np.where(before, values, 0.0), np.where(before, 0.0, values)
            slow, fast = np.diff(least, prepend=0.0), np.diff(largest, prepend=0.0)
            # Left of a peak the slowest distribution gives the largest sum, right of it the fastest.
            gap = (largest[at] - least[at]) * top
            high.append(slow @ left + fast @ right + gap)
            low.append(np.maximum(fast @ left + slow @ right - gap, 0.0))
        return np.array(low), np.array(high)

    def floor(self, f: Function, left: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the Gauss–Radau rule with a node at `left` <= λ_min of each probe, (m, ...), and their `deviation`.

        For f with f'' < 0 and derivatives of alternating sign, such as log(λ + c) or λ/(λ + c), it is below the true
        quadratic form and `means` above.

        Raises:
            InputError: a Ritz value below `left`.
        """
        rules = []
        for a, b in self.pairs():
            lowest = scipy.linalg.eigh_tridiagonal(a, b[:-1], eigvals_only=True, select="i", select_range=(0, 0))[0]
            closed = b[-1] <= EPS * self.scale * np.sqrt(self.rows)  # the Krylov space is invariant: the rule is exact
            if lowest < left or (lowest == left and not closed):
                raise InputError(f"gram: expected no eigenvalue below {left:.3g}, found one at {lowest:.3g} or below")
            if closed:
                rules.append(_nodes(a, b[:-1]))
                continue
            rules.append(_radau(a, b, left))
        found = np.array([np.tensordot(weights, f(nodes), axes=1) for nodes, weights in rules])
        return found, self._deviation(f, [nodes for nodes, _ in rules], found.mean(axis=0))

    def pairs(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return (diagonal, couplings) of each probe."""
        return list(zip(self.diagonals, self.couplings, strict=True))


def quadrature(operator: LinearOperator, probes: int = 16, steps: int = 80, seed: int = 0) -> Quadrature:
    """Run Lanczos with full reorthogonalisation from random unit vectors.

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
    probes, steps, seed = sampling(probes, steps, seed)
    rng, steps = np.random.default_rng(seed), min(steps, n)
    if not isinstance(operator, DenseOperator):  # which has looked at every entry
        check_symmetry(partial(multiply, operator), operator, np.random.default_rng(seed))
    diagonals: list[np.ndarray] = []
    couplings: list[np.ndarray] = []
    scale = 0.0
    while len(diagonals) < probes:
        width = min(getattr(operator, "block", 1), probes - len(diagonals))
        V = np.zeros((width, steps + 1, n))
        start = rng.standard_normal((width, n))
        V[:, 0] = start / np.linalg.norm(start, axis=1, keepdims=True)
        alpha, beta, length = np.zeros((width, steps)), np.zeros((width, steps)), np.full(width, steps)
        for j in range(steps):
            going = np.flatnonzero(length == steps)
            if not going.size:  # every Krylov space is closed
                break
            W = np.zeros((width, n))
            W[going] = multiply(operator, np.ascontiguousarray(V[going, j].T)).T
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


def sampling(probes: Any, steps: Any, seed: Any) -> tuple[int, int, int]:
    """Return the arguments of `quadrature`, checked."""
    return whole("probes", probes, 2), whole("steps", steps, 1), whole("seed", seed)


def spread(values: np.ndarray, least: np.ndarray) -> np.ndarray:
    """Return the half-width of the 99 % confidence interval of a mean over the first axis (Student's t, a bit more).

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


def _radau(diagonal: np.ndarray, couplings: np.ndarray, node: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the nodes and weights of the Gauss–Radau rule with one node given, which is no Ritz value."""
    banded = np.zeros((3, len(diagonal)))
    banded[0, 1:], banded[1], banded[2, :-1] = couplings[:-1], diagonal - node, couplings[:-1]
    unit = np.zeros(len(diagonal))
    unit[-1] = couplings[-1] ** 2
    last = node + scipy.linalg.solve_banded((1, 1), banded, unit)[-1]
    return _nodes(np.r_[diagonal, last], couplings)


def _apply(f: Function, diagonal: np.ndarray, off: np.ndarray) -> np.ndarray:
    values, weights = _nodes(diagonal, off)
    return np.tensordot(weights, f(values), axes=1)
