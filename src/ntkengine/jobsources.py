"""Marks of the files a job was made from, by which a command that reads only its Gram sees that they have changed."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

from ntkengine.jobparts import Job

_PIECES, _PIECE = 1024, 4096  # of a file of weights, which may have many gigabytes: pieces, and bytes of each
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin", "*.gguf")
_BESIDE = ("config.json", "adapter_config.json", "tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens*")


def marks(job: Job) -> dict[str, str]:
    """Return marks of the files of examples and of the tokenizer, of their content, and of the weights, of parts of it.

    Cost: reading the examples' files, and 4 MiB of each file of weights.
    """
    data = {"data.train": job.data.train, "data.eval": job.data.eval}
    found = {name: _digest(Path(path)) for name, path in data.items() if path is not None and Path(path).is_file()}
    folder = Path(job.model.path)
    weights, beside = (_files(folder, kinds) if folder.is_dir() else [] for kinds in (_WEIGHTS, _BESIDE))
    told = [f"{file.name} {_digest(file, pieces=file in weights)}" for file in sorted({*weights, *beside})]
    if told:
        found["model.path"] = blake2b(" ".join(told).encode(), digest_size=8).hexdigest()
    return found


def _files(folder: Path, kinds: tuple[str, ...]) -> list[Path]:
    return [file for kind in kinds for file in folder.glob(kind) if file.is_file()]


def _digest(path: Path, *, pieces: bool = False) -> str:
    """Return a mark of a file's bytes, or of its size and of pieces all over it."""
    size = path.stat().st_size
    step = max(_PIECE, size // _PIECES) if pieces else _PIECE
    found = blake2b(str(size).encode(), digest_size=8)
    with path.open("rb") as file:
        for start in range(0, size, step):
            file.seek(start)
            found.update(file.read(_PIECE))
    return found.hexdigest()
