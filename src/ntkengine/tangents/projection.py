"""The random projection of a sketch, drawn, and applied to one microbatch's factors of a parameter.

Shape suffixes: n samples of a microbatch, C outputs, T tokens, R and I rows and columns of the parameter, m blocks of
r × i.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ntkengine.tangents.factors import Dense, Lookup, Outer, Use
from ntkengine.tangents.sketch import Sketch


@dataclass(frozen=True)
class Side:
    """A random projection of one axis; None for what is left out.

    Attributes:
        bucket: (length,) which of the `folded` entries each one is added to.
        sign: (length,) ±1, with which it is.
        folded: entries after that.
        basis: (folded, columns) orthonormal columns, scaled.
    """

    bucket: Tensor | None
    sign: Tensor | None
    folded: int
    basis: Tensor | None

    def fold(self, x: Tensor) -> Tensor:
        """Return (…, folded) of x (…, length)."""
        if self.bucket is None or self.sign is None:
            return x
        out = torch.zeros(*x.shape[:-1], self.folded, dtype=x.dtype, device=x.device)
        return out.index_add_(-1, self.bucket, x * self.sign)

    def __call__(self, x: Tensor) -> Tensor:
        """Return (…, columns) of x (…, length)."""
        x = self.fold(x)
        return x if self.basis is None else x @ self.basis

    def unit(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return (…, columns): the projections of unit vectors e_id."""
        at = ids if self.bucket is None else self.bucket[ids]
        rows = nn.functional.one_hot(at, self.folded).to(dtype) if self.basis is None else self.basis[at]
        return rows if self.sign is None else rows * self.sign[ids][..., None]


class Projection:
    """A sketch's P and Q: the same wherever and whenever they are drawn.

    Args:
        sketch: what is wanted.
        dtype: of the factors.
        device: where they are.

    Cost: 2(R c_R² + I c_I²) flops in float64 on the CPU, for c_R and c_I columns.
    """

    def __init__(self, sketch: Sketch, dtype: torch.dtype, device: torch.device) -> None:
        self.sketch = sketch
        generator = torch.Generator().manual_seed(sketch.entropy)
        (c_R, c_I), (f_R, f_I) = sketch.projected, sketch.folded
        unit = dtype, device
        scale = math.sqrt(sketch.blocks)
        self.rows = _side(sketch.rows, f_R, c_R, scale, generator, *unit)
        self.columns = _side(sketch.columns, f_I, c_I, 1.0, generator, *unit)

    @property
    def shape(self) -> tuple[int, int]:
        """The sketched gradient's, as a matrix."""
        return self.sketch.shape

    def __call__(self, uses: Sequence[Use]) -> list[Use]:
        """Return the sketched gradient of one microbatch: what its uses add up to.

        Args:
            uses: of the parameter, none or several.
        """
        if self.sketch.lookup:
            return [_narrowed(use, self.columns) for use in uses]
        found: Tensor | None = None
        for use in uses:
            part = self._blocks(use)
            found = part if found is None else found.add_(part)
        return [] if found is None else [Dense(found)]

    def _blocks(self, use: Use) -> Tensor:
        """Return (n, C, m·r, i)."""
        m, (r, i) = self.sketch.blocks, self.sketch.block
        if isinstance(use, Outer):
            d, a = self.rows(use.d).unflatten(-1, (m, r)), self.columns(use.a).unflatten(-1, (m, i))
            n, C, T = d.shape[:3]
            left = d.permute(0, 3, 1, 4, 2).reshape(n, m, C * r, T)
            return torch.matmul(left, a.transpose(1, 2)).unflatten(2, (C, r)).transpose(1, 2).flatten(2, 3)
        if isinstance(use, Lookup):
            e = self.rows.unit(use.ids, use.d.dtype).unflatten(-1, (m, r))
            d = self.columns(use.d).unflatten(-1, (m, i))
            found = torch.matmul(e.permute(0, 2, 3, 1)[:, :, None], d.permute(0, 3, 1, 2, 4))  # (n, m, C, r, i)
            return found.transpose(1, 2).flatten(2, 3)
        y = self.columns(use.g).transpose(2, 3)  # (n, C, m·i, R)
        y = self.rows.fold(y).unflatten(2, (m, i))
        if self.rows.basis is None:
            return y.permute(0, 1, 2, 4, 3).flatten(2, 3)
        basis = self.rows.basis.unflatten(-1, (m, r))
        return torch.einsum("ncmif,fmr->ncmri", y, basis).flatten(2, 3)


def _narrowed(use: Use, columns: Side) -> Use:
    if not isinstance(use, Lookup):
        msg = f"expected rows that are looked up, got {type(use).__name__}"
        raise TypeError(msg)
    return Lookup(use.ids, columns(use.d))


def _side(
    length: int,
    folded: int,
    columns: int,
    scale: float,
    generator: torch.Generator,
    dtype: torch.dtype,
    device: torch.device,
) -> Side:
    bucket = sign = basis = None
    if folded < length:
        bucket = torch.randint(folded, (length,), generator=generator).to(device)
        sign = (torch.randint(2, (length,), generator=generator) * 2 - 1).to(device, dtype)
    if columns < folded or scale != 1.0:
        normal = torch.randn(folded, columns, generator=generator, dtype=torch.float64)
        # Whichever signs the columns get: they cancel in every inner product.
        basis = torch.linalg.qr(normal)[0].mul_(scale * math.sqrt(folded / columns)).to(device, dtype)
    return Side(bucket, sign, folded, basis)
