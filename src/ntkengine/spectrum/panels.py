"""A Gram on disk, larger than memory: products by streaming one triangle, reading while multiplying.

Shapes: N rows, k columns, h rows of a panel.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from scipy.sparse.linalg import LinearOperator
from scipy.stats import chi2

from ntkengine.arguments import matrix_of, number
from ntkengine.errors import InputError
from ntkengine.spectrum.checks import check_size, check_stored
from ntkengine.spectrum.implicit import ImplicitOperator
from ntkengine.spectrum.matrices import EPS, declared_noise
from ntkengine.spectrum.operators import DenseOperator, GramOperator

IN_MEMORY = 12_000  # rows: 1.2 GB in float64
_PANEL_BYTES = 64 << 20  # a longer read is no faster
_PROBES, _CHANCE = 8, 1e-3  # random vectors that triangles are compared on, and what they may miss
_ROWS, _COLUMNS = 128, 512  # turned to float64 at a time: half a MiB, which stays in the second-level cache


def operator_of(gram: Any, in_memory: int = IN_MEMORY) -> LinearOperator:
    """Return a Gram as an operator: itself, streamed when on disk and large, else in memory.

    Args:
        gram: LinearOperator, (N, N) array-like, Gram-like, or a function with `rows` as `ImplicitOperator.of` takes.
        in_memory: rows up to which a stored matrix is read into memory.

    Raises:
        InputError: what is neither a square operator of real products nor a matrix that `as_matrix` takes.
    """
    if isinstance(gram, LinearOperator):
        if gram.shape[0] != gram.shape[1] or not gram.shape[0]:
            raise InputError(f"gram: expected a square operator (N, N), got shape {gram.shape}")
        if np.issubdtype(gram.dtype, np.complexfloating):
            raise InputError(f"gram: expected an operator with real products, got dtype {gram.dtype}")
        return gram
    if callable(gram) and hasattr(gram, "rows"):
        return ImplicitOperator.of(gram)
    if is_on_disk(gram) and np.shape(matrix_of(gram))[0] > in_memory:
        return PanelOperator(gram)
    return DenseOperator(gram)


def is_on_disk(gram: Any) -> bool:
    """Return whether a Gram's entries are an HDF5 dataset or a memory map."""
    values = matrix_of(gram)
    return hasattr(values, "chunks") or isinstance(values, np.memmap)


