"""A job that something happens to, in a process of its own, or in one for each rank.

It is forked by a server that has imported everything, or started under a launcher (`["mpirun", "-n", "3"]`).
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT_S = 600.0  # what takes longer hangs; machines of tests may be slow
TILE = 16  # of the files here, so that a small Gram has many
ROWS = 40, 8  # train, eval


@dataclass
class Fault:
    """What happens to a child, besides what its parent does to it.

    Attributes:
        rank: of several, to which the fault happens; None: to all of them.
        started: file that says, with the rank behind its name, that a process is about to run the job, and its id.
        contractions: file to which the name of every contraction of the job's own sweep is appended, likewise.
        pause_s: slept before each of them.
        disk_at: number of the disk operation at which it kills itself.
        operations: file for the number of disk operations, at the end.
        room_at: number of the contraction from which on there is no room: files may not grow beyond `room`, or,
            with `ballast`, the disk is full.
        room: bytes.
        ballast: file that fills the disk it is on.
        dies_at: number of the contraction at which it kills itself.
        raises_at: number of the contraction at which it raises.
    """

    rank: int | None = None
    started: str = ""
    contractions: str = ""
    pause_s: float = 0.0
    disk_at: int = 0
    operations: str = ""
    room_at: int = -1
    room: int = 0
    ballast: str = ""
    dies_at: int = -1
    raises_at: int = -1


def child(arguments: list[str], said: str, fault: dict[str, Any], limit_s: float) -> None:
    """Run the command line with a fault, its words in a file."""
    import torch

    torch.set_num_threads(1)
    with Path(said).open("a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    faulthandler.dump_traceback_later(0.9 * limit_s)  # where it hangs, if it does
    from ntkengine import store
    from ntkengine.cli import main
    from ntkengine.cluster.launch import launcher_rank

    store.tiles.TILE = TILE
    rank, given = launcher_rank() or 0, Fault(**fault)
    if given.rank not in (None, rank):
        given = Fault(contractions=given.contractions, started=given.started, pause_s=given.pause_s)
    given.contractions = given.contractions and f"{given.contractions}-{rank}"
    counted = _install(given)
    if given.started:
        Path(f"{given.started}-{rank}.partial").write_text(str(os.getpid()))
        Path(f"{given.started}-{rank}.partial").rename(f"{given.started}-{rank}")
    try:
        main(arguments)
    finally:
        if given.operations:
            Path(given.operations).write_text(str(counted[0]))


def _install(fault: Fault) -> list[int]:
    from ntkengine.gram import run
    from ntkengine.gram.spreading import Spreading

    contract, spread, seen, counted = run.contract, Spreading._contract, [0], [0]

    def note(name: str) -> None:
        time.sleep(fault.pause_s)
        if seen[0] == fault.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if seen[0] == fault.raises_at:
            raise OSError("out of luck")  # noqa: EM101, TRY003
        if seen[0] == fault.room_at and fault.ballast:
            with contextlib.suppress(OSError), Path(fault.ballast).open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        elif seen[0] == fault.room_at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault.room, resource.RLIM_INFINITY))
        seen[0] += 1
        if fault.contractions:
            with Path(fault.contractions).open("a") as file:
                file.write(f"{name}\n")

    def noted(factors: Any, strategy: str, target: Any, root: Any) -> Any:
        if target.frame.rows[1] == sum(ROWS):  # not of the check, the noise, or a held-out head
            note(factors.name)
        return contract(factors, strategy, target, root)

    def noted_spread(self: Any, segment: str, bundle: Any, *rest: Any) -> Any:
        if self.samples.total == sum(ROWS):
            for factors in bundle:
                note(factors.name)
        return spread(self, segment, bundle, *rest)

    run.contract, Spreading._contract = noted, noted_spread

    def counting(function: Any) -> Any:
        def operation(*args: Any, **kwargs: Any) -> Any:
            counted[0] += 1
            if counted[0] == fault.disk_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return operation

    if fault.disk_at or fault.operations:
        for owner, names in ((os, ("pwrite", "fsync", "ftruncate")), (Path, ("replace", "unlink", "mkdir", "rmdir"))):
            for name in names:
                setattr(owner, name, counting(getattr(owner, name)))
    return counted


class Child:
    """A job that has been started."""

    def __init__(
        self, arguments: list[str], said: Path, fault: Fault, launcher: list[str], limit_s: float = LIMIT_S
    ) -> None:
        self.said, self.limit_s, self.started = said, limit_s, fault.started
        given = (arguments, str(said), vars(fault), limit_s)
        self._process: Any
        if launcher:
            command = [*launcher, sys.executable, "-m", "tests.faulty", json.dumps(given)]
            with said.open("a") as out:  # what the launcher itself has to say
                self._process = subprocess.Popen(command, stdout=out, stderr=out)
        else:
            self._process = _server().Process(target=child, args=given)
            self._process.start()

    def wait(self) -> int | None:
        """Return the exit code; None if it hung, and was killed."""
        wait = self._process.join if hasattr(self._process, "join") else self._process.wait
        for _ in range(int(4 * self.limit_s)):  # in short waits: a machine that stands still does not count
            with contextlib.suppress(subprocess.TimeoutExpired):
                wait(0.25)
            if not self.alive():
                break
        code = self._process.exitcode if hasattr(self._process, "exitcode") else self._process.poll()
        if code is None:
            self._process.kill()
            for rank in self.ranks():
                self.send(signal.SIGKILL, rank)
        return code

    def alive(self) -> bool:
        """Return whether it is still there."""
        if hasattr(self._process, "is_alive"):
            return bool(self._process.is_alive())
        return self._process.poll() is None

    def ranks(self) -> list[int]:
        """Return the ranks that are about to run the job, or have begun to."""
        return [int(path.name.rpartition("-")[2]) for path in Path(self.started).parent.glob("started-[0-9]")]

    def until_started(self, ranks: int) -> None:
        """Wait until that many ranks have imported everything."""
        while self.alive() and len(self.ranks()) < ranks:
            time.sleep(0.005)

    def send(self, number: int, rank: int = 0) -> None:
        """Send a signal to a rank, if it is still there."""
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            os.kill(int(Path(f"{self.started}-{rank}").read_text()), number)


def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faulty", "tests.preload"])
    return context


if __name__ == "__main__":
    child(*json.loads(sys.argv[1]))
