"""Grams that are never formed: from stored features, from products of Jacobians, or as a tensor on a device.

Shapes: N rows, P features, k columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ntkengine.arguments import number
from ntkengine.errors import InputError
from ntkengine.spectrum.checks import check_size, check_stored
from ntkengine.spectrum.matrices import EPS
from ntkengine.spectrum.operators import DenseOperator, GramOperator

_ROWS = 4096  # of Φ turned to float64 at a time


class FactorOperator(GramOperator):
    """K = Φ Φᵀ from the tangent features, for more rows than features (N·C > P), or LoRA's few parameters.

    Args:
        features: (N, P) Φ: numpy, a memory map, or anything with `shape` and row slices.
        noise: of K in the spectral norm, >= 0; default what rounding the entries to the type they are stored in can do,
            eps·‖Φ‖_F·√min(‖Φ‖_F², ‖Φ‖_1·‖Φ‖_∞); 0 for float64.

    Raises:
        InputError: not a matrix, or entries that are not finite.

    Cost: 4NPk flops a product, Φ read twice; P·k numbers.
    """

    def __init__(self, features: Any, noise: float | None = None) -> None:
        count = np.prod(check_stored("features", features, "P"))
        self.features = features
        super().__init__(features.shape[0], 0.0 if noise is None else noise)
        squares = widest = 0.0
        tallest = np.zeros(features.shape[1])
        for start, rows in self._rows():
            if not np.isfinite(rows).all():
                bad = start + int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
                raise InputError(f"features: expected finite entries, row {bad} has NaN or infinity")
            if noise is None:
                with np.errstate(over="ignore"):  # such sizes the products refuse
                    squares += float(np.einsum("ij,ij->", rows, rows))
                    sizes = np.abs(rows)
                    widest, tallest = max(widest, float(sizes.sum(axis=1).max())), tallest + sizes.sum(axis=0)
        dtype = np.asarray(features[:1]).dtype
        if noise is None and dtype.kind == "f" and dtype.itemsize < 8 and np.isfinite(squares):
            kind = np.finfo(dtype)
            off = 0.5 * (float(kind.eps) * squares**0.5 + float(kind.smallest_subnormal) * float(count) ** 0.5)
            norm = min(squares, widest * float(tallest.max())) ** 0.5
            self.noise = off * (2.0 * norm + off)

    def product(self, X: np.ndarray) -> np.ndarray:
        """Return Φ (Φᵀ X)."""
        inner = np.zeros((self.features.shape[1], X.shape[1]))
        for start, rows in self._rows():
            inner += rows.T @ X[start : start + len(rows)]
        return np.concatenate([rows @ inner for _, rows in self._rows()])

    def _rows(self) -> Any:
        for start in range(0, self.features.shape[0], _ROWS):
            yield start, np.asarray(self.features[start : start + _ROWS], dtype=np.float64)


class ImplicitOperator(GramOperator):
    """K as a function, such as v -> J(Jᵀ v) by one VJP and one JVP sweep of a model (`gram.jacobian`).

    Args:
        product: (N, k) float64 -> (N, k), linear and symmetric.
        rows: N.
        noise: of K in the spectral norm.
        block: columns that cost hardly more than one.
        rounding: relative error of one product; 1e-6 suits float32 passes.
    """

    def __init__(
        self,
        product: Callable[[np.ndarray], np.ndarray],
        rows: int,
        noise: float = 0.0,
        *,
        block: int = 1,
        rounding: float = EPS,
    ) -> None:
        if not callable(product):
            raise InputError(f"product: expected a function, got {type(product).__name__}")
        super().__init__(rows, noise, block=block, rounding=rounding)
        self._product = product

    @classmethod
    def of(cls, products: Any) -> ImplicitOperator:
        """Return the operator of a function that tells its `rows`, `noise`, `block` and `rounding` itself."""
        return cls(products, products.rows, products.noise, block=products.block, rounding=products.rounding)

    def product(self, X: np.ndarray) -> np.ndarray:
        """Return the function of X, its shape checked."""
        Y = np.asarray(self._product(X), dtype=np.float64)
        if Y.shape != X.shape:
            raise InputError(f"product: expected shape {X.shape}, got {Y.shape}")
        return Y


class DeviceOperator(GramOperator):
    """A symmetric matrix as a tensor on a device, such as a GPU: vectors travel, the matrix stays.

    The solvers keep their basis on the host: beside N² entries read on the device, N·k numbers a product cross the bus.

    Args:
        gram: (N, N) tensor, or array-like or Gram-like that is moved to `device` in float64.
        device: where to put it; default where the tensor is.
        noise: of K in the spectral norm; default what the Gram carries, else the rounding of its stored entries; no
            less than differing triangles show, as `noise_of`.

    Attributes:
        matrix: (N, N) float64 tensor.
    """

    def __init__(self, gram: Any, device: str | torch.device | None = None, noise: float | None = None) -> None:
        if device is not None:
            try:
                device = torch.device(device)
            except (RuntimeError, TypeError):
                raise InputError(f"device: expected one that torch knows, got {device!r}") from None
        if isinstance(gram, torch.Tensor):
            if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not gram.is_floating_point():
                raise InputError(f"gram: expected a square matrix (N, N), got {tuple(gram.shape)} of {gram.dtype}")
            matrix = gram.detach().to(device or gram.device, torch.float64)
            largest, skew = float(matrix.abs().max()), float((matrix - matrix.T).abs().max())
            if not np.isfinite(largest):
                raise InputError("gram: expected finite entries, got NaN or infinity")
            check_size("gram", largest)
            eps = float(torch.finfo(gram.dtype).eps)
            if skew > 100.0 * eps * largest:
                raise InputError(f"gram: expected a symmetric matrix, got max|K - K^T| = {skew:.3g}")
            own = 0.5 * eps * float(matrix.norm())
            shown = 0.5 * float((matrix - matrix.T).norm()) if skew else 0.0
            self.matrix = matrix if skew == 0.0 else 0.5 * (matrix + matrix.T)
        else:
            held = DenseOperator(gram)
            own, shown = held.noise, held.shown
            self.matrix = torch.from_numpy(held.matrix).to(device or "cpu")
        super().__init__(len(self.matrix), max(own if noise is None else number("noise", noise, 0), shown), block=8)

    def product(self, X: np.ndarray) -> np.ndarray:
        """Return K X, multiplied on the device."""
        return (self.matrix @ torch.from_numpy(np.ascontiguousarray(X)).to(self.matrix.device)).cpu().numpy()
