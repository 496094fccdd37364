"""A job that something happens to, in a process of its own.

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
        contractions: file to which the name of every contraction of the job's own sweep is appended.
        pause_s: slept before each of them.
        disk_at: number of the disk operation at which it kills itself.
        operations: file for the number of disk operations, at the end.
        room_at: number of the contraction from which on there is no room: files may not grow beyond `room`, or,
            with `ballast`, the disk is full.
        room: bytes.
        ballast: file that fills the disk it is on.
    """

    contractions: str = ""
    pause_s: float = 0.0
    disk_at: int = 0
    operations: str = ""
    room_at: int = -1
    room: int = 0
    ballast: str = ""


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

    store.tiles.TILE = TILE
    counted = _install(Fault(**fault))
    try:
        main(arguments)
    finally:
        if fault.get("operations"):
            Path(fault["operations"]).write_text(str(counted[0]))


def _install(fault: Fault) -> list[int]:
    from ntkengine.gram import run

    contract, seen, counted = run.contract, [0], [0]

    def noted(factors: Any, strategy: str, target: Any, root: Any) -> Any:
        if target.frame.rows[1] == sum(ROWS):  # not of the check, the noise, or a held-out head
            time.sleep(fault.pause_s)
            if seen[0] == fault.room_at and fault.ballast:
                with contextlib.suppress(OSError), Path(fault.ballast).open("wb", buffering=0) as file:
                    while file.write(bytes(4096)):
                        pass
            elif seen[0] == fault.room_at:
                resource.setrlimit(resource.RLIMIT_FSIZE, (fault.room, resource.RLIM_INFINITY))
            seen[0] += 1
            if fault.contractions:
                with Path(fault.contractions).open("a") as file:
                    file.write(f"{factors.name}\n")
        return contract(factors, strategy, target, root)

    run.contract = noted

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
        self.said, self.limit_s = said, limit_s
        given = (arguments, str(said), vars(fault), limit_s)
        self._process: Any
        if launcher:
            command = [*launcher, sys.executable, "-m", "tests.faulty", json.dumps(given)]
            self._process = subprocess.Popen(command)
        else:
            self._process = _server().Process(target=child, args=given)
            self._process.start()
        self.pid = self._process.pid

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
        return code

    def alive(self) -> bool:
        """Return whether it is still there."""
        if hasattr(self._process, "is_alive"):
            return bool(self._process.is_alive())
        return self._process.poll() is None

    def send(self, number: int) -> None:
        """Send a signal, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faulty", "tests.preload"])
    return context


if __name__ == "__main__":
    child(*json.loads(sys.argv[1]))
