"""Jobs killed, stopped, out of disk, damaged; and what must hold of them afterwards."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

from tests.faultedfiles import Files
from tests.faulty import Child, Fault


class Campaign(Files):
    """Faults injected into jobs on one model, each in a folder of its own: processes that end, disks that fill."""

    def killed(
        self,
        share: float,
        *,
        checkpoint_s: float = 0.0,
        pause_s: float = 0.0,
        times: int = 1,
        launcher: list[str] | None = None,
    ) -> None:
        """SIGKILL one rank after a share of the job's life, once or several times in a row; then let it finish.

        Args:
            share: of the job's life.
            checkpoint_s: between checkpoints.
            pause_s: before each contraction.
            times: how often.
            launcher: of the last run, when that has another number of ranks.
        """
        where = self._new()
        kind = "SIGKILL" if launcher is None else "SIGKILL, then another number of ranks"
        for _ in range(times):
            job = self.start(where, fault=Fault(pause_s=pause_s), checkpoint_s=checkpoint_s)
            job.until_started(self.ranks)
            time.sleep(share * (self.seconds + pause_s * self.total))
            job.send(signal.SIGKILL, self._any_rank())
            if job.wait() is None:
                self._note(kind, where, "it hung")
                return
        self._finish(kind, where, launcher=launcher)

    def killed_at_operation(self, number: int, rank: int = 0) -> None:
        """SIGKILL a rank right before a disk operation."""
        where = self._new()
        if self.run(where, fault=Fault(disk_at=number, rank=rank)) not in (-signal.SIGKILL, signal.SIGKILL):
            self._note("SIGKILL at a disk operation", where, f"it lived: {self.said(where)}")
            return
        self._finish("SIGKILL at a disk operation", where)

    def operations(self, rank: int = 0) -> int:
        """Return how many disk operations the job has on a rank."""
        where = self._new()
        if self.run(where, fault=Fault(operations=str(where / "operations"), rank=rank)) != 0:
            msg = f"the uninterrupted job failed: {self.said(where)}"
            raise RuntimeError(msg)
        return int((where / "operations").read_text())

    def raises(self, share: float) -> None:
        """Let one rank raise in the midst of its sweep."""
        where, rank = self._new(), self._any_rank()
        code = self.run(where, fault=Fault(raises_at=int(share * self.total), rank=rank))
        last = self._last(where)
        fine = code == 1 and last.startswith(f"error: rank {rank} (") and last.endswith("OSError: out of luck")
        if fine and self.summed(where):
            self._finish("a rank that raises", where)
        else:
            self._note("a rank that raises", where, f"exit {code}: {last}")

    def stopped(self, share: float) -> None:
        """SIGTERM while it sums."""
        where = self._new()
        job = self.start(where, fault=Fault(pause_s=0.05), checkpoint_s=300.0)
        self._until(job, where, int(share * self.total))
        job.send(signal.SIGTERM, self._any_rank())
        code = job.wait()
        last = self._last(where)
        fine = code == 128 + signal.SIGTERM and last == "error: stopped by SIGTERM: the same command goes on from here"
        if fine and self.summed(where):
            self._finish("SIGTERM", where)
        else:
            self._note("SIGTERM", where, f"exit {code}: {last}")

    def full_disk(self, share: float, room: int = 4000) -> None:
        """No file may grow beyond some bytes once a share of the job is summed."""
        where = self._new()
        fault = Fault(room_at=int(share * self.total), room=room, rank=self._any_rank())
        self._without_room("full disk (limit on the file size)", where, fault)

    def full_tmpfs(self, share: float) -> bool:
        """Fill a small file system once a share of the job is summed; return False where none can be mounted."""
        where = self._new()
        disk = where / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            return False
        try:
            ballast = disk / "ballast"
            fault = Fault(room_at=int(share * self.total), ballast=str(ballast), rank=self._any_rank())
            self._without_room("full disk (tmpfs)", where, fault)
        finally:
            subprocess.run(["umount", str(disk)], check=True)
        return True

    def _without_room(self, kind: str, where: Path, fault: Fault) -> None:
        code = self.run(where, fault=fault)
        last = self._last(where)
        held = len(self.summed(where))
        if fault.ballast:
            Path(fault.ballast).unlink()
        kept = "from the one before" if held else "starts again"
        fine = code == 1 and last.startswith("error:") and kept in last and not self.out(where).exists()
        # Ranks write checkpoints after a block, not after every parameter.
        if fine and (held == fault.room_at if self.ranks == 1 else held <= fault.room_at):
            self._finish(kind, where)
        else:
            self._note(kind, where, f"exit {code}, {held} of {fault.room_at} kept: {last}")

    def second_process(self) -> None:
        """Start the same job twice."""
        where = self._new()
        job = self.start(where, fault=Fault(pause_s=0.05))
        self._until(job, where, 1)
        for rank in range(self.ranks):  # until the second one has spoken
            job.send(signal.SIGSTOP, rank)
        (where / "second").mkdir()
        there = Child(self._arguments(where, 0.0), where / "second" / "said", Fault(), self.launcher, self.limit_s)
        code, last = there.wait(), self._last(where / "second")
        for rank in range(self.ranks):
            job.send(signal.SIGCONT, rank)
        if code != 2 or "is being computed by process" not in last:
            self._note("second process", where, f"exit {code}: {last}")
        elif job.wait() != 0 or not self._right(where, exactly=True):
            self._note("second process", where, "the first one was harmed")
        else:
            self._note("second process", where)

    def another_job(self) -> None:
        """Kill, then start a job of other settings on the same file."""
        where = self._new()
        self.run(where, fault=Fault(dies_at=self.total // 2, rank=self._any_rank()))
        code = self.run(where, "--contraction", "full")
        last = self._last(where)
        fine = code == 2 and "unfinished run of another job" in last and "contraction" in last
        self._note("another job", where, "" if fine else f"exit {code}: {last}")
