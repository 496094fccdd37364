"""Checkpoints: pieces of sums in one file each, checked to the last bit before anything is taken from it.

A file is an uncompressed zip archive, as `numpy.savez` writes them, whose format has a checksum of every member:
`state.json`, what the sums hold; `part-<i>.npy`, pieces of Gram matrices; and further arrays. Pieces say which rows and
columns of the whole they are, so that another number of ranks can put its own together from them.
Each rank has two files and overwrites the older; a checkpoint counts when every rank has its file of one `attempt`:
generations alone do not tell the files of two runs, or of a save that failed on one rank and the next, from each other.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ntkengine.store.disk import sync_folder
from ntkengine.store.folder import parts_of

log = logging.getLogger(__name__)

SCHEMA = "ntkengine-checkpoint/2"
_SLOT = re.compile(r"rank-(\d{4})-of-(\d{4})\.[ab]")


@dataclass(frozen=True)
class Part:
    """A piece of a Gram matrix.

    Attributes:
        name: of the module; empty for the whole Gram.
        rows: [start, stop), on the axis of the whole Gram, all ranks and tiles together, in sweep order.
        columns: [start, stop) likewise.
        values: (layers, rows, columns) float64.
        lower: entries right of the whole Gram's diagonal are not computed here.
        symmetric: an entry is its mirror image's too.
    """

    name: str
    rows: tuple[int, int]
    columns: tuple[int, int]
    values: np.ndarray
    lower: bool = False
    symmetric: bool = False


@dataclass(frozen=True)
class Saved:
    """A checkpoint file, whole.

    Attributes:
        path: where it is.
        state: what was given to `save_parts`: among it `generation`, `attempt`, `rank`, `ranks`.
    """

    path: Path
    state: dict[str, Any]

    def array(self, name: str) -> np.ndarray:
        """Return a further array."""
        with zipfile.ZipFile(self.path) as archive:
            return _read(archive, name)


def save_parts(
    path: Path, state: Mapping[str, Any], parts: Iterable[Part], arrays: Mapping[str, np.ndarray] | None = None
) -> None:
    """Write a checkpoint file under its name, atomically; it is on the disk when this returns.

    Args:
        path: the name.
        state: plain JSON types.
        parts: one after the other, so that only one needs to be in memory.
        arrays: further arrays by name.

    Raises:
        OSError: the disk refused; what was under `path` is still there.
    """
    partial = path.with_name(f"{path.name}.partial")
    index = []
    try:
        with partial.open("wb") as handle:
            with zipfile.ZipFile(handle, "w") as archive:
                for i, part in enumerate(parts):
                    _write(archive, f"part-{i}", part.values)
                    index.append({name: value for name, value in vars(part).items() if name != "values"})
                for name, array in (arrays or {}).items():
                    _write(archive, name, array)
                archive.writestr("state.json", json.dumps({"schema": SCHEMA, **state, "parts": index}))
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


def load(path: Path) -> Saved:
    """Return a checkpoint file after comparing every checksum in it.

    Raises:
        OSError: not one, or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                msg = "packed"
                raise ValueError(msg)
            broken = archive.testzip()
            state = json.loads(archive.read("state.json"))
            if broken is None and state.get("schema") == SCHEMA:
                return Saved(path, state)
            msg = f"member {broken}" if broken else f"schema {state.get('schema')!r}"
            raise ValueError(msg)
    except (zipfile.BadZipFile, zlib.error, ValueError, KeyError, EOFError, NotImplementedError, RuntimeError) as error:
        msg = f"{path}: is damaged ({error})"
        raise OSError(msg) from error


def load_newest(folder: Path) -> list[Saved]:
    """Return the files of the newest checkpoint that is whole, rank by rank; empty without one.

    Damaged files are passed over, with a warning.
    """
    found: dict[tuple[int, int, str], dict[int, Saved]] = {}
    damaged = []
    for path in sorted(folder.glob("rank-*")):
        match = _SLOT.fullmatch(path.name)
        if match is None:
            continue
        try:
            saved = load(path)
            state = saved.state
            key = state["generation"], state["ranks"], state["attempt"]
            found.setdefault(key, {})[state["rank"]] = saved
        except (OSError, KeyError) as error:
            damaged.append(str(error))
    whole = [key for key, files in found.items() if len(files) == key[1]]
    best = max(whole, default=None)
    for text in damaged:
        log.warning("%s: %s", text, "starting again" if best is None else f"going on from checkpoint {best[0]}")
    return [] if best is None else [found[best][rank] for rank in range(best[1])]


def read_parts(saved: Saved, wanted: Callable[[Part], object] = lambda _: True) -> Iterator[Part]:
    """Yield the pieces in a checkpoint file, one after the other.

    Args:
        saved: the file.
        wanted: whether to read a piece; takes it without its values.
    """
    with zipfile.ZipFile(saved.path) as archive:
        for i, entry in enumerate(saved.state["parts"]):
            rows, columns = tuple(entry["rows"]), tuple(entry["columns"])
            part = Part(entry["name"], rows, columns, np.empty(0), entry["lower"], entry["symmetric"])
            if wanted(part):
                yield replace(part, values=_read(archive, f"part-{i}"))


def saved_states(out: str | Path) -> list[dict[str, Any]]:
    """Return what the files of an unfinished Gram say: `job`, `tile`, `versions`; files that cannot are left out.

    Cost: reads one small member of each file; the sums are not checked.
    """
    found = []
    for path in sorted(parts_of(Path(out)).glob("rank-*")):
        with (
            suppress(OSError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile),
            zipfile.ZipFile(path) as archive,
        ):
            state = json.loads(archive.read("state.json"))
            found.append({"job": state["job"], "tile": state["tile"], "versions": state.get("versions", {})})
    return found


def extra_name(name: str) -> str:
    """Return what a further array of the Gram file is called in a checkpoint."""
    return f"extra-{name}"


def saved_extra(out: str | Path, name: str) -> np.ndarray | None:
    """Return a further array that an unfinished Gram keeps, None where no file of it has it."""
    for path in sorted(parts_of(Path(out)).glob("rank-0000-*")):
        with (
            suppress(OSError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile),
            zipfile.ZipFile(path) as archive,
        ):
            return _read(archive, extra_name(name))
    return None


def _write(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    array = np.ascontiguousarray(array)
    header = io.BytesIO()
    np.lib.format.write_array_header_2_0(header, np.lib.format.header_data_from_array_1_0(array))
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        member.write(header.getvalue())
        member.write(array.data.cast("B") if array.size else b"")


def _read(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def slots(folder: Path, rank: int, ranks: int) -> Sequence[Path]:
    """Return a rank's two files."""
    return [folder / f"rank-{rank:04d}-of-{ranks:04d}.{slot}" for slot in "ab"]
