"""Which rank has which samples: a pure function of the samples and the number of ranks.

A group's samples, in sweep order, which is by length, are cut into stripes of equally many samples, as many for each
rank; the stripes are dealt from the longest down, each to the rank that has the fewest tokens so far. So all ranks get
equally many tokens, which the passes cost, and equally many samples, which their pairs cost. A rank's stripes come in
two halves: of two ranks that face each other on an even ring, each takes its own pairs with half of what the other has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ntkengine.errors import InputError
from ntkengine.inputs.batches import Samples

_STRIPES = (8, 4, 2, 1)  # of each rank and group, as samples allow; more would cut a Gram into more blocks
_HALF = (0, 1, 1, 0)  # of stripes in turn: short and long ones in both halves


@dataclass(frozen=True)
class Stripe:
    """Neighbours on the sample axis.

    Attributes:
        group: of the samples.
        start: first position on the job's sample axis.
        stop: behind the last.
        half: 0 or 1.
    """

    group: int
    start: int
    stop: int
    half: int


@dataclass(frozen=True)
class Piece:
    """One half of a rank's samples of a group: what is sent, or left out, as a whole.

    Attributes:
        rank: whose.
        group: of the samples.
        half: 0 or 1.
        spans: [start, stop) on the job's sample axis, ascending.
    """

    rank: int
    group: int
    half: int
    spans: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """Number of samples."""
        return sum(stop - start for start, stop in self.spans)

    @property
    def positions(self) -> np.ndarray:
        """Positions on the job's sample axis."""
        return np.concatenate([np.arange(start, stop) for start, stop in self.spans])


@dataclass(frozen=True)
class Shard:
    """One rank's samples.

    Attributes:
        rank: whose.
        stripes: by group and position.
        tokens: of all of them.
    """

    rank: int
    stripes: tuple[Stripe, ...]
    tokens: int

    @property
    def size(self) -> int:
        """Number of samples."""
        return sum(s.stop - s.start for s in self.stripes)

    def positions(self, group: int) -> np.ndarray:
        """Return ascending positions on the job's sample axis."""
        found = [np.arange(s.start, s.stop) for s in self.stripes if s.group == group]
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)

    def pieces(self) -> list[Piece]:
        """Return what the shard is sent in, by group, then half; none without samples."""
        found = []
        for group, half in sorted({(s.group, s.half) for s in self.stripes}):
            spans = tuple((s.start, s.stop) for s in self.stripes if (s.group, s.half) == (group, half))
            found.append(Piece(self.rank, group, half, spans))
        return found

    def part(self, samples: Samples, **options: object) -> Samples:
        """Return the shard's samples as a job of their own, in the same order.

        Args:
            samples: the job's.
            options: of the microbatches.
        """
        return samples.part([(g, self.positions(g)) for g in range(len(samples.sizes))], **options)


def deal(samples: Samples, ranks: int) -> list[Shard]:
    """Return every rank's shard.

    Args:
        samples: the job's; with as many of one group as there are ranks.
        ranks: R.

    Raises:
        InputError: fewer samples than ranks.
    """
    if max(samples.sizes) < ranks:
        msg = f"{ranks} ranks for {max(samples.sizes)} examples: expected no more ranks than examples"
        raise InputError(msg)
    load = np.zeros(ranks, dtype=np.int64)
    dealt: list[list[Stripe]] = [[] for _ in range(ranks)]
    for group, n in enumerate(samples.sizes):
        each = next((s for s in _STRIPES if n >= s * ranks), 1)
        first = samples.span(group)[0]
        widths = samples.widths(group)[samples.order[group]]
        parts = np.array_split(np.arange(n), min(n, each * ranks))
        hands = _hands([int(widths[part].sum()) for part in parts], load, each)
        for rank, hand in enumerate(hands):
            for i, k in enumerate(sorted(hand)):
                start, stop = first + int(parts[k][0]), first + int(parts[k][-1]) + 1
                dealt[rank].append(Stripe(group, start, stop, _HALF[i % len(_HALF)]))
    return [Shard(rank, tuple(dealt[rank]), int(load[rank])) for rank in range(ranks)]


def _hands(costs: Sequence[int], load: np.ndarray, each: int) -> list[list[int]]:
    """Return each rank's items, at most `each`: from the dearest down to whoever has least; adds them to `load`."""
    hands: list[list[int]] = [[] for _ in load]
    for item in sorted(range(len(costs)), key=lambda k: (-costs[k], k)):
        rank = min((r for r in range(len(load)) if len(hands[r]) < each), key=lambda r: (load[r], r))
        hands[rank].append(item)
        load[rank] += costs[item]
    return hands
