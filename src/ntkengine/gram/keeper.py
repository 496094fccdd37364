"""Who is told of a sweep's sums as they grow: nobody, or who writes them down."""

from __future__ import annotations

import json
import logging
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ntkengine import store
from ntkengine.errors import Stopped

if TYPE_CHECKING:
    from ntkengine.gram.checkpoint import Checkpoints
    from ntkengine.gram.run import Sums
    from ntkengine.gram.tiles import Accumulator

log = logging.getLogger(__name__)

_PIECE_BYTES = 64 << 20

Region = tuple[int, int, int, int]  # rows [start, stop), columns [start, stop) on the job's sample axis


class Keeper:
    """Nobody: these sums are not written down."""

    def start(self, sums: Sums) -> None:
        """Put what was summed before into empty sums: the parameters in `sums.done` are not contracted again."""

    def passing(self, sums: Sums) -> None:
        """Note that a microbatch has passed.

        Raises:
            Stopped: the job was asked to stop; the sums are written down.
        """

    def step(self, sums: Sums) -> None:
        """Note that a parameter has been added.

        Raises:
            Stopped: as `passing`.
        """

    def finish(self, sums: Sums) -> None:
        """Note that all parameters are in."""

    def waits(self) -> AbstractContextManager[None]:
        """Return what the sweep runs in: a signal to stop waits for `passing` or `step`."""
        return nullcontext()


class Writer(ABC):
    """When sums are written down: of a sweep by one process (`Sums`), or of a rank's (`spreading.Spreading`).

    Args:
        owner: of the job.
        region: the sweep's samples on the job's sample axis, which its own frame may not count from 0.
        tile: samples of a tile; 0: there is one sweep.
        symmetric: whether an entry of the job's Gram is its mirror image's too.
    """

    def __init__(self, owner: Checkpoints, region: Region, tile: int, *, symmetric: bool) -> None:
        self.owner, self.region, self.size, self.symmetric = owner, region, tile, symmetric
        self._new = False

    def start(self, sums: Any) -> None:
        """Put the newest checkpoint into empty sums.

        Raises:
            InputError: it lacks entries.
        """
        found = self.owner.found(self.region, self.size)
        if found:
            before = self.owner.resumed
            self.take(found, sums)
            log.info("going on from a checkpoint: %d parameters are summed already", self.owner.resumed - before)

    def step(self, sums: Any) -> None:
        """Note that more has been added, on all ranks; write a checkpoint when it is time.

        Raises:
            Stopped: on all ranks, when any was asked to stop.
        """
        self._new = True
        if self.owner.agree(self.owner.stop.signal is not None):
            self._stop(sums)
        if self.owner.agree(self.owner.due()):
            self._save(sums)

    def finish(self, sums: Any) -> None:
        """Write everything down, whatever the time: from here on a kill costs no contraction."""
        if self._new:
            self._save(sums)
        if self.owner.agree(self.owner.stop.signal is not None):
            self._stop(sums)

    @abstractmethod
    def take(self, found: list[store.Saved], sums: Any) -> None:
        """Put the sums of a checkpoint's files, one for each rank, into empty sums."""

    @abstractmethod
    def _work(self, sums: Any) -> dict[str, Any]:
        """Return `done`, `traces` and `pass_seconds`."""

    @abstractmethod
    def _pieces(self, sums: Any) -> Iterator[store.Part]:
        """Yield the sums."""

    def _stop(self, sums: Any) -> None:
        if self._new:
            self._save(sums)
        raise Stopped(self.owner.stop.signal or signal.SIGTERM)

    def _save(self, sums: Any, path: Path | None = None, **arrays: Any) -> None:
        state = {**json.loads(json.dumps(self._work(sums))), "region": self.region, "tile": self.size}
        self._new = not self.owner.save(state, lambda: self._pieces(sums), path, **arrays)


