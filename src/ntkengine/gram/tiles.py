"""The Gram matrix being summed: fp64 across tiles, one triangle where it is symmetric.

Shape suffixes: S samples, C outputs, R and Q row and column entries of the Gram, p parameters of a tile.
"""

from __future__ import annotations

import torch
from ntk_kernels.planes import Planes
from ntk_kernels.syrk import syrk
from torch import Tensor

from ntkengine.gram.frame import Frame
from ntkengine.products import inner_products, to_onednn

# Terms summed in float32. One float32 product over millions of terms was wrong by 2.8e-4, over 65,536 by 2e-6.
RUN = 4096
TILE_BYTES = 16 << 20  # of tangent features: they stay in the last-level cache
_COLUMNS = 2048  # of a product: oneDNN makes a kernel for every number of them, and keeps it
# Half-precision products need longer runs for speed, and round far more than their float32 sums do.
HALF = (torch.bfloat16, torch.float16)
_HALF_RUN = 16_384


class Workspace:
    """Memory for one tile of tangent features, kept from parameter to parameter: fresh pages cost more than sums."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Let go of the memory."""
        self._buffer = torch.empty(0)
        self._inputs: list[Tensor] = []
        self._pairs: tuple[Frame | None, dict[tuple[int, int], Tensor]] = (None, {})

    def take(self, like: Tensor, entries: int) -> Tensor:
        """Return a flat buffer of that many entries, of like's dtype and device; its content is what was last there."""
        held = self._buffer
        if held.dtype != like.dtype or held.device != like.device or held.numel() < entries:
            self._buffer = torch.empty(0)  # let go of the old one first
            self._buffer = torch.empty(entries, dtype=like.dtype, device=like.device)
        return self._buffer[:entries]

    def pairs_of(self, inputs: list[Tensor], frame: Frame) -> dict[tuple[int, int], Tensor]:
        """Return what is known of products between these inputs, by block: to be read, and filled.

        It is empty unless these very tensors were asked for last, as a key's are after a query's.
        """
        same = len(inputs) == len(self._inputs) and self._pairs[0] == frame
        if not same or not all(map(_is_same, inputs, self._inputs)):
            self._inputs, self._pairs = inputs, (frame, {})
        return self._pairs[1]


def _is_same(x: Tensor, y: Tensor) -> bool:
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()


