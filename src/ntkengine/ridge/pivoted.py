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
from ntkengine.spectrum.matrices import EPS

Columns = Callable[[np.ndarray], np.ndarray]

_UNTOLD = 1e-4  # of the diagonal: noise that nobody told of, beyond it K is no positive semi-definite matrix
_OFF = 0.02  # of a diagonal entry, between two ways to it: bfloat16 gradients differ by some 3e-3


@dataclass(frozen=True)
class LowRank:
    """K̂ = F Fᵀ with 0 <= K̂ <= K, for a K that is exact; else up to its noise, which few pivots can amplify.

    Attributes:
        factor: (n, r) float64 F.
        pivots: (r,) rows whose columns of K were read; K̂ equals K there.
        residual: (n,) diagonal of K − K̂, >= 0.
        trace: tr K.
        noise: of an entry of K − K̂: what was told, or more, as far as the columns show it: residuals that came out
            negative, and what is no pivot for its rounding.
    """

    factor: np.ndarray
    pivots: np.ndarray
    residual: np.ndarray
    trace: float
    noise: float = 0.0

    @property
    def error(self) -> float:
        """Return tr(K − K̂) + n·noise, which bounds ‖K − K̂‖₂ where K is positive semi-definite but for noise.

        What the columns that were read show of a K that is not is refused; the others nobody has seen. Unit of K.
        """
        return float(self.residual.sum() + len(self.residual) * self.noise)


def random_cholesky(
    columns: Columns,
    diagonal: ArrayLike,
    rank: int,
    *,
    block: int = 64,
    tol: float = 0.0,
    noise: float = 0.0,
    seed: int = 0,
    shift: float = 0.0,
) -> LowRank:
    """Return a partial Cholesky factorisation of K whose pivots are drawn by the residual diagonal.

    Only the drawn columns of K are ever asked for, `block` at a time. Of a block of candidates drawn at once, each is
    kept with the probability its residual has left after those before it: the same distribution as one by one.

    Args:
        columns: (b,) ascending row indices -> (n, b) those columns of K. `gram.features.Landmarks`
            makes them from a model.
        diagonal: (n,) of K, >= 0.
        rank: columns to keep at most, r.
        block: candidates drawn at once.
        tol: stop when tr(K − K̂) <= tol · tr K.
        noise: of K in the spectral norm: what is left below it is no pivot.
        seed: of the draws.
        shift: K + shift·I is what must be positive semi-definite, for a preconditioner of it; then `error` bounds
            nothing.

    Returns:
        The factor; fewer columns than `rank` when K is exhausted to its rounding or noise, or `tol` reached.

    Raises:
        InputError: bad argument, columns of another shape, not finite, at odds with the diagonal, or of no positive
            semi-definite matrix: |K_ij|² > K_ii·K_jj, or a negative residual, beyond the noise, how far they are off
            the diagonal, and 1e-4 of its largest entry.

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
    below = noise + number("shift", shift, 0)
    F, residual, pivots = np.zeros((n, rank), order="F"), start.copy(), np.empty(rank, dtype=np.int64)
    rounding = 10.0 * n * EPS * float(start.max())
    floor = max(rounding, noise)
    kept, seen, shown = 0, _UNTOLD, 0.0  # how far columns may be off, relative to the diagonal, and what shows
    if not trace:  # no pivot will be looked at
        some = np.sort(rng.choice(n, size=min(block, n), replace=False))
        _refuse_large(_checked(columns(some), start, some)[0], start, some, below, seen)
    while kept < rank and residual.sum() > max(tol * trace, n * floor):
        order = rng.choice(n, size=min(block, rank - kept), p=residual / residual.sum())
        drawn, places = np.unique(order, return_inverse=True)
        K, off = _checked(columns(drawn), start, drawn)
        seen = max(seen, off)
        _refuse_large(K, start, drawn, below, seen)
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
        smallest, largest = float(L.diagonal().min()) ** 2, float(start.max())
        grown = 1.0 + (largest / smallest) ** 0.5  # an error of the columns comes back divided by a pivot's root
        lowest = 10.0 * (below + seen * largest) * grown
        if left.min() < -lowest:
            bad = int(np.argmin(left))
            raise InputError(
                f"columns: expected those of a positive semi-definite matrix, row {bad} is left with {left[bad]:.3g} "
                f"on the diagonal; less than {-lowest:.3g} is no error of theirs"
            )
        if left.min() < -rounding:
            shown = max(shown, -float(left.min()))
        if left.min() < -floor - 0.1 * smallest:  # F Fᵀ would be more than K is: that pivot was noise
            floor = 2.0 * max(floor, smallest)
            continue
        F[:, kept : kept + len(rows)] = new
        pivots[kept : kept + len(rows)] = rows
        kept += len(rows)
        residual = np.maximum(left, 0.0)
        residual[rows] = 0.0
    return LowRank(np.ascontiguousarray(F[:, :kept]), pivots[:kept], residual, trace, max(shown, noise, rounding))


def _checked(found: np.ndarray, diagonal: np.ndarray, drawn: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the columns in float64, and how far they are off the diagonal, relative to it."""
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
    return K, float((off / np.where(diagonal[drawn] > 0.0, diagonal[drawn], 1.0)).max())


def _refuse_large(K: np.ndarray, diagonal: np.ndarray, drawn: np.ndarray, below: float, seen: float) -> None:
    """Refuse columns with |K_ij| above √(K_ii K_jj), which those of a positive semi-definite matrix never are."""
    root = np.sqrt(diagonal + (below + seen * float(diagonal.max())))
    bound = np.outer(root, root[drawn])
    over = np.abs(K) - bound * (1.0 + 10.0 * seen)
    if (over > 0.0).any():
        i, j = np.unravel_index(int(np.argmax(over)), over.shape)
        raise InputError(
            f"columns: expected those of a positive semi-definite matrix, entry ({i}, {drawn[j]}) is {K[i, j]:.6g} "
            f"where the diagonal allows {bound[i, j]:.6g}"
        )


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
