"""Rows of a Gram in the order of the examples, put together strip by strip from the rectangles of all ranks.

Each rank writes down an equal run of the examples' rows. A strip is a few of them, over all columns: every rank sends
what it has of it to the rank whose it is, so that nobody holds more than its own rectangles and a strip.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ntkengine.gram.blocks import Block
from ntkengine.gram.frame import Frame, gram_rows
from ntkengine.gram.spread import Spread
from ntkengine.inputs.batches import Samples

Piece = tuple[np.ndarray, np.ndarray]  # a way (`_ways`), and which rows of a strip it has


class Rows:
    """The rows of one matrix; every method is called by all ranks.

    Args:
        sums: finished.
        samples: of the job.
        part: which of the sums: a module's name, or `TOTAL`.
        group: whose samples the rows are.
        columns: likewise.
        height: rows of a strip.

    Attributes:
        start: this rank's first row.
        shape: (layers, rows, columns) of this rank's rows.
        strips: rounds until the last rank has all of its rows.
    """

    def __init__(self, sums: Spread, samples: Samples, part: str, group: int, columns: int, height: int) -> None:
        self.team, w = sums.team, sums.frame.width
        self._blocks = list(sums.panels(part).blocks())
        self._ways = self.team.exchange(_ways(self._blocks, sums.frame))
        self._rows, across = (_positions(samples, g, w) for g in (group, columns))
        self._first, self._column = samples.span(columns)[0] * w, np.argsort(across)
        n, ranks = samples.sizes[group], self.team.size
        self._cuts = [n * rank // ranks * w for rank in range(ranks + 1)]
        self.start, stop = self._cuts[self.team.rank], self._cuts[self.team.rank + 1]
        self.shape = sums.frame.layers, stop - self.start, len(across)
        self._height = height
        self.strips = max(-(-(b - a) // height) for a, b in zip(self._cuts, self._cuts[1:], strict=False))

    def strip(self, k: int) -> np.ndarray:
        """Return this rank's k-th strip, (layers, rows, columns) float64; no rows behind its last.

        Cost: each entry travels once.
        """
        try:
            return self._gathered(k)
        except Exception as error:  # (the others wait for its entries)
            self.team.abort(error)
            raise

    def _gathered(self, k: int) -> np.ndarray:
        team = self.team
        mine = self._strip(team.rank, k)
        K = np.full((self.shape[0], len(mine), self.shape[2]), np.nan)
        pieces = {rank: list(_cut(self._ways[rank], mine)) for rank in range(team.size)}
        came: dict[int, torch.Tensor] = {}
        requests = []
        for source, found in pieces.items():
            size = len(K) * sum(len(i) * int(way[3] - way[2]) for way, i in found)
            if size and source != team.rank:
                came[source] = torch.empty(size, dtype=torch.float64)
                requests.append(team.receive(came[source].view(torch.uint8), source, 0))
        for to in range(team.size):
            if to != team.rank:
                theirs = self._strip(to, k)
                sent = [self._entries(way, theirs[i]).ravel() for way, i in _cut(self._ways[team.rank], theirs)]
                if sent:
                    requests.append(team.send(torch.from_numpy(np.concatenate(sent)).view(torch.uint8), to, 0))
        for way, i in pieces[team.rank]:
            self._put(K, way, i, self._entries(way, mine[i]))
        team.wait(lambda: all(map(team.done, requests)))
        for source, entries in came.items():
            at = 0
            for way, i in pieces[source]:
                size = len(K) * len(i) * int(way[3] - way[2])
                self._put(K, way, i, entries[at : at + size].numpy().reshape(len(K), len(i), -1))
                at += size
        if np.isnan(K).any():
            msg = "an entry of the Gram is on no rank"
            raise RuntimeError(msg)
        return K

    def _strip(self, rank: int, k: int) -> np.ndarray:
        """Return the positions on the job's axis of a rank's k-th strip."""
        start = self._cuts[rank] + k * self._height
        return self._rows[start : min(start + self._height, self._cuts[rank + 1])]

    def _entries(self, way: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return (layers, rows, columns) entries of one of this rank's rectangles."""
        values = self._blocks[way[4]].values
        return (values.transpose(0, 2, 1) if way[5] else values)[:, rows - way[0]]

    def _put(self, K: np.ndarray, way: np.ndarray, rows: np.ndarray, entries: np.ndarray) -> None:
        columns = self._column[way[2] - self._first : way[3] - self._first]
        K[:, rows[:, None], columns[None, :]] = entries


def _ways(blocks: Sequence[Block], frame: Frame) -> np.ndarray:
    """Return what a rank has, every entry once: rows [start, stop), columns [start, stop), block, whether mirrored."""
    c1 = frame.columns[1] * frame.width
    both = {(block.rows, block.columns) for block in blocks}
    found = [(*block.rows, *block.columns, i, 0) for i, block in enumerate(blocks)]
    for i, block in enumerate(blocks):
        if frame.symmetric and block.rows[1] <= c1 and (block.columns, block.rows) not in both:
            found.append((*block.columns, *block.rows, i, 1))
    return np.array(found, dtype=np.int64).reshape(-1, 6)


def _cut(ways: np.ndarray, rows: np.ndarray) -> Iterator[Piece]:
    """Yield what ways have of rows, given by their positions on the job's axis."""
    at = np.sort(rows)
    for way in ways[np.searchsorted(at, ways[:, 1]) > np.searchsorted(at, ways[:, 0])]:
        yield way, np.flatnonzero((rows >= way[0]) & (rows < way[1]))


def _positions(samples: Samples, group: int, width: int) -> np.ndarray:
    """Return by row of a group's examples, in their own order, its position on the job's axis."""
    return gram_rows(samples.places(group), width)
