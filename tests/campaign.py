"""Jobs killed, stopped, out of disk, damaged; and what must hold of them afterwards.

Every fault ends in a resumed file that is the uninterrupted one to the last bit (to the noise, where tiles were
computed again), or in a refusal in one line. Anything else is `lost`.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ntkengine import store
from tests.faulty import LIMIT_S, ROWS, TILE, Child, Fault
from tests.tiny import save_tiny, tiny_sentences


@dataclass
class Campaign:
    """Faults injected into jobs on one model, each in a folder of its own.

    Args:
        folder: for everything.
        launcher: command before the interpreter's, for several ranks.
        ranks: how many it starts.
        seed: of the moments.
        flags: of the job, besides its own.
        limit_s: seconds after which a job has hung, if the uninterrupted one took less than a tenth of that.

    Attributes:
        tally: by kind of fault: injected, resumed, refused, lost.
        lost: what was wrong, in words.
    """

    folder: Path
    launcher: list[str] = field(default_factory=list)
    ranks: int = 1
    seed: int = 0
    flags: tuple[str, ...] = ("--no-fit-head",)
    limit_s: float = LIMIT_S
    tally: dict[str, list[int]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        store.tiles.TILE = TILE
        self.rng = np.random.default_rng(self.seed)
        self.count = 0
        self.folder.mkdir(exist_ok=True)
        save_tiny(self.folder / "model")
        for name, n, seed in (("train", ROWS[0], 0), ("dev", ROWS[1], 1)):
            rows = [f"{text}\t{('bad', 'good')[i % 2]}" for i, text in enumerate(tiny_sentences(n, seed))]
            (self.folder / f"{name}.tsv").write_text("sentence\tlabel\n" + "\n".join(rows) + "\n")
        self.reference = self._new()
        limit_s, self.limit_s = self.limit_s, LIMIT_S
        job = self.start(self.reference)
        job.until_started(self.ranks)
        began = time.monotonic()
        if job.wait() != 0:
            msg = f"the uninterrupted job failed: {self.said(self.reference)}"
            raise RuntimeError(msg)
        self.seconds = time.monotonic() - began
        self.limit_s = max(limit_s, 10 * self.seconds)  # a busy machine does not hang
        self.total = len(self.contractions(self.reference))

    def start(
        self,
        where: Path,
        *flags: str,
        fault: Fault | None = None,
        checkpoint_s: float = 0.0,
        launcher: list[str] | None = None,
    ) -> Child:
        """Start the job of a folder."""
        arguments = [*self._arguments(where, checkpoint_s), *flags]
        fault = fault or Fault()
        fault.contractions, fault.started = str(where / "contractions"), str(where / "started")
        for old in (*where.glob("contractions-*"), *where.glob("started-*")):
            old.unlink()
        return Child(arguments, where / "said", fault, self.launcher if launcher is None else launcher, self.limit_s)

    def run(self, where: Path, *flags: str, **options: Any) -> int | None:
        """Run the job of a folder to whatever end; options as `start`."""
        return self.start(where, *flags, **options).wait()

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

    def damaged_checkpoint(self, *, both: bool = False, truncated: bool = False) -> None:
        """Kill, then flip a bit of the newest checkpoint or cut it, or of both."""
        where = self._new()
        self.run(where, fault=Fault(dies_at=self.total // 2, rank=self._any_rank()))
        newest = store.load_newest(where / ".k.h5.parts")
        one = newest[int(self.rng.integers(len(newest)))].path
        for path in sorted((where / ".k.h5.parts").glob("rank-*")) if both else [one]:
            whole = bytearray(path.read_bytes())
            whole[int(self.rng.integers(len(whole) // 4, len(whole) // 2))] ^= 1 << int(self.rng.integers(8))
            path.write_bytes(whole[: len(whole) // 2] if truncated else whole)
        left = self.summed(where)
        if bool(left) == both:
            self._note("damaged checkpoint", where, "the damage was not seen")
            return
        self._finish("damaged checkpoint", where)

    def flipped_tiles(self, count: int) -> None:
        """Flip a bit in each of some tiles of the finished file, or of its shards."""
        where = self._copy()
        names = self._flip(where, count)
        problems = store.verify_gram(where / "k.h5")
        if len(problems) != count or not all("does not match its checksum" in text for text in problems):
            self._note("flipped tiles", where, f"{len(problems)} of {count} found in {names}")
            return
        store.repair_gram(where / "k.h5")
        self._finish("flipped tiles", where, exactly=False)

    def harmed_shard(self, harm: str) -> None:
        """Cut a shard of the finished file, remove it, move it away and back, or put another run's in its place."""
        where, kind = self._copy(), f"{harm} shard"
        shards = sorted(where.glob("k.rank-*"))
        shard = shards[int(self.rng.integers(len(shards)))]
        away = shard.with_name("away")
        shard.rename(away)
        if harm == "truncated":
            shard.write_bytes(away.read_bytes()[: int(self.rng.integers(1, away.stat().st_size))])
        elif harm == "exchanged":
            shard.write_bytes((shards[0] if shard != shards[0] else shards[1]).read_bytes())
        code, last = self.run(where), self._last(where)
        if code != 2 or f"its shard {shard.name}" not in last or not store.verify_gram(where / "k.h5"):
            self._note(kind, where, f"exit {code}: {last}")
            return
        away.rename(shard)
        self._note(kind, where, "" if self._right(where, exactly=True) else "the file is wrong once it is back")

    def killed_in_repair(self, number: int, *, later: bool) -> None:
        """SIGKILL before a disk operation of `verify --repair`, or of the run that computes the open tiles."""
        where = self._copy()
        self._flip(where, 20)
        fault = Fault(disk_at=number)
        if later:
            store.repair_gram(where / "k.h5")
            fault.rank = 0  # which repairs alone
            code = self.run(where, fault=fault)
        else:
            code = Child(["verify", "--repair", str(where / "k.h5")], where / "said", fault, [], self.limit_s).wait()
        if code not in (-signal.SIGKILL, signal.SIGKILL):
            self._note("SIGKILL while repairing", where, f"exit {code}")
            return
        if (where / "k.h5").exists():
            store.repair_gram(where / "k.h5")
        self._finish("SIGKILL while repairing", where, exactly=False)

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

    def table(self) -> str:
        """Return the tally as text."""
        lines = [f"{'fault':<30}{'injected':>9}{'resumed':>9}{'refused':>9}{'lost':>6}"]
        lines += [f"{kind:<30}{a:>9}{b:>9}{c:>9}{d:>6}" for kind, (a, b, c, d) in self.tally.items()]
        sums = [sum(column) for column in zip(*self.tally.values(), strict=True)]
        return "\n".join([*lines, f"{'all':<30}{sums[0]:>9}{sums[1]:>9}{sums[2]:>9}{sums[3]:>6}"])

    def out(self, where: Path) -> Path:
        """Return the Gram file of a folder."""
        return (where / "disk" if (where / "disk").exists() else where) / "k.h5"

    def said(self, where: Path) -> str:
        """Return what the jobs of a folder have printed."""
        return (where / "said").read_text()

    def contractions(self, where: Path) -> list[str]:
        """Return the contractions of the folder's last job, on the rank that has the most."""
        found = [path.read_text().split() for path in where.glob("contractions-*")]
        return max(found, key=len, default=[])

    def summed(self, where: Path) -> set[str]:
        """Return the parameters that the folder's newest checkpoint holds."""
        return {name for saved in store.load_newest(store.parts_of(self.out(where))) for name in saved.state["done"]}

    def _finish(self, kind: str, where: Path, *, exactly: bool = True, launcher: list[str] | None = None) -> None:
        exactly = exactly and launcher is None  # other ranks sum in another order
        path = self.out(where)
        if path.exists() and not self._right(where, exactly=exactly):
            self._note(kind, where, "a file under its name is wrong")
            return
        before = set() if path.exists() else self.summed(where)
        code = self.run(where, launcher=launcher)
        twice = before & set(self.contractions(where))
        if code != 0:
            self._note(kind, where, f"exit {code}: {self.said(where)}")
        elif twice and exactly:
            self._note(kind, where, f"{len(twice)} of {len(before)} contractions were repeated")
        elif not self._right(where, exactly=exactly):
            self._note(kind, where, "the resumed file is wrong")
        elif [p.name for p in path.parent.iterdir() if p.name.startswith(".") or "partial" in p.name]:
            self._note(kind, where, "something is left behind")
        else:
            self._note(kind, where, resumed=True)

    def _right(self, where: Path, *, exactly: bool) -> bool:
        if store.verify_gram(self.out(where)):
            return False
        got, wanted = store.open_gram(self.out(where)), store.open_gram(self.reference / "k.h5")
        pairs = [(got.values, wanted.values), (got.cross, wanted.cross), (got.outputs, wanted.outputs)]
        pairs += [(got.modules[name], matrix) for name, matrix in wanted.modules.items()]
        pairs += [(got.extras[name], array) for name, array in wanted.extras.items()]
        scale = np.linalg.norm(wanted.values[...])
        if exactly:
            return list(got.modules) == list(wanted.modules) and all(np.array_equal(a[...], b[...]) for a, b in pairs)
        return all(np.linalg.norm(a[...] - b[...]) <= 1e-5 * scale for a, b in pairs)

    def _note(self, kind: str, where: Path, wrong: str = "", *, resumed: bool = False) -> None:
        row = self.tally.setdefault(kind, [0, 0, 0, 0])
        row[0] += 1
        row[3 if wrong else 1 if resumed else 2] += 1
        if wrong:
            self.lost.append(f"{kind} in {where}: {wrong}")

    def _new(self) -> Path:
        self.count += 1
        where = self.folder / f"{self.count:03d}"
        where.mkdir()
        return where

    def _copy(self) -> Path:
        where = self._new()
        for path in self.reference.glob("k.*"):
            shutil.copy(path, where)
        return where

    def _any_rank(self) -> int:
        return int(self.rng.integers(self.ranks))

    def _last(self, where: Path) -> str:
        """Return the last line of what the jobs of a folder have said, not what their launcher adds."""
        lines = [line for line in self.said(where).splitlines() if line.startswith("error:") or self.ranks == 1]
        return lines[-1] if lines else "nothing"

    def _arguments(self, where: Path, checkpoint_s: float) -> list[str]:
        files = {"--model": "model", "--data": "train.tsv", "--eval": "dev.tsv"}
        arguments = ["gram", *(x for k, v in files.items() for x in (k, str(self.folder / v)))]
        arguments += ["--text-column", "sentence", "--params", "all", "--per-module", *self.flags]
        return [*arguments, "--out", str(self.out(where)), "--checkpoint-s", str(checkpoint_s)]

    def _until(self, job: Child, where: Path, contractions: int) -> None:
        while job.alive() and len(self.contractions(where)) < contractions:
            time.sleep(0.01)

    def _flip(self, where: Path, count: int) -> list[str]:
        """Flip a bit in each of `count` tiles of a folder's file and its shards; return their datasets."""
        chunks = []
        for path in sorted(where.glob("k.*")):
            with h5py.File(path) as file:
                names = [n for n in ("gram", "cross", *(f"modules/{i}" for i in file["modules"])) if n in file]
                names = [name for name in names if not file[name].is_virtual]
                chunks += [(path, name, k) for name in names for k in range(file[name].id.get_num_chunks())]
        chosen = [chunks[i] for i in self.rng.choice(len(chunks), count, replace=False)]
        for path, name, k in chosen:
            with h5py.File(path) as file:
                info, dataset = file[name].id.get_chunk_info(k), file[name]
                rows, columns = (
                    min(chunk, size - at)
                    for chunk, size, at in zip(dataset.chunks, dataset.shape, info.chunk_offset, strict=True)
                )
                entry = int(self.rng.integers(rows)) * dataset.chunks[1] + int(self.rng.integers(columns))
                place = info.byte_offset + 8 * entry + int(self.rng.integers(8))
            whole = bytearray(path.read_bytes())
            whole[place] ^= 1 << int(self.rng.integers(8))
            path.write_bytes(whole)
        return [name for _, name, _ in chosen]
