"""Every reader and what it is fed with."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.fuzzing import proofs, store_proofs
from bench.fuzzing.hdf5 import mutate_structure
from bench.fuzzing.mutators import broken, broken_json, broken_line


@dataclass(frozen=True)
class Reader:
    """A reader under fire.

    Attributes:
        name: in the table.
        share: of the campaign's inputs.
        files: what is copied for each input.
        home: the folder among the seeds that they are in.
        target: which of them is damaged.
        read: takes the working folder and that of the sound files.
        structured: damages the target's structure instead of its bytes, half of the time.
        refusals: besides `InputError`, what it is documented to raise.
    """

    name: str
    share: float
    files: tuple[str, ...]
    target: str
    read: Callable[[Path, Path], None]
    structured: Callable[[Path, np.random.Generator], None] | None = None
    refusals: tuple[type[Exception], ...] = ()
    home: str = "."

    def damage(self, work: Path, seeds: Path, rng: np.random.Generator) -> None:
        """Put a damaged input into an empty working folder."""
        for name in self.files:
            source = seeds / self.home / name
            shutil.copytree(source, work / name) if source.is_dir() else shutil.copy(source, work / name)
        path = work / self.target
        if path.is_dir():  # a model: one of its files
            parts = sorted(p for p in path.iterdir() if p.suffix in (".json", ".safetensors"))
            path = parts[int(rng.integers(len(parts)))]
        if self.structured is not None and rng.random() < 0.5:
            self.structured(path, rng)
        elif path.suffix == ".json" and rng.random() < 0.5:
            path.write_text(broken_json(path.read_text(), rng))
        else:
            path.write_bytes(broken(path.read_bytes(), rng, [path.read_bytes()]))


def _lines(path: Path, rng: np.random.Generator) -> None:
    path.write_bytes(broken_line(path.read_bytes(), rng))


def _json_lines(path: Path, rng: np.random.Generator) -> None:
    lines = path.read_text().splitlines()
    k = int(rng.integers(len(lines)))
    lines[k] = broken_json(lines[k], rng)
    path.write_text("\n".join(lines))


def _header(path: Path, rng: np.random.Generator) -> None:
    """Damage the JSON at the head of a safetensors file, its length made to fit."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = broken_json(raw[8 : 8 + size].decode(), rng).encode()
    length = len(header) if rng.random() < 0.9 else (0, 1, 2**31, 2**63, 2**64 - 1)[int(rng.integers(5))]
    path.write_bytes(length.to_bytes(8, "little") + header + raw[8 + size :])


_SHARD = "k.rank-0000-of-0002.h5"
_SHARDS = ("k.h5", _SHARD, "k.rank-0001-of-0002.h5")
READERS = {
    reader.name: reader
    for reader in (
        Reader("Gram file", 0.26, ("k.h5",), "k.h5", store_proofs.prove_gram, mutate_structure),
        Reader("Gram file, packed", 0.04, ("k.h5",), "k.h5", store_proofs.prove_gram, mutate_structure, (), "packed"),
        Reader("sharded Gram, whole", 0.04, _SHARDS, "k.h5", store_proofs.prove_gram, mutate_structure, (), "sharded"),
        Reader("sharded Gram, shard", 0.06, _SHARDS, _SHARD, store_proofs.prove_gram, mutate_structure, (), "sharded"),
        Reader("reading commands", 0.02, ("k.h5",), "k.h5", store_proofs.prove_commands, mutate_structure),
        Reader("job TOML", 0.14, ("job.toml",), "job.toml", proofs.prove_job, _lines),
        Reader("examples TSV", 0.06, ("x.tsv",), "x.tsv", proofs.prove_examples("x.tsv")),
        Reader("examples CSV", 0.06, ("x.csv",), "x.csv", proofs.prove_examples("x.csv")),
        Reader("examples JSONL", 0.07, ("x.jsonl",), "x.jsonl", proofs.prove_examples("x.jsonl"), _json_lines),
        Reader("examples JSON", 0.02, ("x.json",), "x.json", proofs.prove_examples("x.json")),
        Reader("ranking JSON", 0.05, ("ranking.json",), "ranking.json", proofs.prove_ranking),
        Reader("peft JSON", 0.03, ("peft.json",), "peft.json", proofs.prove_peft),
        Reader("safetensors", 0.07, ("model.safetensors",), "model.safetensors", proofs.prove_safetensors, _header),
        Reader("model folder", 0.015, ("model",), "model", proofs.prove_model(stream=False)),
        Reader("model folder, streamed", 0.015, ("model",), "model", proofs.prove_model(stream=True)),
        Reader(
            "checkpoint",
            0.04,
            ("rank-0000-of-0001.a",),
            "rank-0000-of-0001.a",
            store_proofs.prove_checkpoint,
            None,
            (OSError,),
        ),
        Reader("progress JSON", 0.02, ("progress.json",), "progress.json", store_proofs.prove_progress),
    )
}
