"""A Gram file opened: read-only, of our schema, and with nothing in it that reaches outside it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import h5py

from ntkengine.errors import InputError

SCHEMA = "ntkengine-gram/1"
SHARD_SCHEMA = "ntkengine-shard/1"
GROUPS = ("modules", "crosses")  # matrices by module, numbered, with the module's name as an attribute
ARRAYS = ("cross", "outputs", "eval_outputs", "targets", "eval_targets")
# Filters of HDF5 itself; any other one is code loaded from a plug-in.
_FILTERS = {h5py.h5z.FILTER_DEFLATE: "gzip", h5py.h5z.FILTER_SHUFFLE: "shuffle", h5py.h5z.FILTER_FLETCHER32: "sums"}


def opened(path: Path, schema: str = SCHEMA) -> h5py.File:
    """Return the file, open for reading, after checking what is in it.

    Raises:
        InputError: no such file, not HDF5, truncated, another schema, or something in it that leads out of it.
    """
    if not path.is_file():
        msg = f"{path}: no such file"
        raise InputError(msg)
    try:
        try:
            file = h5py.File(path, "r")
        except BlockingIOError:  # somebody has it open for writing; ours never change once they have their name
            file = h5py.File(path, "r", locking=False)
    except OSError as error:
        msg = f"{path}: not an HDF5 file, or damaged ({str(error).splitlines()[0]})"
        raise InputError(msg) from error
    try:
        found = file.attrs.get("schema")
        if found != schema:
            msg = f"{path}: expected schema {schema!r}, got {found!r}"
            raise InputError(msg)
        _stays_inside(file, file, path)
    except InputError:
        file.close()
        raise
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        file.close()
        msg = f"{path}: is incomplete or damaged ({str(error).splitlines()[0]})"
        raise InputError(msg) from error
    return file


def read_json(file: h5py.File, name: str) -> Any:
    """Return /json/<name>."""
    return json.loads(file[f"json/{name}"].asstr()[()])


def matrices(file: h5py.File) -> list[str]:
    """Return the names of the Gram matrices in a file: what is tiled."""
    names = [name for name in ("gram", "cross") if name in file]
    return names + [f"{group}/{i}" for group in GROUPS for i in sorted(file.get(group, ()), key=int)]


def is_cross(name: str) -> bool:
    """Say whether the rows of a matrix are eval examples."""
    return name == "cross" or name.startswith("crosses/")


def _stays_inside(file: h5py.File, group: h5py.Group, path: Path) -> None:
    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            msg = f"{path}: {group.name.rstrip('/')}/{name} is a link; only plain datasets are read"
            raise InputError(msg)
        item = group[name]
        if isinstance(item, h5py.Group):
            _stays_inside(file, item, path)
            continue
        if not isinstance(item, h5py.Dataset):
            msg = f"{path}: {name} is a {type(item).__name__}; only plain datasets are read"
            raise InputError(msg)
        if item.external:
            msg = f"{path}: {item.name} has its numbers in other files; only plain datasets are read"
            raise InputError(msg)
        plist = item.id.get_create_plist()
        for i in range(plist.get_nfilters()):
            code = plist.get_filter(i)[0]
            if code not in _FILTERS:
                msg = f"{path}: {item.name} is packed by filter {code}; expected {', '.join(_FILTERS.values())} or none"
                raise InputError(msg)
        if item.is_virtual:
            _own_shards(file, item, path)


def _own_shards(file: h5py.File, item: h5py.Dataset, path: Path) -> None:
    allowed = {shard["file"] for shard in read_json(file, "shards")} if "json/shards" in file else set()
    for source in item.virtual_sources():
        if source.file_name not in allowed or Path(source.file_name).name != source.file_name:
            msg = f"{path}: {item.name} reads {source.file_name!r}, which is not one of its shards"
            raise InputError(msg)
    if os.environ.get("HDF5_VDS_PREFIX"):
        msg = f"{path}: HDF5_VDS_PREFIX is set, so its shards would be looked for elsewhere; unset it"
        raise InputError(msg)
