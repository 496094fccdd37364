"""Which rows and columns a Gram has: two ranges of one axis of samples.

Sample axis S: the groups of a job one after the other, in sweep order. When the columns are the first rows (train ×
train with eval rows below), only the lower triangle of that square is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ntkengine.inputs.batches import Samples
from ntkengine.products import prefers_onednn

CONTRACTIONS = ("trace", "full", "per-output", "sum-of-outputs")


@dataclass(frozen=True)
class Frame:
    """Which rows and columns are wanted, and how outputs enter.

    Attributes:
        rows: [start, stop) on the sample axis.
        columns: [start, stop) on the sample axis.
        outputs: C.
        contraction: one of `CONTRACTIONS`.
        transform: the inner product between gradients (`gram.transforms`).
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    outputs: int
    contraction: str
    transform: str = "sgd"

    @property
    def square(self) -> bool:
        """Whether the columns are also the first rows."""
        return self.rows[0] == self.columns[0]

    @property
    def symmetric(self) -> bool:
        """Whether that square is its own transpose, so that one triangle is enough."""
        return self.square and self.transform != "asymmetric-sign"

    @property
    def width(self) -> int:
        """Gram rows per sample: C for `"full"`, else 1."""
        return self.outputs if self.contraction == "full" else 1

    @property
    def layers(self) -> int:
        """Separate matrices: C for `"per-output"`, else 1."""
        return self.outputs if self.contraction == "per-output" else 1

    @property
    def folded(self) -> int:
        """Outputs summed inside one inner product: C for `"trace"`, else 1."""
        return self.outputs if self.contraction == "trace" else 1

    @property
    def entries(self) -> int:
        """Entries of the Gram."""
        rows, columns = (stop - start for start, stop in (self.rows, self.columns))
        return rows * columns * self.width**2 * self.layers

    @property
    def pairs(self) -> float:
        """Sample pairs that are computed, one triangle counted once."""
        m, n = self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]
        return (n * (n + 1) / 2 + (m - n) * n) if self.symmetric else float(m * n)

    def panels(self, size: int | None = None) -> list[tuple[int, int, int]]:
        """Return (row start, row stop, last column) panels on the Gram's own axis, right of the diagonal left out.

        Args:
            size: rows of a panel. By default, of a square a fraction: thinner panels save more of the triangle,
                thicker ones run faster, oneDNN's more so; without a triangle to save, nearly all rows.
        """
        first, stop, end = (x * self.width for x in (*self.rows, self.columns[1]))
        rows = stop - first
        if size is None and not self.symmetric:
            size = min(2048, rows)
        elif size is None:
            size = min(256, max(64, rows // 4)) if prefers_onednn() else max(32, -(-rows // 8))
        starts = range(first, stop, size)
        return [(s, t, min(t, end) if self.symmetric else end) for s in starts for t in (min(s + size, stop),)]

    @property
    def computed(self) -> float:
        """Sample pairs that panels of the usual size compute: `pairs` and the corners right of the diagonal."""
        return (
            sum((stop - start) * (last - self.columns[0] * self.width) for start, stop, last in self.panels())
            / self.width**2
        )


def unsorted(K: np.ndarray, samples: Samples, rows: int, columns: int, width: int) -> np.ndarray:
    """Return K (…, rows, columns) with both axes back in the order of the user's examples.

    Args:
        K: entries of group `rows` against group `columns`, in sweep order.
        samples: the samples.
        rows: group of the rows.
        columns: group of the columns.
        width: Gram rows per sample.
    """
    i, j = (gram_rows(samples.unsort(group), width) for group in (rows, columns))
    return np.ascontiguousarray(K[..., i[:, None], j[None, :]])


def gram_rows(places: np.ndarray, width: int) -> np.ndarray:
    """Return the rows that samples at these places have in a Gram of `Frame.width`."""
    return (places[:, None] * width + np.arange(width)).reshape(-1)
