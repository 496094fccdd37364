"""Per-sample gradients as factors: never the whole gradient unless that is cheapest.

Every parameter is seen as a matrix (R rows, I columns). A *use* is what one microbatch contributes to its gradient:
    Outer   G_nc = Σ_t d_nct a_ntᵀ           linear maps (R = d_out, I = d_in)
    Lookup  row ids_nt of G_nc += d_nct       embeddings (R = vocabulary, I = d)
    Dense   G_nc given                        norms, biases, everything else
A parameter used several times (tied weights, a layer called twice) has several uses per microbatch; their sum is its
gradient. Shape suffixes: n samples of a microbatch, C outputs, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Outer:
    """Σ_t d_t a_tᵀ, with a (n, T, I) and d (n, C, T, R)."""

    a: Tensor
    d: Tensor

    def block(self, rows: slice, columns: slice, out: Tensor, *, add: bool) -> None:
        """Write (or add) some rows and columns of the gradient into out, (n, C, rows, columns) contiguous."""
        n, _, T, _ = self.d.shape
        flat = out.view(n, -1, out.shape[-1])
        left = self.d[..., rows].transpose(1, 2).reshape(n, T, flat.shape[1]).transpose(1, 2)
        if add:
            torch.baddbmm(flat, left, self.a[..., columns], out=flat)
        else:
            torch.bmm(left, self.a[..., columns], out=flat)

    def output(self, c: int) -> Outer:
        """Return output c alone."""
        return Outer(self.a, self.d[:, c : c + 1])

    @property
    def is_zero(self) -> bool:
        """Whether no token is left."""
        return self.d.shape[2] == 0

    def compact(self) -> Outer:
        """Drop tokens whose output gradient is exactly zero (padding; rows no output depends on)."""
        kept = _kept_tokens(self.d)
        if kept is None:
            return self
        n, C, _, R = self.d.shape
        a = self.a.gather(1, kept[:, :, None].expand(-1, -1, self.a.shape[2]))
        d = self.d.gather(2, kept[:, None, :, None].expand(n, C, -1, R))
        return Outer(a, d)


@dataclass
class Lookup:
    """Row ids_t of G += d_t, with ids (n, T) and d (n, C, T, I)."""

    ids: Tensor
    d: Tensor

    def block(self, rows: slice, columns: slice, out: Tensor, *, add: bool) -> None:
        """Write (or add) some rows and columns of the gradient into out, (n, C, rows, columns) contiguous."""
        if not add:
            out.zero_()
        inside = (self.ids >= rows.start) & (self.ids < rows.stop)
        sample, token = inside.nonzero(as_tuple=True)
        row = self.ids[sample, token] - rows.start
        values = self.d[sample, :, token, columns]  # (hits, C, columns)
        for c in range(self.d.shape[1]):
            out[:, c].index_put_((sample, row), values[:, c], accumulate=True)

    def output(self, c: int) -> Lookup:
        """Return output c alone."""
        return Lookup(self.ids, self.d[:, c : c + 1])

    @property
    def is_zero(self) -> bool:
        """Whether no token is left."""
        return self.d.shape[2] == 0

    def compact(self) -> Lookup:
        """Drop tokens whose output gradient is exactly zero."""
        kept = _kept_tokens(self.d)
        if kept is None:
            return self
        n, C, _, D = self.d.shape
        return Lookup(self.ids.gather(1, kept), self.d.gather(2, kept[:, None, :, None].expand(n, C, -1, D)))


@dataclass
class Dense:
    """G itself, (n, C, R, I)."""

    g: Tensor

    def block(self, rows: slice, columns: slice, out: Tensor, *, add: bool) -> None:
        """Write (or add) some rows and columns of the gradient into out, (n, C, rows, columns) contiguous."""
        part = self.g[:, :, rows, columns]
        if add:
            out.add_(part)
        else:
            out.copy_(part)

    def output(self, c: int) -> Dense:
        """Return output c alone."""
        return Dense(self.g[:, c : c + 1])

    @property
    def is_zero(self) -> bool:
        """False: a stored gradient is summed as it is."""
        return False

    def compact(self) -> Dense:
        """Return itself: there is no token axis."""
        return self


Use = Outer | Lookup | Dense


@dataclass
class ParameterFactors:
    """All samples' gradient of one parameter.

    Attributes:
        name: the parameter.
        shape: (R, I).
        sizes: samples of each microbatch.
        chunks: per microbatch, in sweep order, its uses.
    """

    name: str
    shape: tuple[int, int]
    sizes: list[int]
    chunks: list[list[Use]]

    @property
    def kind(self) -> str:
        """`"outer"`, `"lookup"`, `"dense"`, `"zero"` (all is zero) or `"mixed"` (uses to be summed row by row)."""
        kinds = {type(use).__name__.lower() for uses in self.chunks for use in uses if not use.is_zero}
        if not kinds:
            return "zero"
        if len(kinds) > 1 or any(len(uses) > 1 for uses in self.chunks):
            return "mixed"
        return kinds.pop()

    @property
    def tokens(self) -> int:
        """The longest token axis of its outer or lookup uses after compaction."""
        return max((u.d.shape[2] for uses in self.chunks for u in uses if not isinstance(u, Dense)), default=0)

    def dense(self, chunk: int, outputs: int, like: Tensor) -> Tensor:
        """Return the whole per-sample gradient of a microbatch, (n, C, R, I): for checks on a few samples."""
        uses = self.chunks[chunk]
        make = torch.empty if uses else torch.zeros  # the first use writes every entry
        out = make((self.sizes[chunk], outputs, *self.shape), dtype=like.dtype, device=like.device)
        for i, use in enumerate(uses):
            use.block(slice(0, self.shape[0]), slice(0, self.shape[1]), out, add=i > 0)
        return out


def merge(uses: list[Use]) -> list[Use]:
    """Return the uses with those of one kind joined along the token axis, so that a sum over uses is one use."""
    if len(uses) <= 1:
        return uses
    outers = [u for u in uses if isinstance(u, Outer)]
    lookups = [u for u in uses if isinstance(u, Lookup)]
    denses = [u for u in uses if isinstance(u, Dense)]
    joined: list[Use] = []
    if outers:
        joined.append(Outer(torch.cat([u.a for u in outers], 1), torch.cat([u.d for u in outers], 2)))
    if lookups:
        joined.append(Lookup(torch.cat([u.ids for u in lookups], 1), torch.cat([u.d for u in lookups], 2)))
    if denses:
        joined.append(Dense(torch.stack([u.g for u in denses]).sum(0)))
    return joined


def _kept_tokens(d: Tensor) -> Tensor | None:
    """Return (n, T') indices of the tokens to keep, or None when dropping the others would save little.

    Every sample keeps T' = the largest count of nonzero rows; spare places point at zero rows, which add nothing.
    """
    enough = 0.8 * d.shape[2]  # with more of them a copy is not worth it: zero rows add nothing
    if int(d[..., 0].any(1).sum(1).max()) > enough:  # seen in one entry of each row, without reading the others
        return None
    nonzero = d.any(3).any(1)  # (n, T); any: not zero
    longest = int(nonzero.sum(1).max())
    if longest > enough:
        return None
    return nonzero.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :longest]
