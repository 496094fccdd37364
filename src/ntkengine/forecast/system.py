"""The linear systems behind a forecast: one contraction of the kernel, its outputs, and predictions from them.

Shapes: N train and M eval examples, C outputs, n rows of a system, m its residual columns, T times, R ridges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ntkengine.arguments import matrix_of, real_array
from ntkengine.errors import InputError
from ntkengine.gram.frame import CONTRACTIONS
from ntkengine.ridge import RidgePath
from ntkengine.spectrum import as_matrix
from ntkengine.spectrum.checks import check_size
from ntkengine.spectrum.matrices import declared_noise


@dataclass(frozen=True)
class Kernel:
    """A Gram cut into independent systems.

    Attributes:
        matrices: symmetric float64 matrices: one (N, N) shared by all outputs; or one (N·C, N·C); or C of (N, N).
        crosses: eval × train counterparts, or None.
        layout: "shared", "full" or "per-output", in the order above.
        outputs: C.
        divisor: what the Gram was divided by to give `matrices`.
        contraction: of the Gram.
    """

    matrices: list[np.ndarray]
    crosses: list[np.ndarray] | None
    layout: str
    outputs: int
    divisor: float
    contraction: str

    def columns(self, values_NC: np.ndarray) -> list[np.ndarray]:
        """Cut (N, C) into one (n, m) per system."""
        if self.layout == "shared":
            return [values_NC]
        if self.layout == "full":
            return [values_NC.reshape(-1, 1)]
        return [values_NC[:, [c]] for c in range(self.outputs)]

    def joined(self, parts: list[np.ndarray]) -> np.ndarray:
        """Put one (n, m) per system back together as (N, C)."""
        return parts[0].reshape(-1, self.outputs) if self.layout != "per-output" else np.hstack(parts)

    def paths(self, residual_NC: np.ndarray) -> list[RidgePath]:
        """Decompose every system for a residual (N, C)."""
        block = self.outputs if self.layout == "full" else 1
        return [RidgePath(K, r, block) for K, r in zip(self.matrices, self.columns(residual_NC), strict=True)]

    def over_examples(self) -> np.ndarray:
        """Return the (N, N) kernel summed over outputs (the shared kernel itself when there is one)."""
        if self.layout == "full":
            C = self.outputs
            return np.add.reduce([self.matrices[0][c::C, c::C] for c in range(C)])
        return np.add.reduce(self.matrices)

    @property
    def summed(self) -> int:
        """How many kernels, each with the noise of a system, `over_examples` adds up."""
        return 1 if self.layout == "shared" else self.outputs


def cut(gram: Any, examples: int, outputs: int, eval_examples: int | None) -> Kernel:
    """Return the systems of a Gram.

    A bare array is taken as "trace" when (N, N), "full" when (N·C, N·C), "per-output" when (C, N, N).

    Args:
        gram: array-like or Gram-like with `.contraction` and `.cross`.
        examples: N, from the targets.
        outputs: C, from the targets.
        eval_examples: M, or None without eval targets.

    Returns:
        The systems; the trace kernel is divided by C.

    Raises:
        InputError: shapes that do not fit, or the sum of several outputs.
    """
    values = real_array("gram", matrix_of(gram))
    contraction = getattr(gram, "contraction", None) or _guess(values.shape, examples, outputs)
    if contraction not in CONTRACTIONS:
        raise InputError(f"contraction: expected one of {', '.join(CONTRACTIONS)}, got {contraction!r}")
    if contraction == "sum-of-outputs" and outputs > 1:
        raise InputError(
            f"contraction: 'sum-of-outputs' is the kernel of the sum of {outputs} outputs and cannot forecast each; "
            "compute the Gram with 'trace' or 'full'"
        )
    wide = examples * outputs
    expected = {"full": (wide, wide), "per-output": (outputs, examples, examples)}.get(
        contraction, (examples, examples)
    )
    if values.shape != expected:
        raise InputError(
            f"gram: expected shape {expected} for contraction {contraction!r} and targets ({examples}, {outputs}), "
            f"got {values.shape}"
        )
    cross = None
    if eval_examples is not None:
        rows = eval_examples * (outputs if contraction == "full" else 1)
        cross = _cross(gram, (*expected[:-2], rows, expected[-1]))
    # The noise travels with the matrix, so that its asymmetry is judged by it.
    noise = declared_noise(gram) or 0.0
    if contraction == "per-output":
        matrices = [as_matrix(_Noisy(K, noise)) for K in values]
        layout = "per-output" if outputs > 1 else "shared"
        return Kernel(matrices, None if cross is None else list(cross), layout, outputs, 1.0, contraction)
    layout = "full" if contraction == "full" and outputs > 1 else "shared"
    divisor = outputs if layout == "shared" else 1
    crosses = None if cross is None else [cross / divisor]
    return Kernel([as_matrix(_Noisy(values, noise)) / divisor], crosses, layout, outputs, float(divisor), contraction)


@dataclass(frozen=True)
class Flow:
    """Spectral responses of systems started from one residual, on train and eval rows.

    A response h(λ) per eigenvalue turns into U h(Λ) Uᵀ r on the training rows and K_x U h(Λ) Uᵀ r on the eval rows.

    Attributes:
        kernel: the systems.
        paths: their decompositions, for the residual y − f0.
        images: per system K_x U, (rows of eval, n), or None.
    """

    kernel: Kernel
    paths: list[RidgePath]
    images: list[np.ndarray] | None

    @classmethod
    def of(cls, kernel: Kernel, paths: list[RidgePath]) -> Flow:
        """Build it; cost 2·M·n² flops a system when there are eval rows."""
        if kernel.crosses is None:
            return cls(kernel, paths, None)
        return cls(kernel, paths, [X @ path.vectors for X, path in zip(kernel.crosses, paths, strict=True)])

    def train(self, response: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Return U h(Λ) Uᵀ r as (N, C)."""
        return self._apply(response, [path.vectors for path in self.paths])

    def evaluate(self, response: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Return K_x U h(Λ) Uᵀ r as (M, C)."""
        if self.images is None:
            raise InputError("gram: expected a cross Gram (eval x train), got none")
        return self._apply(response, self.images)

    def energy(self, response: Callable[[np.ndarray], np.ndarray]) -> float:
        """Return Σ_i h(λ_i) ‖[Uᵀ r]_i‖², summed over systems and columns."""
        return float(sum(response(p.eigenvalues) @ (p.coefficients**2).sum(axis=1) for p in self.paths))

    def _apply(self, response: Callable[[np.ndarray], np.ndarray], left: list[np.ndarray]) -> np.ndarray:
        return self.kernel.joined(
            [A @ (response(p.eigenvalues)[:, None] * p.coefficients) for A, p in zip(left, self.paths, strict=True)]
        )


@dataclass(frozen=True)
class _Noisy:
    values: np.ndarray
    noise: float


def _guess(shape: tuple[int, ...], examples: int, outputs: int) -> str:
    if len(shape) == 3:
        return "per-output"
    return "full" if outputs > 1 and shape == (examples * outputs, examples * outputs) else "trace"


def _cross(gram: Any, expected: tuple[int, ...]) -> np.ndarray:
    raw = getattr(gram, "cross", None)
    if raw is None:
        raise InputError("eval_targets: expected a Gram with a cross block (eval x train), got one without")
    cross = real_array("cross", raw).astype(np.float64, copy=False)
    if cross.shape != expected:
        raise InputError(f"cross: expected shape {expected}, got {cross.shape}")
    if not np.isfinite(cross).all():
        raise InputError("cross: expected finite entries, got NaN or infinity")
    check_size("cross", float(np.abs(cross).max()))
    return cross
