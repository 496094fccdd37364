"""Cholesky of K + ridge·I beyond memory: the factor on disk, a few row panels of it in memory at a time.

Shapes: n rows of K, m right-hand sides, b rows of a panel, o rows an example owns.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike

from ntkengine.arguments import flag, matrix_of, number
from ntkengine.errors import InputError, NonFinite
from ntkengine.ridge.checks import as_columns, check_block
from ntkengine.ridge.direct import CholeskySolution, check_pivots, check_residual, check_unrefined, draw_probes
from ntkengine.ridge.solve import solve_blocks
from ntkengine.spectrum.checks import check_size, check_stored
from ntkengine.spectrum.matrices import EPS, declared_noise


def cholesky_on_disk(
    gram: Any,
    residual: ArrayLike,
    ridge: float,
    block: int = 1,
    *,
    budget_mib: float = 512.0,
    scratch: str | Path | None = None,
    loo: bool = True,
) -> CholeskySolution:
    """Solve (K + ridge·I) dual = residual by Cholesky, K and its factor on disk, with one step of refinement.

    Args:
        gram: (n, n), or a Gram-like whose `.values` is: anything with `shape` and slices. Its upper triangle is
            factored; that the lower one gives the same product with a random vector is seen on the way.
        residual: (n,) or (n, m) float64.
        ridge: >= 0, in the unit of K.
        block: rows an example owns, as in `RidgePath`.
        budget_mib: memory for panels, in MiB; the m vectors come on top.
        scratch: folder for the factor, 8 n² bytes, deleted at the end; default the system's.
        loo: whether to leave examples out as well, which takes as long again; else `loo_residuals` is NaN.

    Returns:
        As `direct.cholesky_solve`.

    Raises:
        InputError: K + ridge·I is not positive definite, K is not symmetric, shapes do not fit, or a budget below four
            rows.
        NonFinite: K is not finite.
        OSError: the disk is full; nothing is left on it.

    Cost: n³/3 flops, n³/(6b)·8 bytes read, with b = budget/(32 n); twice that with `loo`.
    Source: Golub and Van Loan 2013, section 4.2 (left-looking blocks).
    """
    values = matrix_of(gram)
    n, columns = check_stored("gram", values)
    if n != columns:
        raise InputError(f"gram: expected a square matrix (N, N), got shape {(n, columns)}")
    right = as_columns("residual", residual, n)
    block, ridge = check_block(block, *right.shape), number("ridge", ridge, 0)
    flag("loo", loo)
    rows = min(n, int(number("budget_mib", budget_mib, above=0) * 2**20 // (4 * 8 * n)) // block * block)
    if rows < 1:
        need = 4 * 8 * n * block / 2**20
        raise InputError(f"budget_mib: expected at least {need:.3g} for panels of {block} rows, got {budget_mib!r}")
    with tempfile.TemporaryFile(dir=scratch) as file:  # without a name: gone however the process ends
        if hasattr(os, "posix_fallocate"):  # or a full disk would be a bus error in the middle
            os.posix_fallocate(file.fileno(), 0, 8 * n * n)
        R = np.memmap(file, dtype=np.float64, mode="r+", shape=(n, n))
        try:
            factor = _Factor(R, rows)
            factor.fill(values, ridge)
            probes, m = draw_probes(n) if loo else np.empty((n, 0)), right.shape[1]
            solved = factor.solve(np.hstack([right, probes]))
            images = _times(values, np.hstack([solved, factor.x]), ridge, rows)
            factor.check_symmetry(images[:, -1:], values, 2.0 * (declared_noise(gram) or 0.0))
            if loo:
                check_unrefined(probes, images[:, m:-1], ridge)
            dual = solved[:, :m] + factor.solve(right - images[:, :m])
            norm = float(np.linalg.norm(right))
            error = float(np.linalg.norm(right - _times(values, dual, ridge, rows))) / norm if norm else 0.0
            if not np.isfinite(dual).all():
                raise NonFinite(f"ridge {ridge!r}: the dual coefficients are not finite")
            check_residual(error, ridge)
            kept = np.full_like(dual, np.nan)
            if loo:
                blocks = factor.inverse_blocks(block)
                kept = dual / blocks.reshape(-1, 1) if block == 1 else solve_blocks(blocks, dual)
        finally:
            R._mmap.close()  # type: ignore[attr-defined]
        return CholeskySolution(dual, kept, error)


class _Factor:
    """Upper triangular R with RᵀR = K + ridge·I, on disk, in panels of b rows.

    Attributes:
        x: (n, 1) random.
        image: (n, 1) of x under the matrix whose upper triangle was read.
        norm: ‖K + ridge·I‖_F.
    """

    def __init__(self, R: np.ndarray, rows: int) -> None:
        self.R, self.rows, self.n, self.norm = R, rows, len(R), 0.0
        self.x, self.image = np.random.default_rng(0).standard_normal((self.n, 1)), np.zeros((self.n, 1))

    def panels(self) -> Iterator[tuple[int, int]]:
        """Yield (first row, last row + 1) of each panel."""
        for start in range(0, self.n, self.rows):
            yield start, min(start + self.rows, self.n)

    def fill(self, values: Any, ridge: float) -> None:
        """Factor, panel by panel: each subtracts what those before it explain."""
        pivots, trace, squares, largest = np.empty(self.n), 0.0, 0.0, 0.0
        for start, stop in self.panels():
            panel = np.asarray(values[start:stop, start:], dtype=np.float64).copy()
            if not np.isfinite(panel).all():
                bad = start + int(np.flatnonzero(~np.isfinite(panel).all(axis=1))[0])
                raise NonFinite(f"gram: row {bad} has NaN or infinity")
            largest = max(largest, float(np.abs(panel).max()))
            width = stop - start
            panel[np.arange(width), np.arange(width)] += ridge
            trace += float(panel.trace())
            self.image[start:] += panel.T @ self.x[start:stop]
            self.image[start:stop] += panel[:, width:] @ self.x[stop:]
            squares += 2.0 * float(np.vdot(panel, panel)) - float(np.vdot(panel[:, :width], panel[:, :width]))
            for before, end in self.panels():
                if before == start:
                    break
                above = np.array(self.R[before:end, start:])
                panel -= above[:, :width].T @ above
            try:
                corner = scipy.linalg.cholesky(panel[:, :width], check_finite=False)
            except np.linalg.LinAlgError:
                raise InputError(
                    f"ridge: expected a value that makes K + ridge*I positive definite, got {ridge!r}: "
                    f"Cholesky broke down in rows {start} to {stop - 1}"
                ) from None
            pivots[start:stop] = corner.diagonal() ** 2
            self.R[start:stop, start:stop] = corner
            self.R[start:stop, stop:] = _below(corner, panel[:, width:])
        check_size("gram", largest)
        self.norm = float(np.sqrt(squares))
        check_pivots(pivots, trace, self.norm, ridge)

    def check_symmetry(self, image: np.ndarray, values: Any, allowed: float) -> None:
        """Refuse a matrix whose product with x, all entries read, differs by more than rounding from `image`.

        Args:
            image: (n, 1) the product.
            values: for the type it is stored in.
            allowed: difference, beside rounding.
        """
        dtype = np.asarray(values[:1]).dtype
        off = float(np.abs(image - self.image).max())
        if off > allowed + 10.0 * (np.finfo(dtype).eps if dtype.kind == "f" else EPS) * self.norm:
            raise InputError(
                f"gram: expected a symmetric matrix, got triangles whose products with a random vector differ by "
                f"{off:.3g} with the norm {self.norm:.3g}"
            )

    def solve(self, right: np.ndarray) -> np.ndarray:
        """Return (RᵀR)⁻¹ right, two passes over the factor."""
        x = self.forward(right.copy(), 0)
        for start, stop in reversed(list(self.panels())):
            panel = np.array(self.R[start:stop, start:])
            width = stop - start
            x[start:stop] -= panel[:, width:] @ x[stop:]
            x[start:stop] = scipy.linalg.solve_triangular(panel[:, :width], x[start:stop], check_finite=False)
        return x

    def forward(self, x: np.ndarray, first: int) -> np.ndarray:
        """Return R⁻ᵀ x, in place; the rows before `first`, where a panel starts, are zero."""
        for start, stop in self.panels():
            if start < first:
                continue
            panel = np.array(self.R[start:stop, start:])
            width = stop - start
            x[start:stop] = _below(panel[:, :width], x[start:stop])
            x[stop:] -= panel[:, width:].T @ x[start:stop]
        return x

    def inverse_blocks(self, block: int) -> np.ndarray:
        """Return the (n/o, o, o) diagonal blocks of (RᵀR)⁻¹ = R⁻¹R⁻ᵀ."""
        found = []
        for start, stop in self.panels():
            unit = np.zeros((self.n, stop - start))
            unit[start:stop] = np.eye(stop - start)
            columns = self.forward(unit, start).reshape(self.n, -1, block)
            found.append(np.einsum("nia,nib->iab", columns[start:], columns[start:]))
        return np.concatenate(found)


def _below(corner: np.ndarray, right: np.ndarray) -> np.ndarray:
    return scipy.linalg.solve_triangular(corner, right, trans="T", check_finite=False)


def _times(values: Any, X: np.ndarray, ridge: float, rows: int) -> np.ndarray:
    parts = [np.asarray(values[i : i + rows], dtype=np.float64) @ X for i in range(0, len(X), rows)]
    return np.concatenate(parts) + ridge * X
