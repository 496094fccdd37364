"""One rank's share of a Gram: its own samples against themselves, and against those it meets on the ring.

Parcels are contracted a window at a time: this rank's pieces and those of the ranks in the window are laid one after
the other on one axis, whose features are made once, and every rectangle that is wanted of their products is a `Frame`
on that axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from ntkengine.cluster.ring import Hop, hops
from ntkengine.cluster.shards import Piece, Shard
from ntkengine.gram.blocks import Block
from ntkengine.gram.frame import Frame
from ntkengine.gram.tiles import Accumulator, Workspace
from ntkengine.inputs.batches import Samples


@dataclass(frozen=True)
class Meeting:
    """What is contracted at once.

    Attributes:
        hops: the ranks met.
        axis: pieces one after the other.
        frames: the wanted rectangles on that axis.
    """

    hops: tuple[Hop, ...]
    axis: tuple[Piece, ...]
    frames: tuple[Frame, ...]

    @property
    def size(self) -> int:
        """Samples on the axis."""
        return sum(piece.size for piece in self.axis)

    @property
    def positions(self) -> np.ndarray:
        """The job's own position of every sample on the axis."""
        return np.concatenate([piece.positions for piece in self.axis])


def meetings(shards: Sequence[Shard], rank: int, samples: Samples, frame: Frame, window: int) -> list[Meeting]:
    """Return a rank's meetings: its own samples and the first window of the ring, then window by window.

    Args:
        shards: of all ranks.
        rank: whose meetings.
        samples: the job's.
        frame: the wanted Gram.
        window: hops in a meeting.
    """
    spans = [samples.span(g) for g in range(len(samples.sizes))]
    row_groups, column_groups = (
        [g for g, (start, stop) in enumerate(spans) if first <= start and stop <= last]
        for first, last in (frame.rows, frame.columns)
    )
    # What another rank's rows give that this rank's rows do not: in a symmetric square nothing.
    back = [g for g in row_groups if not (frame.symmetric and g in column_groups)]
    met = hops(rank, len(shards))
    # Both groups' second halves lie side by side, so that they are one range.
    own = sorted(shards[rank].pieces(), key=lambda p: (p.group, p.half if p.group == 0 else -p.half))
    found = []
    for start in range(0, len(met), window):
        few = met[start : start + window]
        axis = list(own)
        near = _pieces(shards, [hop for hop in few if hop.half or not hop.opposite])
        far = _pieces(shards, [hop for hop in few if hop.opposite and not hop.half])
        axis += near + far
        second = [p for p in own if p.half == 1]
        wanted = [(own, own, row_groups)] if start == 0 else []
        wanted += [(own, near, row_groups), (near, own, back), (second, far, row_groups), (far, second, back)]
        frames = []
        for rows, columns, groups in wanted:
            r = _range(axis, [p for p in rows if p.group in groups])
            c = _range(axis, [p for p in columns if p.group in column_groups])
            if r[1] > r[0] and c[1] > c[0]:
                frames.append(Frame(r, c, frame.outputs, frame.contraction, frame.transform))
        found.append(Meeting(tuple(few), tuple(axis), tuple(frames)))
    return found


def entries(meeting: Meeting) -> int:
    """Return the Gram entries of a meeting's rectangles."""
    return sum(frame.entries for frame in meeting.frames)