class SweepKeeper(Writer, Keeper):
    """The checkpoints of one sweep."""

    def passing(self, sums: Sums) -> None:
        """Stop between two microbatches if asked to."""
        if self.owner.stop.signal is not None:
            self._stop(sums)

    def waits(self) -> AbstractContextManager[None]:
        """Let signals wait."""
        return self.owner.stop.waits()

    def take(self, found: list[store.Saved], sums: Sums) -> None:
        """Put the sums of a checkpoint's files, one for each rank, into empty sums.

        Raises:
            InputError: they do not have all entries.
        """
        w, (r0, r1, c0, c1) = sums.total.frame.width, self.region
        targets = []
        for name in names_of(found):
            K = (sums.part(name) if name else sums.total).K.cpu().numpy()
            targets.append(store.Part(name, (r0 * w, r1 * w), (c0 * w, c1 * w), K))
        store.overlay(found, targets)
        for target in targets:
            sum_ = sums.part(target.name) if target.name else sums.total
            if sum_.K.is_cuda:
                sum_.K.copy_(torch.from_numpy(target.values))
        sums.done, sums.traces = work_of(found)
        sums.pass_seconds = sum(saved.state["pass_seconds"] for saved in found) / len(found)
        self.owner.resumed += len(sums.done)

    def _work(self, sums: Sums) -> dict[str, Any]:
        return {"done": sums.done, "traces": sums.traces, "pass_seconds": sums.pass_seconds}

    def _pieces(self, sums: Sums) -> Iterator[store.Part]:
        for name, sum_ in sums.parts.items() or [("", sums.total)]:
            yield from _pieces(name, sum_, self.region, symmetric=self.symmetric)


class TileKeeper(SweepKeeper):
    """The checkpoints of one tile among several: those of its sweep, and the finished tile."""

    def finished(self, sums: Sums) -> bool:
        """Put a tile that was finished before into empty sums; return False if its file, `path`, is damaged."""
        try:
            saved = store.load(self.path)
        except OSError as error:
            log.warning("%s: this tile is computed again", error)
            return False
        self.take([saved], sums)
        sums.outputs = saved.array("outputs")
        return True

    def finish(self, sums: Sums) -> None:
        """Write the tile down, for good."""
        self._save(sums, self.path, outputs=sums.outputs)
        if self.owner.agree(self.owner.stop.signal is not None):
            self._stop(sums)

    @property
    def path(self) -> Path:
        """Where the finished tile is."""
        owner = self.owner
        name = f"rank-{owner.rank:04d}-of-{owner.ranks:04d}.tile-" + "-".join(map(str, self.region))
        return owner.folder.path / name


def names_of(found: list[store.Saved]) -> list[str]:
    """Return the names of the Grams in a checkpoint's files."""
    return list(dict.fromkeys(part["name"] for saved in found for part in saved.state["parts"]))


def work_of(found: list[store.Saved]) -> tuple[dict[str, tuple[str, int, float, float]], dict[str, float]]:
    """Return a checkpoint's contractions by parameter, (strategy, tokens, flops, seconds), and traces, of all ranks."""
    done: dict[str, tuple[str, int, float, float]] = {}
    traces: dict[str, float] = {}
    for saved in found:
        for name, (strategy, tokens, flops, seconds) in saved.state["done"].items():
            before = done.get(name, (strategy, 0, 0.0, 0.0))
            done[name] = before[0], max(tokens, before[1]), flops + before[2], seconds + before[3]
        for name, value in saved.state["traces"].items():
            traces[name] = traces.get(name, 0.0) + value
    return done, traces


def _pieces(name: str, sum_: Accumulator, region: Region, *, symmetric: bool) -> Iterator[store.Part]:
    frame = sum_.frame
    down, right = region[0] * frame.width - sum_.r0, region[2] * frame.width - sum_.c0
    size = max(1, _PIECE_BYTES // (8 * frame.layers * max(1, sum_.c1 - sum_.c0)))
    for start, stop, last in frame.panels(size):
        values = sum_.K[:, start - sum_.r0 : stop - sum_.r0, : last - sum_.c0].cpu().numpy()
        rows, columns = (start + down, stop + down), (sum_.c0 + right, last + right)
        yield store.Part(name, rows, columns, values, lower=frame.symmetric, symmetric=symmetric)
