"""What a Gram file calls things, and how its texts are read."""

from __future__ import annotations

from typing import Any

import h5py
import numpy as np

from ntkengine.errors import InputError
from ntkengine.store.tiles import checksum_of
from ntkengine.textfile import check_plain, parse_json

SCHEMA = "ntkengine-gram/1"
SHARD_SCHEMA = "ntkengine-shard/1"
GROUPS = ("modules", "crosses")  # matrices by module, numbered, with the module's name as an attribute
ARRAYS = ("cross", "outputs", "eval_outputs", "targets", "eval_targets")


def read_json(file: h5py.File, name: str, kind: type | tuple[type, ...] = dict) -> Any:
    """Return /json/<name>.

    Args:
        file: it is in.
        name: job, meta, plan or shards.
        kind: what it must be.

    Raises:
        InputError: it does not match its checksum, is no JSON, or of another kind.
        KeyError: it is not there.
    """
    dataset = file[f"json/{name}"]
    text, where = dataset.asstr()[()], f"{file.filename}: {dataset.name}"
    if not matches(dataset, checksum_of(text)):
        raise InputError(f"{where} does not match its checksum")
    value = parse_json(text, where)
    if not isinstance(value, kind):
        raise InputError(f"{where}: expected another kind of value, got {type(value).__name__}")
    return value


def matches(item: h5py.Dataset | h5py.File, found: int) -> bool:
    """Say whether a checksum is the one that was written; files from before there were any match."""
    return "crc32" not in item.attrs or bool(np.all(item.attrs["crc32"] == found))


def root(file: h5py.File) -> dict[str, Any]:
    """Return the root's attributes but their checksum, as plain types: what the checksum is of."""
    return {k: v.item() if isinstance(v, np.generic) else v for k, v in file.attrs.items() if k != "crc32"}


def module_of(matrix: h5py.Dataset) -> str:
    """Return the name of the module that a matrix is of.

    Raises:
        InputError: there is none, or it does not match its checksum.
    """
    name = matrix.attrs.get("name")
    if not isinstance(name, str) or not matches(matrix, checksum_of(name)):
        raise InputError(f"{matrix.file.filename}: {matrix.name}: its module's name {name!r} is damaged")
    check_plain(name)
    return name


def matrices(file: h5py.File) -> list[str]:
    """Return the names of the Gram matrices in a file: what is tiled."""
    names = [name for name in ("gram", "cross") if name in file]
    return names + [f"{group}/{i}" for group in GROUPS for i in sorted(file.get(group, ()), key=int)]


def is_cross(name: str) -> bool:
    """Say whether the rows of a matrix are eval examples."""
    return name == "cross" or name.startswith("crosses/")
