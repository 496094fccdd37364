"""Marks of the files a job was made from, by which a command that reads only its Gram sees that they have changed."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

from ntkengine.jobparts import Job

_ENDS = 1 << 20  # bytes of either end of a file of weights, which may have many gigabytes
_WEIGHTS = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")


def marks(job: Job) -> dict[str, str]:
    """Return a mark of each file of examples, of its content, and of the model's, of their sizes and ends.

    Cost: reading the examples' files, and 2 MiB of each of the model's.
    """
    data = {"data.train": job.data.train, "data.eval": job.data.eval}
    found = {name: _digest(Path(path)) for name, path in data.items() if path is not None and Path(path).is_file()}
    folder = Path(job.model.path)
    files = (
        sorted({file for kind in _WEIGHTS for file in folder.glob(kind) if file.is_file()}) if folder.is_dir() else []
    )
    if files:
        ends = [f"{file.name} {file.stat().st_size} {_digest(file, _ENDS)}" for file in files]
        found["model.path"] = blake2b(" ".join(ends).encode(), digest_size=8).hexdigest()
    return found


def _digest(path: Path, ends: int | None = None) -> str:
    """Return a mark of a file's bytes, or of so many at its start and at its end."""
    found = blake2b(digest_size=8)
    with path.open("rb") as file:
        if ends is None:
            while chunk := file.read(1 << 20):
                found.update(chunk)
        else:
            found.update(file.read(ends))
            file.seek(max(0, path.stat().st_size - ends))
            found.update(file.read(ends))
    return found.hexdigest()
