"""Weights on their way: the block at work keeps its own, and on a GPU the next one's cross the bus meanwhile.

A weight is copied on a stream of its own, from pinned memory, into which files are read by threads; the stream that
computes waits for it where its module runs. So a pass takes the longer of bus and computing, not their sum.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

from ntkengine.inputs.heap import HEAP
from ntkengine.inputs.weights import Entry, Held

Key = tuple[Entry | Held, torch.dtype, torch.device]

_READERS = 4  # threads: one alone copies from the system's cache at a fraction of what the bus carries


def brought_ahead(device: torch.device) -> bool:
    """Whether the next block's weights are brought while a block works: where computing leaves the host free to."""
    return device.type == "cuda"


class Resident:
    """Weights in memory, up to a number of bytes: those brought last, so that a block's microbatches read it once.

    Passes go through the model over and over, and what was brought last is then what is needed last. So where the
    limit is more than a block or two, the rest of it is for the weights that came first, which stay.

    Attributes:
        limit: bytes; a larger weight is not kept.
        turn: entries of the weights brought last that always have a place: one block's, or two; None: all that fit.
    """

    def __init__(self, limit: int = 512 << 20, turn: int | None = None) -> None:
        self.limit, self.turn = limit, turn
        self._settled: dict[Key, Tensor] = {}
        self._kept: OrderedDict[Key, Tensor] = OrderedDict()
        self._coming: dict[Key, _Arrival] = {}
        self._wanted: set[Key] = set()

    def bring(self, entry: Entry | Held, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a weight, from its file if need be."""
        key = entry, dtype, device
        for arrival in self._coming.values():
            arrival.go_on()
        if key in self._settled:
            return self._settled[key]
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        arrived = self._coming.pop(key, None)
        if arrived is None:
            self._make_room(key)
            HEAP.relieve()
            weight = entry.read().to(device).to(dtype)  # converted there: a GPU is faster at it
        else:
            weight = arrived.take()
        if _size(key) <= self.limit:
            self._kept[key] = weight
        return weight

    def expect(self, now: Sequence[Key], then: Sequence[Key]) -> None:
        """Keep the weights of the block at work and of the next before any others; begin to bring the next one's.

        Args:
            now: of the block at work.
            then: of the next, in the order of their use; as many are begun as fit beside the block's at work.
        """
        self._wanted = {*now, *then}
        self._coming = {key: arrival for key, arrival in self._coming.items() if key in self._wanted}
        needed = {*now, *self._coming, *(key for key in then if key in self._kept), *self._settled}
        free = self.limit - sum(map(_size, needed))
        for key in then:
            if key in self._settled or key in self._kept or key in self._coming or not _is_elsewhere(key):
                continue
            free -= _size(key)
            if free < 0:
                break
            self._make_room(key)
            self._coming[key] = _Arrival(key)

    def resize(self, limit: int, turn: int | None) -> None:
        """Set `limit` and `turn`, and let go of what is over them."""
        self.limit, self.turn = limit, turn
        self._unsettle()
        self._let_go(self._held() - limit)

    def clear(self) -> None:
        """Let go of all weights."""
        self._settled.clear()
        self._kept.clear()
        self._coming.clear()

    def _make_room(self, new: Key) -> None:
        """Let go of weights until another has room: of those that stayed in another dtype, then of those kept."""
        over = self._held() + _size(new) - self.limit
        if over > 0:  # of another dtype: a pass in it is over
            over -= self._unsettle(new[1:])
        self._let_go(over, new)

    def _let_go(self, over: int, new: Key | None = None) -> None:
        """Free bytes of weights kept, those unused for longest first, wanted last; some stay, if like the new one."""
        settled, most = sum(map(_size, self._settled)), 0 if new is None else self._most(new)
        for key in sorted(self._kept, key=self._wanted.__contains__):
            if over <= 0:
                break
            weight = self._kept.pop(key)
            if new is not None and key[1:] == new[1:] and settled + _size(key) <= most:
                self._settled[key] = weight
                settled += _size(key)
            else:
                over -= _size(key)

    def _most(self, key: Key) -> int:
        """Return the bytes that may stay, of weights in a key's dtype."""
        return 0 if self.turn is None else self.limit - self.turn * key[1].itemsize

    def _held(self) -> int:
        return sum(map(_size, [*self._settled, *self._kept, *self._coming]))

    def _unsettle(self, alike: tuple[torch.dtype, torch.device] | None = None) -> int:
        """Let go of weights that stayed, the last first, while they are too many or unlike; return their bytes."""
        gone, held = 0, sum(map(_size, self._settled))
        for key in reversed(list(self._settled)):
            if held - gone > self._most(key) or (alike is not None and key[1:] != alike):
                del self._settled[key]
                gone += _size(key)
        return gone


class _Arrival:
    """A weight on its way: read by a thread if it is in a file, then copied on a stream beside the computing one."""

    def __init__(self, key: Key) -> None:
        self._entry, self._dtype, self._device = key
        self._on_gpu = self._device.type == "cuda"
        self._read: Future[Tensor] | None = None
        self._weight: Tensor | None = None
        if isinstance(self._entry, Entry):
            buffer = torch.empty(self._entry.nbytes, dtype=torch.uint8, pin_memory=self._on_gpu)
            self._read = _readers().submit(self._entry.read_to, buffer)
        else:
            self._copy(self._entry.read())

    def go_on(self) -> None:
        """Begin to copy what has been read."""
        if self._weight is None and self._read is not None and self._read.done():
            self._copy(self._read.result())

    def take(self) -> Tensor:
        """Return the weight, for the current stream."""
        if self._weight is None and self._read is not None:
            self._copy(self._read.result())
        assert self._weight is not None
        if self._on_gpu:
            here = torch.cuda.current_stream(self._device)
            here.wait_event(self._copied)
            self._weight.record_stream(here)
        return self._weight

    def _copy(self, source: Tensor) -> None:
        if not self._on_gpu:
            self._weight = self._entry.as_rounded(source.to(self._device)).to(self._dtype)
            return
        beside = _beside(self._device)
        with torch.cuda.stream(beside):  # rounded there: a GPU is faster at it, and what a thread rounds is not pinned
            self._weight = self._entry.as_rounded(source.to(self._device, non_blocking=True)).to(self._dtype)
        self._copied = beside.record_event()


def _size(key: Key) -> int:
    return math.prod(key[0].shape) * key[1].itemsize


def _is_elsewhere(key: Key) -> bool:
    """Whether a weight is brought ahead: not where it is on its device already, in another dtype."""
    entry, _, device = key
    return brought_ahead(device) and not (isinstance(entry, Held) and entry.weight.device == device)


@cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_READERS, thread_name_prefix="ntk-weights")


@cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


RESIDENT = Resident()
