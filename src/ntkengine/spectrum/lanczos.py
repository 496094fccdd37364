"""Extreme eigenpairs with a bound on each: LAPACK while it is quicker, Lanczos beyond.

Shapes: N rows, k wanted pairs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import scipy.linalg

from ntkengine.arguments import choice, flag, number, whole
from ntkengine.errors import InputError, NotConverged
from ntkengine.spectrum.certify import Ritz, certified_bounds, pair_bounds
from ntkengine.spectrum.inverse import smallest
from ntkengine.spectrum.krylov import Krylov
from ntkengine.spectrum.matrices import EPS, noise_of
from ntkengine.spectrum.operators import DenseOperator
from ntkengine.spectrum.panels import IN_MEMORY, operator_of

# Where LAPACK is quicker (one core, measured): the top pairs of an empirical NTK take Lanczos about 120 products at any
# N; the bottom ones take one Cholesky factorisation or two and some 300 solves in blocks.
_DENSE_TOP, _DENSE_BOTTOM = 200, 1000
_DENSE_ROWS = IN_MEMORY  # LAPACK steps in where Lanczos stalls


def eigsh(
    gram: Any,
    k: int = 20,
    which: str = "LA",
    tol: float = 1e-8,
    max_products: int | None = None,
    seed: int = 0,
    method: str = "auto",
    block: int | None = None,
    certify: bool = False,
) -> Ritz:
    """Return k extreme eigenpairs of a symmetric Gram, each with its bound.

    A pair counts as converged when ‖K v − θ v‖ <= max(tol·|θ|, 10·√N·eps·‖K‖₂, noise/10): relative to its own
    eigenvalue, not to the outlier that an empirical NTK usually has, and never tighter than the arithmetic or the Gram.

    Multiple eigenvalues: a Krylov space holds as many copies of each eigenvalue as its block has vectors. After
    convergence the search is therefore restarted from random directions orthogonal to what was found, until a restart
    whose own extreme pair has converged changes nothing. That finds further copies with probability one in exact
    arithmetic. `certify=True` proves it, as does `method="dense"`.

    Args:
        gram: (N, N) array-like, Gram-like object, or a symmetric LinearOperator (float64 products). A Gram on disk of
            more than 12,000 rows is streamed (`PanelOperator`, 512 MiB).
        k: number of pairs, 1 <= k <= N.
        which: "LA" largest, "SA" smallest, "BE" both ends (k//2 from the low end, the rest from the high end).
        tol: relative tolerance, > 0.
        max_products: Lanczos only; default max(1000, 4 N).
        seed: of the random start vectors; same seed, same result.
        method: "dense" (LAPACK), "lanczos", "shift-invert" (low end: Lanczos on the inverse from a Cholesky
            factorisation), or "auto": for a matrix LAPACK up to 200 rows (1,000 for the low end) or when k is above
            N/5, else Lanczos for the high end and shift-invert for the low end, and LAPACK again where these stall (up
            to 12,000 rows, unless `max_products` is given). An operator has Lanczos only, which at the low end of a
            Gram rarely converges, and then says so.
        block: vectors multiplied at once; default what the operator likes: 1 in memory, 8 on disk. The larger, the
            fewer passes over the matrix and the more products.
        certify: prove, by one more Cholesky factorisation, that no eigenvalue was missed; needs a matrix. If one was,
            LAPACK is used, or with another `method` NotConverged raised.

    Returns:
        The pairs, values ascending.

    Raises:
        InputError: bad argument, or an operator that is not symmetric or not finite.
        NotConverged: products used up; `.partial` holds the Ritz pairs so far, `.residual` the largest residual.

    Cost: dense about (4/3)N³ + 4N²k flops and N² extra memory; Lanczos 2N² a product plus 8Nm a step to
        orthogonalise, and N·m numbers with m = max(2k + 20, 40, k + 8·block); shift-invert and certificate N³/3 each.
    Source: Wu and Simon 2000 (thick restart); Parlett 1998, theorems 4.5.1 and 11.5.1 (bounds).
    """
    operator = operator_of(gram, _DENSE_ROWS)
    matrix = operator.matrix if isinstance(operator, DenseOperator) else None
    rows, noise = operator.shape[0], noise_of(operator)
    k, tol, seed = whole("k", k, 1, rows), number("tol", tol, above=0, below=1), whole("seed", seed)
    choice("which", which, ("LA", "SA", "BE"))
    choice("method", method, ("auto", "dense", "lanczos", "shift-invert"))
    limit = max(1000, 4 * rows) if max_products is None else whole("max_products", max_products, 1)
    width = getattr(operator, "block", 1) if block is None else whole("block", block, 1)
    flag("certify", certify)
    if method == "shift-invert" and which == "LA":
        raise InputError("method: 'shift-invert' is for the low end, which='SA' or 'BE'")
    low = {"LA": 0, "SA": k, "BE": k // 2}[which]
    if matrix is None:
        for hit, what in ((method in ("dense", "shift-invert"), f"method: {method!r}"), (certify, "certify")):
            if hit:
                raise InputError(f"{what} needs a matrix, got a LinearOperator")
        return Krylov(operator, k, which, tol, limit, seed, noise, width).run()
    if method == "dense" or (method == "auto" and (rows <= (_DENSE_BOTTOM if low else _DENSE_TOP) or 5 * k > rows)):
        return _dense(matrix, k, which, noise)
    fallback = method == "auto" and max_products is None and rows <= _DENSE_ROWS
    if fallback:
        limit = 200 + int(0.4 * rows)  # about LAPACK's cost in products, measured at N = 3,000
    try:
        if not low or method == "lanczos":
            found = Krylov(operator, k, which, tol, limit, seed, noise, width).run()
        else:
            found = smallest(matrix, low, tol, limit, seed, noise)
            if k > low:
                top = Krylov(operator, k - low, "LA", tol, limit, seed, noise, width).run()
                found = _joined(found, top, matrix, noise)
        return _certified(found, matrix, low, noise) if certify else found
    except NotConverged:
        if not fallback:
            raise
        return _dense(matrix, k, which, noise)


def _dense(matrix: np.ndarray, k: int, which: str, noise: float) -> Ritz:
    rows = len(matrix)
    low, high = {"LA": (0, k), "SA": (k, 0), "BE": (k // 2, k - k // 2)}[which]
    picked = np.r_[0:low, rows - high : rows]
    found = None if low and high else _part(matrix, int(picked[0]), int(picked[-1]))
    if found is None:
        values, vectors = scipy.linalg.eigh(matrix, driver="evd")
        found = values[picked], vectors[:, picked]
    values, vectors = found
    residuals = np.linalg.norm(matrix @ vectors - vectors * values, axis=0)
    # ‖K‖₂ <= the largest absolute row sum.
    rounding = 10.0 * np.sqrt(rows) * EPS * float(scipy.linalg.norm(matrix, np.inf))
    return Ritz(values, vectors, residuals, residuals + rounding + noise, k, "dense", certified=True)


def _part(matrix: np.ndarray, first: int, last: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the pairs from `first` to `last`; None where LAPACK lost some: in tight clusters its bisection does."""
    try:
        values, vectors = scipy.linalg.eigh(matrix, subset_by_index=[first, last])
    except np.linalg.LinAlgError:
        return None
    return (values, vectors) if len(values) == last - first + 1 else None


def _joined(low: Ritz, high: Ritz, matrix: np.ndarray, noise: float) -> Ritz:
    """Return both ends, their vectors made orthogonal to each other."""
    basis = np.linalg.qr(np.hstack([low.vectors, high.vectors]))[0]
    images = matrix @ basis
    values, S = scipy.linalg.eigh(basis.T @ images)
    vectors = basis @ S
    residuals = np.linalg.norm(images @ S - vectors * values, axis=0)
    rounding = 10.0 * np.sqrt(len(matrix)) * EPS * float(scipy.linalg.norm(matrix, np.inf))
    bounds = pair_bounds(values, residuals) + rounding + noise
    products = low.products + high.products + len(values)
    return Ritz(values, vectors, residuals, bounds, products, low.method)


def _certified(ritz: Ritz, matrix: np.ndarray, low: int, noise: float) -> Ritz:
    """Return the pairs with positional bounds; NotConverged when an eigenvalue was missed."""
    norm = float(scipy.linalg.norm(matrix, np.inf))
    rounding = 10.0 * np.sqrt(len(matrix)) * EPS * norm
    bounds = np.empty(len(ritz.values))
    for part, bottom in ((slice(0, low), True), (slice(low, None), False)):
        if not len(bounds[part]):
            continue
        radii = certified_bounds(
            matrix, ritz.values[part], ritz.vectors[:, part], ritz.residuals[part], norm, low=bottom
        )
        if radii is None:
            message = "eigsh: an eigenvalue was missed, or the residuals are too large to exclude it"
            raise NotConverged(message, partial=ritz, residual=float(ritz.residuals.max()))
        bounds[part] = radii + rounding + noise
    return replace(ritz, bounds=bounds, certified=True)