class PanelOperator(GramOperator):
    """A symmetric matrix on disk (an HDF5 dataset, a memory map), streamed in row panels.

    A product reads the lower triangle once: a tile T of rows i and columns j gives y_i += T x_j and y_j += Tᵀ x_i. The
    next panel is read by a second thread meanwhile. Products are in float64 whatever the entries are stored in.

    Opening makes one pass over both triangles: it refuses entries that are not finite and triangles that differ, and
    notes the diagonal and the norm.

    Args:
        gram: a Gram-like whose `.values` is (N, N) on disk, or that array: anything with `shape`, `dtype` and slices.
        budget_mib: memory for panels, in MiB; vectors (8 N k bytes each) come on top.
        noise: of the matrix; default what the Gram carries, else the rounding of its stored entries; no less than
            differing triangles show: ‖K − Kᵀ‖_F, with a probability of 99.9 % over 8 random vectors.

    Attributes:
        diagonal: (N,) float64.
        norm: ‖K‖_F.
        rows: of a panel, h.
        bytes_read: so far.

    Raises:
        InputError: not square, not real, not finite, not symmetric, entries so small or large that their squares are no
            numbers, or a budget below one row of tiles.

    Cost: opening reads N² entries; a product N²/2 of them, and 2N²k flops.
    """

    def __init__(self, gram: Any, budget_mib: float = 512.0, noise: float | None = None) -> None:
        values = matrix_of(gram)
        shape = check_stored("gram", values)
        if shape[0] != shape[1]:
            raise InputError(f"gram: expected a square matrix (N, N), got shape {shape}")
        if values.dtype.kind != "f":
            raise InputError(f"gram: expected real numbers, got dtype {values.dtype}")
        n, itemsize = shape[0], values.dtype.itemsize
        tile = min(n, (getattr(values, "chunks", None) or (1,))[0])  # HDF5 reads whole chunks
        budget = number("budget_mib", budget_mib, above=0) * 2**20
        fits = int(min(_PANEL_BYTES, budget / 2) // (n * itemsize)) // tile * tile
        if fits < 1:
            need = 2 * tile * n * itemsize / 2**20
            raise InputError(f"budget_mib: expected at least {need:.0f} for 2 panels of {tile} rows, got {budget_mib}")
        self.values, self.rows, self.bytes_read = values, min(fits, n), 0
        self._buffers = [np.empty((self.rows, n), dtype=values.dtype) for _ in range(2)]
        super().__init__(n, 0.0, block=8)
        self.diagonal, self.norm = np.empty(n), 0.0
        declared = declared_noise(gram) if noise is None else number("noise", noise, 0)
        shown = self._open(2.0 * (declared or 0.0))
        self.noise = max(shown, 0.5 * float(np.finfo(values.dtype).eps) * self.norm if declared is None else declared)

    def product(self, X: np.ndarray) -> np.ndarray:
        """Return K X from the lower triangle."""
        Y = np.zeros_like(X, order="C")
        for start, stop, panel in self._panels(whole=False):
            _accumulate(panel, start, stop, X, Y)
        return Y

    def panels(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield (first row, last row + 1, those rows (h, N) in their stored type), the next one being read meanwhile.

        A panel is overwritten two steps later: copy what is to be kept.
        """
        return self._panels(whole=True)

    def _panels(self, *, whole: bool) -> Iterator[tuple[int, int, np.ndarray]]:
        n = self.shape[0]
        starts = range(0, n, self.rows)
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self._read, 0, 0, whole)
            for i, start in enumerate(starts):
                panel = ahead.result()
                if start + self.rows < n:
                    ahead = reader.submit(self._read, i + 1, start + self.rows, whole)
                yield start, min(start + self.rows, n), panel

    def _read(self, turn: int, start: int, whole: bool) -> np.ndarray:
        n = self.shape[0]
        stop = min(start + self.rows, n)
        columns = n if whole else stop
        panel = self._buffers[turn % 2].reshape(-1)[: (stop - start) * columns].reshape(stop - start, columns)
        if hasattr(self.values, "read_direct"):
            self.values.read_direct(panel, np.s_[start:stop, :columns])
        else:
            np.copyto(panel, self.values[start:stop, :columns])
        self.bytes_read += panel.nbytes
        return panel

    def _open(self, allowed: float) -> float:
        """Look at every entry; return what differing triangles show of the lower one's error, 0 if it is rounding."""
        n = self.shape[0]
        x = np.random.default_rng(0).standard_normal((n, _PROBES))
        rows, triangle, total = np.zeros_like(x), np.zeros_like(x), 0.0
        for start, stop, panel in self._panels(whole=True):
            for at in range(start, stop, 16):
                strip = panel[at - start : at - start + 16].astype(np.float64)
                if not np.isfinite(strip.sum()):
                    bad = np.flatnonzero(~np.isfinite(strip).all(axis=1))
                    if len(bad):
                        raise InputError(f"gram: expected finite entries, row {at + int(bad[0])} has NaN or infinity")
                    raise InputError(f"gram: expected entries whose sum is finite, row {at} overflows")
                rows[at : at + len(strip)] = strip @ x
                total += float(np.einsum("ij,ij->", strip, strip))
            _accumulate(panel[:, :stop], start, stop, x, triangle)
            self.diagonal[start:stop] = panel[:, start:stop].diagonal()
        check_size("gram", float(np.abs(rows).max()))
        self.norm = float(np.sqrt(total))
        # A difference within the rounding of the entries, or within their noise, is left: the lower triangle is read.
        allowed += 10.0 * float(np.finfo(self.values.dtype).eps) * self.norm
        off = float(np.abs(rows - triangle)[:, 0].max())
        if off > allowed:
            raise InputError(
                f"gram: expected a symmetric matrix, got triangles whose products with a random vector differ by "
                f"{off:.3g} with the norm {self.norm:.3g}"
            )
        # rows - triangle is (U − Lᵀ) x: each of its rows one of the strict upper triangle of K − Kᵀ.
        shown = float(np.sqrt(2.0 / chi2.ppf(_CHANCE, _PROBES))) * float(np.linalg.norm(rows - triangle))
        return shown if shown > 100.0 * EPS * self.norm else 0.0


def _accumulate(panel: np.ndarray, start: int, stop: int, X: np.ndarray, Y: np.ndarray) -> None:
    """Add the products of rows [start, stop) of the lower triangle, `panel` (h, stop), and of their mirror image."""
    for at in range(start, stop, _ROWS):
        end = min(at + _ROWS, stop)
        rows, left = panel[at - start : end - start], X[at:end]
        total = np.zeros_like(left)
        for j in range(0, at, _COLUMNS):
            to = min(j + _COLUMNS, at)
            strip = rows[:, j:to].astype(np.float64)
            total += strip @ X[j:to]
            Y[j:to] += strip.T @ left
        square = np.tril(rows[:, at:end].astype(np.float64))
        total += square @ left
        np.fill_diagonal(square, 0.0)
        Y[at:end] += total + square.T @ left
