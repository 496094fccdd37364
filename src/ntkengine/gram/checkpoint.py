"""When a job's sums are written down, and how they are taken up again."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ntkengine import store
from ntkengine.arguments import number
from ntkengine.errors import CheckFailed, InputError, NonFinite, Stopped
from ntkengine.gram.frame import Frame
from ntkengine.gram.keeper import Region, SweepKeeper, TileKeeper
from ntkengine.gram.stopping import Stop, stopping
from ntkengine.gram.telling import Telling
from ntkengine.gram.versions import other_versions

log = logging.getLogger(__name__)

CHECKPOINT_S = 300.0
_SHARE = 0.02  # of the run that checkpoints may take


def new_run() -> str:
    """Return a name for a run that no other has."""
    return uuid.uuid4().hex


def check_seconds(checkpoint_s: float) -> None:
    """Refuse what is not a time."""
    number("checkpoint_s", checkpoint_s, 0, what="a number of seconds")


class Checkpoints:
    """A job's work on its way to a file: held by this process alone, taken up, written down, cleared away.

    Args:
        out: the Gram file.
        job: what defines its values.
        resume: go on from what there is; False refuses it.
        versions: of the libraries that take part: two must not do one half each.
        every_s: seconds between checkpoints; 0: one after every parameter. Where writing one takes long they are
            further apart, so that they stay below 2 % of the run.
        rank: of this process among those that share the job. All enter after rank 0 has, which alone holds the folder.
        ranks: how many there are.
        agree: whether any rank says yes; every rank asks it at the same points of its sweep.
        run: of the ranks that share the job, unlike that of any others before or after them.
        arrays: further ones, in every file of rank 0's.

    Attributes:
        folder: of the parts.
        resumed: contractions that were found done, over all tiles.
        stop: whether this process was asked to stop.
        telling: tells other processes how far the job is.
        repairs: whether what there is to do is to fill the open tiles of a file.
    """

    def __init__(
        self,
        out: Path,
        job: Mapping[str, Any],
        *,
        resume: bool = True,
        every_s: float = CHECKPOINT_S,
        rank: int = 0,
        ranks: int = 1,
        agree: Callable[[bool], bool] = bool,
        run: str = "",
        versions: Mapping[str, str] | None = None,
        arrays: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.rank, self.ranks, self.agree = rank, ranks, agree
        self.folder, self.resume, self.every_s = store.Folder(out), resume, every_s
        self.job = json.loads(json.dumps(dict(job)))
        self.resumed = 0
        self.stop, self.repairs = Stop(), False
        self.telling = Telling(self.folder, speaks=rank == 0)
        self._start = self._last = time.monotonic()
        self._before_s = self._cost_s = 0.0
        self._generation = self._attempts = 0
        self._run, self._versions = run or new_run(), dict(versions or {})
        self._arrays = {store.extra_name(name): array for name, array in (arrays or {}).items()} if rank == 0 else {}
        self._newest: Path | None = None
        self._found: list[store.Saved] = []  # until one of its files is written over
        self._others = False  # whether it is of another number of ranks
        self._tile: int | None = None  # of what was found
        self._again: Callable[[], object] | None = None  # the last checkpoint, if the disk refused it
        self._exit = ExitStack()

    def __enter__(self) -> Checkpoints:
        """Take the folder, and read what is in it.

        Raises:
            InputError: another process is at work on it, or it holds another job, or any work and `resume` is False.
        """
        with ExitStack() as opening:
            if self.rank == 0:
                opening.enter_context(self.folder)
            self.repairs = self.folder.damaged.is_file()
            if self.repairs and not self.resume:
                self._compare({})
            for there in store.saved_states(self.folder.out):
                self._compare(there["job"], there["versions"])
                self._tile = there["tile"]
            self._found = store.load_newest(self.folder.path)
            if self._found:
                self._others = len(self._found) != self.ranks
                if not self._others:
                    self._newest = self._found[self.rank].path
                self._generation = self._found[0].state["generation"]
                self._before_s = max(saved.state["seconds"] for saved in self._found)
            self.stop = opening.enter_context(stopping())
            self._exit = opening.pop_all()
        self.telling.tell(0.0, 1.0, "starting", now=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Let go of the folder; after a stop say how to go on; keep nothing that a check has refuted."""
        with self._exit:
            if isinstance(error, CheckFailed | NonFinite) and self.rank == 0 and not self.folder.damaged.is_file():
                self.folder.clear()
            kept = any(self.folder.path.glob("rank-*"))
        if isinstance(error, Stopped):
            how = "the same command goes on from here" if kept else "nothing was summed yet"
            raise Stopped(error.signal, how) from error

    @property
    def start(self) -> tuple[int, int, bool]:
        """Where the job starts: number of the checkpoint that was found, of how many ranks, zeros for none; repairs."""
        return self._generation, len(self._found), self.repairs

    @property
    def seconds(self) -> float:
        """Time spent on the job, in this process and those before it."""
        return self._before_s + time.monotonic() - self._start

    def sweep(self, frame: Frame) -> SweepKeeper:
        """Return the keeper of a sweep of all samples."""
        return SweepKeeper(self, (*frame.rows, *frame.columns), 0, symmetric=frame.symmetric)

    def tile(self, frame: Frame, region: Region, size: int) -> TileKeeper:
        """Return the keeper of one tile of a job with tiles of `size` samples."""
        return TileKeeper(self, region, size, symmetric=frame.symmetric)

    def write(self, write: Callable[[Path], None]) -> None:
        """Write the final file, and clear its parts away.

        Args:
            write: takes the name that the file has until it is complete.

        Raises:
            OSError: the disk refused; the checkpoints are still there.
        """
        with self.writing():
            with self.refused():
                write(self.folder.partial)
            self.folder.remove()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within the block the final file is written: a signal that comes now comes too late."""
        self.telling.tell(1.0, 1.0, "writing the file", now=True)
        with self.stop.waits():
            yield

    @contextmanager
    def refused(self) -> Iterator[None]:
        """Say of a disk that refuses in the block what is still there.

        Raises:
            OSError: the disk refused.
        """
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error).splitlines()[0]
            msg = f"could not be written ({reason}); {self._kept()}"
            raise OSError(error.errno, msg, str(self.folder.out)) from error

    def due(self) -> bool:
        """Return whether it is time for a checkpoint."""
        wait = max(self.every_s, self._cost_s / _SHARE) if self.every_s > 0 else 0.0
        return time.monotonic() - self._last >= wait

    def save(
        self,
        state: Mapping[str, Any],
        parts: Callable[[], Iterable[store.Part]],
        path: Path | None = None,
        **arrays: Any,
    ) -> bool:
        """Write a checkpoint over the older one, or a file of its own; return whether the disk took it.

        A disk that refuses is only a warning: the checkpoint before is still there.
        """
        began = time.monotonic()
        a, b = store.slots(self.folder.path, self.rank, self.ranks)
        target = path or (b if self._newest == a else a)
        if path is None:
            self._found = []  # what is read from its files from now on may be another tile's
        full = dict(state) | {"job": self.job, "seconds": self.seconds, "rank": self.rank, "ranks": self.ranks}
        full["versions"] = self._versions
        failed = False
        self._attempts += 1
        full |= {"generation": self._generation + 1, "attempt": f"{self._run}-{self._attempts}"}
        try:
            store.save_parts(target, full, parts(), self._arrays | arrays)
        except OSError as error:
            level = logging.WARNING if self._again is None else logging.INFO
            log.log(level, "a checkpoint could not be written (%s): the job goes on, the one before it stays", error)
            failed = True
        # One that some rank lacks is written over by the next: the one before it is the last that all have.
        failed = self.agree(failed)
        self._again = (lambda: self.save(state, parts, path, **arrays)) if failed else None
        if not failed and path is None:
            self._generation, self._newest = self._generation + 1, target
            if self.rank == 0 and self._others:
                self._forget()
        self._last = time.monotonic()
        self._cost_s = self._last - began
        return not failed

    def found(self, region: Region, tile: int) -> list[store.Saved]:
        """Return the checkpoint of a region, rank by rank; empty if there is none.

        Raises:
            InputError: the checkpoint has other tiles.
        """
        if self._tile not in (None, tile):
            had, has = (f"tiles of {n} samples" if n else "one tile" for n in (self._tile, tile))
            how = "give the same memory_gib" if self.ranks == 1 else "go on with one process and the same memory_gib"
            msg = f"out: {self.folder.path} was laid out in {had}, this run in {has}: {how}"
            raise InputError(msg)
        if tile and self._found and tuple(self._found[0].state["region"]) != region:
            return []
        return self._found

    def _kept(self) -> str:
        """Return what a file that could not be written leaves."""
        if self._again is not None and self.ranks == 1:
            self._again()  # the file that did not fit is gone, so there may be room now
        if self._again is None:
            return "nothing is lost: the same command goes on from its checkpoint"
        if any(self.folder.path.glob("rank-*")):
            return "neither could the last checkpoint: the same command goes on from the one before"
        return "neither could a checkpoint: the same command starts again"

    def _forget(self) -> None:
        """Remove the checkpoints of another number of ranks, now that there is a newer one of this."""
        for item in self.folder.path.glob("rank-*"):
            if f"-of-{self.ranks:04d}." not in item.name:
                item.unlink()
        self._others = False

    def _compare(self, there: Mapping[str, Any], versions: Mapping[str, str] | None = None) -> None:
        where = f"out: {self.folder.path} holds an unfinished run"
        if not self.resume:
            msg = f"{where}; allow resume, or remove it"
            raise InputError(msg)
        difference = store.first_difference(there, self.job)
        if difference is not None:
            msg = f"{where} of another job: {difference}; finish that one first, or remove it"
            raise InputError(msg)
        other = other_versions(versions or {}, self._versions)
        if other is not None:
            msg = f"{where} of other versions: {other}; finish it with those, or remove it"
            raise InputError(msg)
