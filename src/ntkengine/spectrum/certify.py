"""What is known of each eigenvalue, given Ritz pairs and their residuals.

Shapes: N rows, k pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg

from ntkengine.digits import measured
from ntkengine.spectrum.matrices import EPS

_SHOWN = 6  # values that are printed


@dataclass(frozen=True)
class Ritz:
    """Approximate eigenpairs and how far each can be off.

    Attributes:
        values: (k,) float64, ascending. Unit of K.
        vectors: (N, k) float64, orthonormal columns.
        residuals: (k,) ‖K v − θ v‖₂, computed explicitly with the K at hand.
        bounds: (k,) k different eigenvalues of the true K lie within `bounds[i]` of `values[i]`, one for each i,
            multiple eigenvalues counted as often as they occur, provided `noise` bounds ‖K̃ − K‖₂. When `certified`
            they are the k that were asked for, position by position. A sum of what the residuals allow, of
            10·√N·eps·‖K‖ for rounding, and of the noise.
        products: matrix-vector products spent (0 for LAPACK, plus k to check).
        method: "dense", "lanczos" or "shift-invert" (with "BE", of the low end).
        certified: whether it is proved that no eigenvalue was missed.
    """

    values: np.ndarray
    vectors: np.ndarray
    residuals: np.ndarray
    bounds: np.ndarray
    products: int
    method: str
    certified: bool = False

    def __repr__(self) -> str:
        pairs = [measured(*pair) for pair in zip(self.values[::-1], self.bounds[::-1], strict=True)]
        shown = ", ".join(pairs if len(pairs) <= _SHOWN else [*pairs[: _SHOWN - 1], "…", pairs[-1]])
        told = "certified" if self.certified else "not certified"
        return f"Ritz({len(pairs)} values: {shown}; {self.method}, {self.products} products, {told})"


def pair_bounds(values: np.ndarray, residuals: np.ndarray) -> np.ndarray:
    """Return radii around Ritz values of which each holds an eigenvalue of its own.

    A residual r_i alone says that some eigenvalue is within r_i of θ_i, and two Ritz values may point at the same one.
    For a set g of orthonormal Ritz vectors, as many eigenvalues as it has are paired one to one with its values within
    ‖R_g‖_F (Kahan). So pairs whose intervals touch are put into one set, until all sets are apart.

    Args:
        values: (k,) ascending.
        residuals: (k,) norms.

    Returns:
        (k,) radii, >= residuals.

    Source: Parlett 1998, theorem 11.5.1.
    """
    groups = [([i], float(r)) for i, r in enumerate(residuals)]
    merged = True
    while merged:
        merged = False
        kept = groups[:1]
        for members, radius in groups[1:]:
            before, reach = kept[-1]
            if values[before[-1]] + reach >= values[members[0]] - radius:
                kept[-1] = before + members, float(np.hypot(reach, radius))
                merged = True
            else:
                kept.append((members, radius))
        groups = kept
    radii = np.empty(len(values))
    for members, radius in groups:
        radii[members] = radius
    return radii


def certified_bounds(
    matrix: np.ndarray, values: np.ndarray, vectors: np.ndarray, residuals: np.ndarray, norm: float, *, low: bool
) -> np.ndarray | None:
    """Return radii around the Ritz values that hold the k largest (or smallest) eigenvalues position by position.

    With V the Ritz vectors, M = K restricted to what is orthogonal to them, and ρ = ‖KV − VΘ‖_F: if no eigenvalue of M
    is above s, then the i-th largest eigenvalue of K lies between θ_i (Cauchy) and θ_i + x with x(θ_i + x − s) = ρ²
    (inertia of K − (θ_i + x)I through its Schur complement). That M <= s, with s just above the last θ, is proved by a
    Cholesky factorisation of sI − K + V D Vᵀ, whose D moves the Ritz vectors out of the way: it would break down at an
    eigenvalue that was missed.

    Args:
        matrix: (N, N) K.
        values: (k,) Ritz values.
        vectors: (N, k).
        residuals: (k,).
        norm: an upper bound of ‖K‖₂.
        low: the k smallest instead.

    Returns:
        (k,) radii, without rounding of the values and without noise; None when an eigenvalue was missed, or a residual
        is too large to tell.

    Cost: N³/3 flops, N² numbers.
    Source: Haynsworth 1968 (inertia); Rump 2006 (what a completed Cholesky factorisation proves).
    """
    rows = len(matrix)
    if norm == 0.0:
        return np.zeros(len(values))  # K = 0, which leaves no room to factor in
    theta = -values if low else values
    rho = float(np.linalg.norm(residuals))
    s = float(theta.min()) + 2.0 * rho + 10.0 * np.sqrt(rows) * EPS * norm
    moved = theta - s + norm  # on the Ritz vectors the matrix below is ‖K‖
    shifted = (vectors * moved) @ vectors.T
    shifted += matrix if low else -matrix
    shifted[np.diag_indices_from(shifted)] += s
    trace = float(np.abs(shifted.diagonal()).sum()) + float(np.abs(moved).sum())
    try:
        scipy.linalg.cholesky(shifted, lower=True, overwrite_a=True, check_finite=False)
    except np.linalg.LinAlgError:
        return None
    ceiling = s + (rows + 4) * EPS * trace
    short = ceiling - theta
    return 0.5 * (short + np.sqrt(short**2 + 4.0 * rho**2))
