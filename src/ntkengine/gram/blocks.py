"""Rectangles of a Gram on the job's own axis: what a rank has, and what they make together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ntkengine.gram.frame import Frame

TOTAL = ""  # the part that is the whole Gram


@dataclass(frozen=True)
class Block:
    """A rectangle of one Gram.

    The axis is the job's: samples of all groups in sweep order (`inputs.batches.Samples`), `Frame.width` rows for each.
    It does not depend on the number of ranks. Where the square of a symmetric Gram is concerned, a rectangle may lie on
    either side of the diagonal, and stands for its mirror image too.

    Attributes:
        part: a module's name, or `TOTAL`.
        rows: [start, stop).
        columns: [start, stop).
        values: (layers, rows, columns) float64.
    """

    part: str
    rows: tuple[int, int]
    columns: tuple[int, int]
    values: np.ndarray


def paste(blocks: Iterable[Block], frame: Frame, K: np.ndarray) -> None:
    """Write blocks, and the mirror images of those in a symmetric square, into a Gram.

    Args:
        blocks: all of one part.
        frame: of the Gram.
        K: (layers, rows, columns) float64.
    """
    r0, c0, c1 = frame.rows[0] * frame.width, frame.columns[0] * frame.width, frame.columns[1] * frame.width
    for block in blocks:
        (top, bottom), (left, right) = block.rows, block.columns
        K[:, top - r0 : bottom - r0, left - c0 : right - c0] = block.values
        if frame.symmetric and bottom <= c1:
            K[:, left - r0 : right - r0, top - c0 : bottom - c0] = block.values.transpose(0, 2, 1)


def pick(blocks: Iterable[Block], frame: Frame, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return the entries at rows × columns that blocks hold, zero elsewhere.

    Args:
        blocks: all of one part, from one rank or all.
        frame: of the Gram.
        rows: positions on the job's axis.
        columns: likewise.
    """
    found = np.zeros((frame.layers, len(rows), len(columns)))
    c1 = frame.columns[1] * frame.width
    for block in blocks:
        ways = [(block.rows, block.columns, block.values)]
        if frame.symmetric and block.rows[1] <= c1:
            ways.append((block.columns, block.rows, block.values.transpose(0, 2, 1)))
        for (top, bottom), (left, right), values in ways:
            i, j = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
            into, of = np.nonzero(i)[0][:, None], (rows[i] - top)[:, None]
            found[:, into, np.nonzero(j)[0][None, :]] = values[:, of, (columns[j] - left)[None, :]]
    return found
