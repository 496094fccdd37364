"""A Gram file read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ntkengine.arguments import file_path
from ntkengine.errors import InputError
from ntkengine.gram.result import Gram
from ntkengine.store.checked import CheckedArray, CheckedTiles
from ntkengine.store.checkpoints import saved_extra
from ntkengine.store.folder import followed, parts_of
from ntkengine.store.metadata import read_meta, read_plan
from ntkengine.store.opening import opened, understood
from ntkengine.store.schema import ARRAYS, matches, matrices, module_of, read_json, root
from ntkengine.store.shards import check_shards
from ntkengine.store.tiles import checksum, checksum_of, tile_places, tiles_name


class Modules(Mapping[str, Any]):
    """Per-module Grams by name, read when asked for."""

    def __init__(self, group: h5py.Group, path: Path) -> None:
        self._group, self._path = group, path
        self._index: dict[str, str] = {}
        for i in sorted(group, key=int):
            name = module_of(group[i])
            if name in self._index:
                msg = f"{group.file.filename}: {group.name}/{i}: module {name!r} is there twice"
                raise InputError(msg)
            self._index[name] = i

    def __reduce__(self) -> tuple[Any, ...]:
        return _modules_again, (self._path, self._group.name)

    def __getitem__(self, name: str) -> Any:
        return _tiled(self._group[self._index[name]], self._path)

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)


def _modules_again(path: Path, name: str) -> Modules:
    return Modules(opened(path)[name], path)


def open_gram(path: str | Path) -> Gram:
    """Return a Gram backed by its file, opened read-only: its matrices stay on disk until indexed.

    What is read of them is compared with its checksums first: `InputError` where it does not match.

    Raises:
        InputError: no such file, not an HDF5 file, not one of this schema, tiles that are not done, or a shard that is
            missing or not the one that was written.
    """
    named = followed(file_path("path", path))
    path = named.absolute()  # modules and shards are opened when they are first read, in whatever folder that is
    file = opened(named)
    with understood(file, path):
        check_shards(file, path)
        _all_done(file, path)
        _check_root(file, path)
        arrays: dict[str, Any] = {
            name: _whole(file[name], path) if name in file else None for name in ARRAYS if name != "cross"
        }
        return Gram(
            values=_tiled(file["gram"], path),
            cross=_tiled(file["cross"], path) if "cross" in file else None,
            contraction=str(file.attrs["contraction"]),
            transform=str(file.attrs["transform"]),
            noise=float(file.attrs["noise"]),
            modules=Modules(file["modules"], path) if "modules" in file else {},
            cross_modules=Modules(file["crosses"], path) if "crosses" in file else {},
            plan=read_plan(file),
            meta=read_meta(file) | {"job": read_json(file, "job")} | _ids(file, path),
            extras={name: _extra(file, name, path) for name in file.get("extras", ())},
            path=named,
            **arrays,
        )


def read_job(path: str | Path) -> dict[str, Any]:
    """Return what defined a file's values.

    Raises:
        InputError: as `open_gram`.
    """
    path = followed(Path(path))
    with opened(path) as file, understood(file, path):
        return read_json(file, "job")


def first_difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """Return `key: found, wanted` for the first setting in which two jobs differ, or None."""
    for key in [*wanted, *(k for k in found if k not in wanted)]:
        if found.get(key) != wanted.get(key):
            return f"{key} is {found.get(key)!r} there, {wanted.get(key)!r} here"
    return None


def _check_root(file: h5py.File, path: Path) -> None:
    if not matches(file, checksum_of(root(file))):
        msg = f"{path}: the root's attributes do not match their checksum"
        raise InputError(msg)
    noise, transform = file.attrs["noise"], file.attrs["transform"]
    if not isinstance(noise, float) or not isinstance(transform, str):
        msg = f"{path}: expected a number as noise and a text as transform, got {noise!r} and {transform!r}"
        raise InputError(msg)


def _all_done(file: h5py.File, path: Path) -> None:
    for name in matrices(file):
        flags, count = f"{tiles_name(name)}/done", len(tile_places(file[name].shape))
        if flags in file and not file[name].is_virtual and file[flags].shape != (count,):
            msg = f"{path}: /{flags}: expected {count} flags, got shape {file[flags].shape}"
            raise InputError(msg)
        if flags in file and not file[flags][...].all():
            msg = f"{path}: has tiles of /{name} that are not done; run the job again"
            raise InputError(msg)


def read_extra(out: Path, name: str) -> np.ndarray | None:
    """Return a further array of a Gram file, complete, damaged or unfinished; None where it has none that is sound."""
    for path in (followed(out), parts_of(out) / "damaged.h5"):
        if path.is_file():
            with suppress(InputError), opened(path) as file, understood(file, path):
                return np.asarray(_extra(file, name, path)) if f"extras/{name}" in file else None
    return saved_extra(out, name)


def _whole(dataset: h5py.Dataset, path: Path) -> Any:
    """Return an array that is small enough to be read, and therefore checked, at once."""
    found = dataset[...]
    if not matches(dataset, checksum(found)):
        msg = f"{path}: {dataset.name} does not match its checksum"
        raise InputError(msg)
    return found


def _extra(file: h5py.File, name: str, path: Path) -> Any:
    """Return a further array; Grams among them stay on disk."""
    dataset = file[f"extras/{name}"]
    large = dataset.ndim > 1 and dataset.shape[-2:] == file["gram"].shape[-2:]
    return CheckedArray(dataset, path) if large else _whole(dataset, path)


def _tiled(matrix: h5py.Dataset, path: Path) -> h5py.Dataset:
    """Return a matrix that looks at its checksums; files from before there were any have none."""
    known = matrix.is_virtual or f"{tiles_name(matrix.name[1:])}/crc32" in matrix.file
    return CheckedTiles(matrix, path) if known else matrix


def _ids(file: h5py.File, path: Path) -> dict[str, list[str]]:
    found = {name: file[name].asstr()[...].tolist() for name in ("example_id", "eval_id") if name in file}
    for name, texts in found.items():
        if not matches(file[name], checksum_of(texts)):
            msg = f"{path}: /{name} does not match its checksum"
            raise InputError(msg)
    return found