class Accumulator:
    """K = Σ of what is added, in float64.

    Args:
        frame: what is wanted.
        device: where products run.
        workspace: shared with other accumulators of the same job.
        kernels: run products in Triton kernels.
    """

    def __init__(
        self, frame: Frame, device: torch.device, workspace: Workspace | None = None, *, kernels: bool = False
    ) -> None:
        self.frame, self.kernels = frame, kernels
        self.workspace = workspace or Workspace()
        w = frame.width
        self.r0, self.r1 = frame.rows[0] * w, frame.rows[1] * w
        self.c0, self.c1 = frame.columns[0] * w, frame.columns[1] * w
        self.K = torch.zeros(frame.layers, self.r1 - self.r0, self.c1 - self.c0, dtype=torch.float64, device=device)

    def add_features(self, phi: Tensor, other: Tensor | None = None, first: int = 0) -> None:
        """Add the inner products of a tile of tangent features.

        Args:
            phi: (S, C, p) contiguous, all samples in sweep order. Runs of `RUN` terms are summed in phi's own
                precision, everything beyond in float64.
            other: the columns' features where they are not the rows'.
            first: the layer of the first of the C outputs, of `"per-output"`.
        """
        S, C, _ = phi.shape
        other = phi if other is None else other
        same = other is phi
        if self.frame.contraction == "per-output":
            parts = [(phi[:, c], other[:, c]) for c in range(C)]
        elif self.frame.contraction == "full":
            parts = [(phi.view(S * C, -1), other.view(S * C, -1))]
        else:
            parts = [(phi.view(S, -1), other.view(S, -1))]
        for layer, (x, y) in enumerate(parts, first):
            self._add_products(layer, x, x if same else y)

    def add_planes(self, phi: Planes, other: Planes | None) -> None:
        """Add the inner products of a tile of tangent features as kernels write them.

        Args:
            phi: (S, C·p), or (S·C, p) for `"full"` and `"per-output"`.
            other: the columns' features where they are not the rows'.
        """
        step = self.frame.layers
        for layer in range(step):
            rows, columns = (
                slice(a * step + layer, b * step, step) for a, b in ((self.r0, self.r1), (self.c0, self.c1))
            )
            x, y = phi.part(rows), (phi if other is None else other).part(columns)
            same = other is None and rows == columns
            syrk(x, self.K[layer], None if same else y, lower=self.frame.symmetric)

    def _add_products(self, layer: int, x: Tensor, y: Tensor) -> None:
        if self.kernels:
            same = x is y and (self.r0, self.r1) == (self.c0, self.c1)
            left, right = x[self.r0 : self.r1], None if same else y[self.c0 : self.c1]
            syrk(left, self.K[layer], right, lower=self.frame.symmetric)
            return
        if x.dtype in HALF:
            for start, stop, last in self.frame.panels():
                K = self.K[layer, start - self.r0 : stop - self.r0, : last - self.c0]
                runs = zip(x[start:stop].split(_HALF_RUN, 1), y[self.c0 : last].split(_HALF_RUN, 1), strict=True)
                for left, right in runs:
                    K += product(left, right)
            return
        if to_onednn(x, y):
            # It sums a long run in blocks of its own: 3e-7 over 65,536 terms, less than over 4,096.
            x, y = x.contiguous(), y.contiguous()
            for start, stop, last in self.frame.panels():
                K = self.K[layer, start - self.r0 : stop - self.r0]
                for at in range(self.c0, last, _COLUMNS):
                    end = min(at + _COLUMNS, last)
                    K[:, at - self.c0 : end - self.c0] += inner_products(x[start:stop], y[at:end])
            return
        whole = x.shape[1] // RUN * RUN
        for start, stop, last in self.frame.panels():
            K = self.K[layer, start - self.r0 : stop - self.r0, : last - self.c0]
            left, right = x[start:stop], y[self.c0 : last]
            if whole:
                K += torch.bmm(_runs(left[:, :whole]), _runs(right[:, :whole]).transpose(1, 2)).sum(
                    0, dtype=torch.float64
                )
            if whole < x.shape[1]:
                K += left[:, whole:] @ right[:, whole:].T

    def add_entries(self, layer: int, rows: Tensor, columns: Tensor, values: Tensor) -> None:
        """Add values at (rows, columns) given on the Gram's whole axis; pairs outside the frame are dropped."""
        inside = (rows >= self.r0) & (rows < self.r1) & (columns >= self.c0) & (columns < self.c1)
        if not bool(inside.all()):
            rows, columns, values = rows[inside], columns[inside], values[inside]
        flat = (rows - self.r0) * (self.c1 - self.c0) + (columns - self.c0)
        self.K[layer].view(-1).index_add_(0, flat, values.to(torch.float64))

    def trace(self) -> float:
        """Return the sum over the diagonal of the square; NaN when there is none."""
        if not self.frame.square:
            return float("nan")
        n = self.c1 - self.c0
        return float(self.K[:, :n].diagonal(dim1=1, dim2=2).sum())

    def finish(self) -> Tensor:
        """Return (layers, rows, columns) with the symmetric square mirrored."""
        if self.frame.symmetric:
            n = self.c1 - self.c0
            lower = self.K[:, :n].tril(-1)
            self.K[:, :n] = lower + lower.transpose(1, 2) + torch.diag_embed(self.K[:, :n].diagonal(dim1=1, dim2=2))
        return self.K


def product(x: Tensor, y: Tensor) -> Tensor:
    """Return x yᵀ, (rows, rows'); of half-precision operands in float32 where the device offers that.

    The CPU rounds such a product to half precision once it is summed: the share of that in K falls with the number of
    runs, and is part of the measured noise.
    """
    if x.dtype in HALF and x.is_cuda:
        return torch.mm(x, y.T, out_dtype=torch.float32)
    return inner_products(x, y)


def _runs(x: Tensor) -> Tensor:
    """Return (k, rows, RUN): x (rows, k·RUN) as k runs, without a copy."""
    return x.unflatten(1, (-1, RUN)).transpose(0, 1)
