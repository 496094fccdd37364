"""Half a ring: every rank's parcels pass every rank that has to meet them, and no further.

At hop k = 1 … ⌊R/2⌋ rank i receives from rank i + 1 what rank i + k has, and passes what it had at hop k − 1 on to rank
i − 1. So every unordered pair of ranks meets once. On an even ring the last hop is met from both sides: there the lower
rank gets, and multiplies with, half 0 of what the higher has, and the higher gets all of the lower's and multiplies it
with its own half 1.

All hops of a segment are one queue. Parcels are received a window (several hops of one bundle of parameters) ahead of
the one in use; whoever computes calls `poll` now and then, so that MPI goes on meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ntkengine.cluster.comm import Team
from ntkengine.cluster.wire import Wire


@dataclass(frozen=True)
class Hop:
    """What one rank gets at one step.

    Attributes:
        k: the step, from 1.
        source: whose samples.
        half: only half 0 of them.
        opposite: the last hop of an even ring, met with the rank's own half 1 alone unless `half`.
    """

    k: int
    source: int
    half: bool = False
    opposite: bool = False


def hops(rank: int, ranks: int) -> list[Hop]:
    """Return what a rank gets, in order.

    Args:
        rank: whose hops.
        ranks: R.
    """
    found = []
    for k in range(1, ranks // 2 + 1):
        source = (rank + k) % ranks
        opposite = 2 * k == ranks
        found.append(Hop(k, source, half=opposite and rank < source, opposite=opposite))
    return found


@dataclass
class _Item:
    """One parcel that comes in, and goes on."""

    bundle: int
    hop: Hop
    size: int
    tag: int
    wire: Tensor | None = None
    request: Any = None
    here: bool = False


@dataclass
class Queue:
    """All parcels of one segment that this rank receives and passes on.

    Args:
        team: the ranks.
        wire: makes buffers.
        sizes: bytes of rank r's parcel of bundle b: sizes[b][r] = (half 0, half 1).
        own: makes this rank's parcel of a bundle: half 0, then half 1, flat uint8.
        window: hops received at once.
    """

    team: Team
    wire: Wire
    sizes: Sequence[Sequence[tuple[int, int]]]
    own: Callable[[int], Tensor]
    window: int
    _items: list[_Item] = field(default_factory=list)
    _sends: list[tuple[Any, Tensor]] = field(default_factory=list)
    _opened: int = 0

    def __post_init__(self) -> None:
        here = hops(self.team.rank, self.team.size)
        for b in range(len(self.sizes)):
            for hop in here:
                first, second = self.sizes[b][hop.source]
                size = first if hop.half else first + second
                self._items.append(_Item(b, hop, size, len(self._items) % 30_000))
        self._hops = len(here)
        self._left = (self.team.rank - 1) % self.team.size
        self._theirs = {hop.k: hop for hop in hops(self._left, self.team.size)}
        self._open(min(self.window, self._hops))

    def take(self, bundle: int, window: int) -> list[tuple[Hop, Tensor]]:
        """Return the parcels of a window, on the computing device, once they are there; start on the next window's.

        Args:
            bundle: its number.
            window: its number in the bundle.
        """
        start = bundle * self._hops + window * self.window
        stop = min(start + self.window, (bundle + 1) * self._hops)
        self._open(stop)
        self._until(lambda: all(item.here for item in self._items[start:stop]))
        ahead = min(stop + self.window, (stop // self._hops + 1) * self._hops)
        self._open(ahead)
        found = []
        for item in self._items[start:stop]:
            if item.wire is not None:
                found.append((item.hop, self.wire.arrived(item.wire)))
            item.wire = None  # what is passed on is kept with its request
        return found

    def finish(self) -> None:
        """Return when all that this rank passes on is gone."""
        self._open(len(self._items))
        self._until(lambda: not self._sends and all(item.here for item in self._items))

    def poll(self) -> None:
        """Pass on what has come, and let MPI go on; called now and then by whoever computes."""
        for item in self._items[: self._opened]:
            if not item.here and (item.request is None or self.team.done(item.request)):
                item.here, item.request = True, None
                self._pass_on(item)
        self._sends = [(request, kept) for request, kept in self._sends if not self.team.done(request)]

    def _until(self, ready: Callable[[], bool]) -> None:
        def look() -> bool:
            self.poll()
            return ready()

        self.team.wait(look)

    def _open(self, stop: int) -> None:
        """Start receiving the items before `stop`, and sending what this rank itself has of their bundles."""
        while self._opened < min(stop, len(self._items)):
            item = self._items[self._opened]
            if item.hop.k == 1:
                self._send(item.bundle, 1, self.team.rank, self.wire.leaving(self.own(item.bundle)), item.tag)
            item.wire = self.wire.empty(item.size)
            right = (self.team.rank + 1) % self.team.size
            item.request = self.team.receive(item.wire, right, item.tag) if item.size else None
            self._opened += 1

    def _pass_on(self, item: _Item) -> None:
        if item.hop.k < self._hops and item.wire is not None:
            self._send(item.bundle, item.hop.k + 1, item.hop.source, item.wire, item.tag + 1)

    def _send(self, bundle: int, k: int, source: int, wire: Tensor, tag: int) -> None:
        first, second = self.sizes[bundle][source]
        size = first if self._theirs[k].half else first + second
        if size:
            self._sends.append((self.team.send(wire[:size], self._left, tag % 30_000), wire))
