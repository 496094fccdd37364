"""Jobs to which something happens: started in folders of their own, finished, and compared with one left alone.

Every fault ends in a resumed file that is the uninterrupted one to the last bit (to the noise, where tiles were
computed again), or in a refusal in one line. Anything else is `lost`.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ntkengine import store
from tests.faulty import LIMIT_S, ROWS, TILE, Child, Fault
from tests.tiny import save_tiny, tiny_sentences


@dataclass
class Jobs:
    """Jobs on one model, each in a folder of its own, and what became of them.

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