class Panels:
    """A rank's rectangles of one Gram, in float64.

    Args:
        part: what the Gram is called.
        met: the rank's meetings.
        device: where products run.
        workspace: shared with the rank's other Grams.
        kernels: run products in Triton kernels.
    """

    def __init__(
        self, part: str, met: Sequence[Meeting], device: torch.device, workspace: Workspace, *, kernels: bool
    ) -> None:
        self.part, self.met = part, met
        self.totals = [[Accumulator(f, device, workspace, kernels=kernels) for f in m.frames] for m in met]

    def trace(self) -> float:
        """Return the sum over this rank's part of the square's diagonal; 0 where it has none."""
        return sum(total.trace() for totals in self.totals[:1] for total in totals if total.frame.square)

    def finish(self) -> None:
        """Mirror what is symmetric."""
        for _, total in self._each():
            total.finish()

    def add(self, other: Panels) -> None:
        """Add another Gram's entries."""
        for (_, mine), (_, theirs) in zip(self._each(), other._each(), strict=True):
            mine.K += theirs.K

    def blocks(self, *, mirrored: bool = False) -> Iterator[Block]:
        """Yield the rectangles on the job's axis; those on the rank's own samples with both triangles once finished.

        Args:
            mirrored: with both triangles before that too.
        """
        for meeting, total in self._each():
            yield from self._blocks(meeting, total, mirrored=mirrored)

    @contextmanager
    def filling(self) -> Iterator[list[Block]]:
        """Give the rectangles on the job's axis, to be written to within the block."""
        there = [(meeting, total, total.K.cpu().numpy()) for meeting, total in self._each()]
        yield [block for meeting, total, K in there for block in self._cut(meeting, total, K)]
        for _, total, K in there:
            if total.K.is_cuda:
                total.K.copy_(torch.from_numpy(K))

    def diagonal(self, frame: Frame) -> np.ndarray:
        """Return the diagonal of the Gram's square, (layers, n), zero where it is on another rank.

        Args:
            frame: of the whole Gram.
        """
        r0, n = frame.rows[0] * frame.width, (frame.columns[1] - frame.columns[0]) * frame.width
        found = np.zeros((frame.layers, n))
        for block in self.blocks():
            if block.rows == block.columns:
                found[:, block.rows[0] - r0 : block.rows[1] - r0] = block.values.diagonal(axis1=1, axis2=2)
        return found

    def times(self, frame: Frame, x: np.ndarray) -> np.ndarray:
        """Return what these rectangles and their mirror images give of a symmetric square's product with x.

        Args:
            frame: of the whole Gram.
            x: (layers, n).
        """
        r0, c1 = frame.rows[0] * frame.width, frame.columns[1] * frame.width
        found = np.zeros_like(x)
        for meeting, total in self._each():
            for block in self._blocks(meeting, total):
                if block.rows[1] > c1:
                    continue
                i, j = (slice(start - r0, stop - r0) for start, stop in (block.rows, block.columns))
                found[:, i] += np.einsum("lij,lj->li", block.values, x[:, j])
                if not total.frame.square:
                    found[:, j] += np.einsum("lij,li->lj", block.values, x[:, i])
        return found

    def squares(self, frame: Frame, *, square: bool) -> float:
        """Return the sum of squared entries that these rectangles stand for.

        Args:
            frame: of the whole Gram.
            square: only of the columns' samples against themselves.
        """
        c1 = frame.columns[1] * frame.width
        found = 0.0
        for meeting, total in self._each():
            for block in self._blocks(meeting, total):
                inside = block.rows[1] <= c1
                twice = frame.symmetric and inside and not total.frame.square
                if inside or not square:
                    found += (2 if twice else 1) * float(np.square(block.values).sum())
        return found

    def _each(self) -> Iterator[tuple[Meeting, Accumulator]]:
        for meeting, totals in zip(self.met, self.totals, strict=True):
            for total in totals:
                yield meeting, total

    def _blocks(self, meeting: Meeting, total: Accumulator, *, mirrored: bool = False) -> Iterator[Block]:
        K = total.K.cpu().numpy()
        if mirrored and total.frame.symmetric:
            K, n = K.copy(), total.c1 - total.c0
            lower = np.tril(K[:, :n])
            K[:, :n] = lower + np.tril(lower, -1).transpose(0, 2, 1)
        yield from self._cut(meeting, total, K)

    def _cut(self, meeting: Meeting, total: Accumulator, K: np.ndarray) -> Iterator[Block]:
        w = total.frame.width
        for (top, bottom), rows in _spans(meeting.axis, total.frame.rows):
            for (left, right), columns in _spans(meeting.axis, total.frame.columns):
                values = K[:, top * w : bottom * w, left * w : right * w]
                yield Block(self.part, (rows[0] * w, rows[1] * w), (columns[0] * w, columns[1] * w), values)


def _pieces(shards: Sequence[Shard], met: Sequence[Hop]) -> list[Piece]:
    """Return what the ranks met give, by group: columns are one range, and so are rows."""
    found = [p for hop in met for p in shards[hop.source].pieces() if not (hop.half and p.half)]
    return sorted(found, key=lambda p: p.group)


def _range(axis: Sequence[Piece], pieces: Sequence[Piece]) -> tuple[int, int]:
    """Return where neighbouring pieces lie on an axis."""
    if not pieces:
        return 0, 0
    first = axis.index(pieces[0])
    if list(axis[first : first + len(pieces)]) != list(pieces):
        msg = "expected pieces that are neighbours"
        raise ValueError(msg)
    start = sum(p.size for p in axis[:first])
    return start, start + sum(p.size for p in pieces)


def _spans(axis: Sequence[Piece], part: tuple[int, int]) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Yield ([start, stop) in a range of the axis, [start, stop) on the job's axis) of its runs of neighbours."""
    at = -part[0]
    for piece in axis:
        for start, stop in piece.spans:
            if at >= 0 and at + stop - start <= part[1] - part[0]:
                yield (at, at + stop - start), (start, stop)
            at += stop - start
