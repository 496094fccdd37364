"""A Gram file opened: read-only, of our schema, and with nothing in it that a Gram file never has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py

from ntkengine.errors import InputError
from ntkengine.store.folder import read_progress
from ntkengine.store.heaps import vet_heaps
from ntkengine.store.schema import SCHEMA
from ntkengine.store.vetting import vet, vet_shapes
from ntkengine.textfile import reason_of


def opened(path: Path, schema: str = SCHEMA) -> h5py.File:
    """Return the file, open for reading, after looking at everything in it but its numbers (`store.vetting`).

    Raises:
        InputError: no such file, not HDF5, truncated, another schema, or something in it that does not belong there.
    """
    if not path.is_file():
        msg = f"{path}: {'is a folder, expected a Gram file' if path.is_dir() else unfinished(path) or 'no such file'}"
        raise InputError(msg)
    if path.suffix == ".toml":
        raise InputError(f"{path}: is a job file, expected the Gram file it writes")
    vet_heaps(path)
    try:
        try:
            file = h5py.File(path, "r")
        except BlockingIOError:  # somebody has it open for writing; ours never change once they have their name
            file = h5py.File(path, "r", locking=False)
    except (OSError, RuntimeError, ValueError) as error:
        msg = f"{path}: {_unopened(error)}"
        raise InputError(msg) from error
    with understood(file, path):
        vet(file, path, whole=schema == SCHEMA)  # first: texts, attributes too, may be where reading them never ends
        found = file.attrs.get("schema")
        if not isinstance(found, str) or found != schema:
            msg = f"{path}: expected schema {schema!r}, got {found!r}"
            raise InputError(msg)
        if schema == SCHEMA:
            vet_shapes(file, path)
    return file


def unfinished(path: Path) -> str:
    """Return that a file is not complete, and how far its job is; empty where no job has begun it."""
    progress = read_progress(path)
    if progress is None:
        return ""
    running, done, total = progress["running"], progress.get("done", 0.0), progress.get("total", 0.0)
    state = {True: "running", False: "stopped", None: "on another machine"}[running]
    if progress["damaged"] and not running:
        state = "damaged tiles are open"
    elif total > 1:
        state = f"{done / total:.0%}, {state}"
    goes_on = "; the same job goes on" if running is False else ""
    return f"not complete ({state}){goes_on}; `ntkengine info {path}` says more"


@contextmanager
def understood(file: h5py.File, path: Path) -> Iterator[None]:
    """Close a file that the block cannot make sense of.

    Raises:
        InputError: the block's own, or that the file is damaged.
    """
    try:
        yield
    except InputError:
        file.close()
        raise
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        file.close()
        msg = f"{path}: is incomplete or damaged ({reason_of(error)})"
        raise InputError(msg) from error


def _unopened(error: BaseException) -> str:
    """Return why HDF5 does not open a file, in plain words where they are known."""
    text = str(error)
    cut = re.search(r"truncated file: eof = (\d+), .*stored_eof = (\d+)", text)
    if cut is not None:
        return f"is cut off: {int(cut[1]):,} of its {int(cut[2]):,} bytes are there"
    if "signature not found" in text:
        return "not an HDF5 file"
    return f"not an HDF5 file, or damaged ({reason_of(error)})"
