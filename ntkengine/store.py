"""Gram matrices in HDF5, readable with plain h5py, HDFView or MATLAB. The only h5py import.

/gram                 float64, (N, M), (N·C, M·C) or (C, N, M); chunks are tiles
/cross                eval × train in the same layout, when there is an eval set
/modules/<i>          per-module Grams, attribute `name`
/outputs /targets     (N, C) float64;   /eval_outputs /eval_targets  (M, C)
/example_id           N strings;        /eval_id  M strings
/tiles/crc32          checksum of each tile of /gram;   /tiles/done  its flag
/extras/<name>        further arrays
/json/<name>          job (what defines the values), meta, plan
Root attributes: schema, contraction, transform, precision, noise; sketch, its features, when there is one.
A file appears under its name only when it is complete.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ntkengine.errors import InputError
from ntkengine.gram.plan import Plan
from ntkengine.gram.result import Gram

SCHEMA = "ntkengine-gram/1"
TILE = 256
_ARRAYS = ("cross", "outputs", "eval_outputs", "targets", "eval_targets")


class Modules(Mapping[str, Any]):
    """Per-module Grams by name, read when asked for."""

    def __init__(self, group: h5py.Group) -> None:
        self._group = group
        self._index = {str(group[i].attrs["name"]): i for i in sorted(group, key=int)}

    def __getitem__(self, name: str) -> Any:
        return self._group[self._index[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)


def write_gram(path: Path, gram: Gram, job: Mapping[str, Any], ids: Mapping[str, list[str]]) -> None:
    """Write a finished Gram under its name, atomically.

    Args:
        path: the file; its folder exists.
        gram: numpy-backed.
        job: what defines the values; another job's file is told from it.
        ids: `example_id`, `eval_id`: names of the examples, or nothing.

    Raises:
        OSError: the disk refused; nothing is left under `path`.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with h5py.File(partial, "w") as file:
            values = np.asarray(gram.values)
            file.create_dataset("gram", data=values, chunks=_tile_shape(values.shape))
            for name in _ARRAYS:
                array = getattr(gram, name)
                if array is not None:
                    file.create_dataset(name, data=np.asarray(array))
            for i, (name, matrix) in enumerate(gram.modules.items()):
                dataset = file.create_dataset(f"modules/{i}", data=np.asarray(matrix), chunks=_tile_shape(matrix.shape))
                dataset.attrs["name"] = name
            for name, array in gram.extras.items():
                file.create_dataset(f"extras/{name}", data=np.asarray(array))
            for name, names in ids.items():
                file.create_dataset(name, data=names, dtype=h5py.string_dtype())
            sums = [zlib.crc32(tile.tobytes()) for tile in _tiles(values)]
            file.create_dataset("tiles/crc32", data=np.array(sums, dtype=np.uint32))
            file.create_dataset("tiles/done", data=np.ones(len(sums), dtype=bool))
            file.attrs["schema"] = SCHEMA
            file.attrs["contraction"], file.attrs["transform"] = gram.contraction, gram.transform
            file.attrs["precision"] = str(gram.meta.get("precision", ""))
            file.attrs["noise"] = gram.noise
            if gram.meta.get("sketch"):
                file.attrs["sketch"] = gram.meta["sketch"]["features"]
            for name, value in (
                ("job", dict(job)),
                ("meta", gram.meta),
                ("plan", gram.plan.to_dict() if gram.plan else None),
            ):
                # A dataset, because attributes end at 64 KiB.
                file.create_dataset(f"json/{name}", data=json.dumps(value), dtype=h5py.string_dtype())
            file.flush()
        with partial.open("rb") as handle:
            os.fsync(handle.fileno())
        partial.replace(path)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


