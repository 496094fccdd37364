"""Low-rank approximations F Fᵀ ≈ K from a few columns: partial Cholesky with random pivots.

Shapes: n rows of K, r columns of F.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike

from ntkengine.arguments import number, real_array, whole
from ntkengine.errors import InputError
from ntkengine.spectrum.checks import check_size
from ntkengine.spectrum.operators import EPS

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
    start = real_array("diagonal", diagonal).astype(np.float64)
    if start.ndim != 1 or not start.size or not np.isfinite(start).all() or (start < 0).any():
        raise InputError("diagonal: expected (n,) finite numbers >= 0")
    check_size("diagonal", float(start.max()))
    n, trace = len(start), float(start.sum())
    rank, block = min(whole("rank", rank, 1), n), whole("block", block, 1)
    tol, noise, rng = number("tol", tol, 0), number("noise", noise, 0), np.random.default_rng(whole("seed", seed))
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
