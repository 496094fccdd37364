"""A finished Gram written to its file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ntkengine.gram.result import Gram
from ntkengine.store.disk import Latched, appearing
from ntkengine.store.schema import ARRAYS, GROUPS, SCHEMA
from ntkengine.store.tiles import checksum, checksum_of, slabs, tile_places, tile_shape, tiles_name


def write_gram(
    path: Path, gram: Gram, job: Mapping[str, Any], ids: Mapping[str, list[str]], partial: Path | None = None
) -> None:
    """Write a finished Gram under its name, atomically.

    Args:
        path: the file; its folder exists.
        gram: numpy-backed.
        job: what defines the values; another job's file is told from it.
        ids: `example_id`, `eval_id`: names of the examples, or nothing.
        partial: the file's name until it is complete.

    Raises:
        OSError: the disk refused; nothing is left under `path`.
    """
    with appearing(path, partial) as (file, raw):
        write_facts(file, raw, gram, job, ids)
        tiled: dict[str, Any] = {"gram": gram.values}
        tiled |= {} if gram.cross is None else {"cross": gram.cross}
        for group, parts in zip(GROUPS, (gram.modules, gram.cross_modules), strict=True):
            tiled |= {f"{group}/{i}": matrix for i, matrix in enumerate(parts.values())}
        for name, values in tiled.items():  # room for all of them first
            create_tiled(file, name, values.shape, values.dtype)
        for name, values in tiled.items():
            fill(file, raw, name, values)
        write_names(file, gram)


def write_names(file: h5py.File, gram: Gram) -> None:
    """Write which module each matrix of a module is of."""
    for group, parts in zip(GROUPS, (gram.modules, gram.cross_modules), strict=True):
        for i, name in enumerate(parts):
            file[f"{group}/{i}"].attrs.update({"name": name, "crc32": checksum_of(name)})


def write_facts(
    file: h5py.File, raw: Latched, gram: Gram, job: Mapping[str, Any], ids: Mapping[str, list[str]]
) -> None:
    """Write everything but the matrices.

    Raises:
        OSError: the disk refused.
    """
    for name in ARRAYS:
        array = getattr(gram, name)
        if array is not None and name != "cross":
            _write_array(file, raw, name, np.asarray(array))
    for name, array in gram.extras.items():
        _write_array(file, raw, f"extras/{name}", array if hasattr(array, "shape") else np.asarray(array))
    for name, names in ids.items():
        dataset = file.create_dataset(name, data=list(names), dtype=h5py.string_dtype())
        dataset.attrs["crc32"] = checksum_of(list(names))
    plan = gram.plan.to_dict() if gram.plan else None
    for name, value in (("job", dict(job)), ("meta", gram.meta), ("plan", plan)):
        write_json(file, name, value)
    attributes: dict[str, Any] = {"schema": SCHEMA, "contraction": gram.contraction, "transform": gram.transform}
    attributes |= {"precision": str(gram.meta.get("precision", "")), "noise": float(gram.noise)}
    if gram.meta.get("sketch"):
        attributes["sketch"] = gram.meta["sketch"]["features"]
    for name, value in attributes.items():
        file.attrs[name] = value
    file.attrs["crc32"] = checksum_of(attributes)


def write_json(file: h5py.File, name: str, value: Any) -> None:
    """Write /json/<name>: a dataset, because attributes end at 64 KiB."""
    text = json.dumps(value)
    file.create_dataset(f"json/{name}", data=text, dtype=h5py.string_dtype()).attrs["crc32"] = checksum_of(text)


def create_tiled(
    file: h5py.File, name: str, shape: tuple[int, ...], dtype: Any, *, compress: bool = False
) -> h5py.Dataset:
    """Make room for a matrix, its checksums and its flags, all of them off.

    Args:
        file: being written.
        name: of the dataset.
        shape: (…, rows, columns).
        dtype: of its numbers.
        compress: by gzip, with bytes of the same place in a number side by side.
    """
    packed: dict[str, Any] = {"compression": "gzip", "compression_opts": 4, "shuffle": True} if compress else {}
    if not compress:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        packed = {"dcpl": plist}
    count = len(tile_places(shape))
    group = tiles_name(name)
    file.create_dataset(f"{group}/crc32", data=np.zeros(count, dtype=np.uint32))
    file.create_dataset(f"{group}/done", data=np.zeros(count, dtype=bool))
    return file.create_dataset(name, shape=shape, dtype=dtype, chunks=tile_shape(shape), **packed)


def fill(file: h5py.File, raw: Latched, name: str, values: Any, row: int = 0) -> None:
    """Write the tiles of a matrix, or of some of its rows, their checksums and flags.

    Args:
        file: with room for it.
        raw: what it writes to.
        name: of the dataset.
        values: (…, rows, columns), array or dataset.
        row: of the dataset, where they start: the first of a tile.

    Raises:
        OSError: the disk refused.
    """
    sums, done = (file[f"{tiles_name(name)}/{kind}"] for kind in ("crc32", "done"))
    dataset = file[name]
    for k, where in enumerate(tile_places(dataset.shape)):
        *layer, r, c = where
        if not row <= r.start < row + values.shape[-2]:
            continue
        tile = np.ascontiguousarray(values[(*layer, slice(r.start - row, r.stop - row), c)])
        dataset[where] = tile
        sums[k] = checksum(tile)
        done[k] = True
        raw.check()


def _write_array(file: h5py.File, raw: Latched, name: str, array: Any) -> None:
    """Write an array, or what is like one and is read bit by bit."""
    dataset = file.create_dataset(name, shape=array.shape, dtype=array.dtype)
    total = 0
    for where in slabs(array.shape):
        part = np.asarray(array[where])
        dataset[where] = part
        total = checksum(part, total)
        raw.check()
    dataset.attrs["crc32"] = total
