"""Files that are damaged behind a job's back: checkpoints, tiles, shards; and repairs that are killed."""

from __future__ import annotations

import signal
from pathlib import Path

import h5py

from ntkengine import store
from tests.faultedjobs import Jobs
from tests.faulty import Child, Fault


class Files(Jobs):
    """Jobs whose files are damaged."""

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