def open_gram(path: str | Path) -> Gram:
    """Return a Gram backed by its file, opened read-only: `values`, `cross` and `modules` stay on disk until indexed.

    Raises:
        InputError: no such file, not an HDF5 file, or not one of this schema.
    """
    path = Path(path)
    file = _open(path)
    try:
        arrays: dict[str, Any] = {
            name: file[name][...] if name in file else None for name in _ARRAYS if name != "cross"
        }
        plan = _json(file, "plan")
        return Gram(
            values=file["gram"],
            cross=file.get("cross"),
            contraction=str(file.attrs["contraction"]),
            transform=str(file.attrs["transform"]),
            noise=float(file.attrs["noise"]),
            modules=Modules(file["modules"]) if "modules" in file else {},
            plan=Plan.from_dict(plan) if plan else None,
            meta=_json(file, "meta") | {"job": _json(file, "job")} | _ids(file),
            extras={name: file[f"extras/{name}"][...] for name in file.get("extras", ())},
            path=path,
            **arrays,
        )
    except (KeyError, ValueError, TypeError) as error:
        file.close()
        msg = f"{path}: is incomplete or damaged ({error})"
        raise InputError(msg) from error


def read_job(path: str | Path) -> dict[str, Any]:
    """Return what defined a file's values.

    Raises:
        InputError: as `open_gram`.
    """
    with _open(Path(path)) as file:
        return _json(file, "job")


def verify_gram(path: str | Path) -> list[str]:
    """Return what is wrong with a file; an empty list when every tile has its checksum and every number is finite.

    Raises:
        InputError: as `open_gram`.
    """
    problems = []
    with _open(Path(path)) as file:
        try:
            sums, done = file["tiles/crc32"][...], file["tiles/done"][...]
            tiles = list(_tiles(file["gram"]))
        except (KeyError, OSError) as error:
            return [f"a dataset is missing or unreadable: {error}"]
        if len(tiles) != len(sums):
            problems.append(f"{len(tiles)} tiles but {len(sums)} checksums")
        for i, (tile, crc, finished) in enumerate(zip(tiles, sums, done, strict=False)):
            if not finished:
                problems.append(f"tile {i} of /gram is not done")
            elif zlib.crc32(tile.tobytes()) != crc:
                problems.append(f"tile {i} of /gram does not match its checksum")
        datasets: list[h5py.Dataset] = []
        file.visititems(lambda _name, item: datasets.append(item) if isinstance(item, h5py.Dataset) else None)
        bad = [d.name for d in datasets if d.dtype.kind == "f" and not np.isfinite(d[...]).all()]
        problems += [f"{name} has values that are not finite" for name in bad]
        noise = float(file.attrs.get("noise", np.nan))
        if not np.isfinite(noise):
            problems.append("the noise is not a finite number")
    return problems


def first_difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """Return `key: found, wanted` for the first setting in which two jobs differ, or None."""
    for key in [*wanted, *(k for k in found if k not in wanted)]:
        if found.get(key) != wanted.get(key):
            return f"{key} is {found.get(key)!r} there, {wanted.get(key)!r} here"
    return None


def _open(path: Path) -> h5py.File:
    if not path.is_file():
        msg = f"{path}: no such file"
        raise InputError(msg)
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        msg = f"{path}: not an HDF5 file, or damaged ({str(error).splitlines()[0]})"
        raise InputError(msg) from error
    schema = file.attrs.get("schema")
    if schema != SCHEMA:
        file.close()
        msg = f"{path}: expected schema {SCHEMA!r}, got {schema!r}"
        raise InputError(msg)
    return file


def _json(file: h5py.File, name: str) -> Any:
    return json.loads(file[f"json/{name}"].asstr()[()])


def _ids(file: h5py.File) -> dict[str, list[str]]:
    return {name: file[name].asstr()[...].tolist() for name in ("example_id", "eval_id") if name in file}


def _tile_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    rows, columns = (max(1, min(TILE, n)) for n in shape[-2:])
    return (*(1 for _ in shape[:-2]), rows, columns)


def _tiles(values: Any) -> Iterator[np.ndarray]:
    """Yield the tiles of an array in row-major order, contiguous."""
    lead = values.shape[:-2]
    rows, columns = _tile_shape(values.shape)[-2:]
    for layer in np.ndindex(*lead):
        for i in range(0, values.shape[-2], rows):
            for j in range(0, values.shape[-1], columns):
                yield np.ascontiguousarray(values[(*layer, slice(i, i + rows), slice(j, j + columns))])
