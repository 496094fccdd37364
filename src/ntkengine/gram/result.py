"""The Gram matrix as users hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ntkengine.digits import above
from ntkengine.display import html_facts
from ntkengine.errors import InputError
from ntkengine.gram.plan import Plan


class Elsewhere:
    """A matrix that rank 0 has: its shape is known, its entries are not here.

    Args:
        shape: of the matrix.
    """

    dtype = np.dtype(np.float64)

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Refuse.

        Raises:
            InputError: always.
        """
        msg = "the Gram of a job over several processes is on rank 0, or in its file (`open_gram`)"
        raise InputError(msg)


class Stacked:
    """Matrices of one shape as one array with an axis more, in front, of which only what is indexed is read.

    Args:
        parts: arrays or datasets.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self._parts = list(parts)
        self.shape, self.dtype = (len(self._parts), *self._parts[0].shape), np.dtype(self._parts[0].dtype)

    def __getitem__(self, index: tuple[Any, ...]) -> np.ndarray:
        """Return part of one of the matrices: its number first, then an index into it."""
        return np.asarray(self._parts[index[0]][index[1:]])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return all of it as a numpy array."""
        return np.stack([np.asarray(part[...]) for part in self._parts]).astype(dtype or self.dtype, copy=False)


class Layers:
    """Sums of the layers of a stack, so many at a time, of which only what is indexed is read and added.

    Args:
        stack: (F·R, N, M) array or dataset.
        rank: R.
    """

    def __init__(self, stack: Any, rank: int) -> None:
        self._stack, self._rank = stack, rank
        self.shape, self.dtype = (stack.shape[0] // rank, *stack.shape[1:]), np.dtype(np.float64)

    def __getitem__(self, index: tuple[Any, ...]) -> np.ndarray:
        """Return part of one of the sums: its number first, then an index into it."""
        first = index[0] * self._rank
        found = np.asarray(self._stack[(first, *index[1:])])
        return sum((np.asarray(self._stack[(first + r, *index[1:])]) for r in range(1, self._rank)), found)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return all of it as a numpy array."""
        return np.stack([self[k, ...] for k in range(self.shape[0])]).astype(dtype or self.dtype, copy=False)


@dataclass
class Gram:
    """An empirical NTK Gram matrix with what is needed to trust and use it.

    Attributes:
        values: array-like float64. `"trace"`, `"sum-of-outputs"`: (N, M); `"full"`: (N·C, M·C), row n·C + c;
            `"per-output"`: (C, N, M). Unit: gradient²; sums over parameters (and, for `"trace"`, over outputs), never
            divided.
        outputs: (N, C) float64, f(x; θ0) of the row examples; of contraction 'sum-of-outputs' (N, 1), their sum.
        contraction: how outputs enter.
        transform: inner product between gradients.
        noise: bound of ‖K̃ − K‖₂, the error of `values` in the spectral norm, with a margin over what some recomputed
            entries tell. By Weyl every eigenvalue is ± noise.
        modules: per-module Grams by module name, empty unless asked for; they sum to `values`.
        cross: eval × train Gram in the same layout, when eval inputs were given.
        cross_modules: its parts by module name, with `modules`.
        eval_outputs: (M, C) float64, f of the eval examples, as `outputs`.
        targets: (N, C) float64 or None.
        eval_targets: (M, C) float64 or None.
        plan: how it was computed.
        meta: versions, fingerprints, settings, timings, `module_trace`; `sketch`: None when exact, else `features`,
            `seed`, `parameters` sketched, `relative_error` ‖E‖_F/‖K‖_F measured on recomputed rows, and `predicted`, a
            bound on its root mean square over seeds (None without a square of rows against themselves).
        extras: further arrays stored beside the Gram; those of its size stay in the file.
        path: the file it lives in, or None.
    """

    values: Any
    outputs: np.ndarray
    contraction: str
    transform: str
    noise: float
    modules: Mapping[str, Any] = field(default_factory=dict)
    cross: Any = None
    cross_modules: Mapping[str, Any] = field(default_factory=dict)
    eval_outputs: np.ndarray | None = None
    targets: np.ndarray | None = None
    eval_targets: np.ndarray | None = None
    plan: Plan | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)
    path: Path | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of `values`."""
        return tuple(self.values.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return `values` as a numpy array."""
        array = np.asarray(self.values[...] if hasattr(self.values, "chunks") else self.values, dtype=dtype)
        return array.copy() if copy else array

    def facts(self) -> list[tuple[str, str]]:
        """Return (label, value) rows of what matters most; no entry of the Gram is read."""
        meta, sketch = self.meta, self.meta.get("sketch")
        unknown = not np.isfinite(self.noise)
        rows = [
            ("shape", " × ".join(map(str, self.shape))),
            ("readout", str(meta.get("readout", ""))),
            ("contraction", self.contraction),
            ("transform", self.transform),
            ("noise", "not estimated" if unknown else f"± {above(self.noise, 2)} (spectral norm, gradient²)"),
            ("sketched", f"to {sketch['features']} features" if sketch else ""),
            ("eval × train", "" if self.cross is None else " × ".join(map(str, self.cross.shape))),
            ("module Grams", str(len(self.modules)) if self.modules else ""),
            ("precision", str(meta.get("precision", ""))),
            ("file", str(self.path) if self.path else ""),
        ]
        return [(label, value) for label, value in rows if value]

    def __repr__(self) -> str:
        first, *rest = self.facts()
        return f"Gram({first[1]}; " + ", ".join(f"{label} {value}" for label, value in rest) + ")"

    def _repr_html_(self) -> str:
        return html_facts("Gram", self.facts())
