"""A Gram file read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py

from ntkengine.errors import InputError
from ntkengine.gram.plan import Plan
from ntkengine.gram.result import Gram
from ntkengine.store.schema import ARRAYS, matrices, opened, read_json
from ntkengine.store.shards import check_shards
from ntkengine.store.tiles import tiles_name


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


def open_gram(path: str | Path) -> Gram:
    """Return a Gram backed by its file, opened read-only: its matrices stay on disk until indexed.

    Raises:
        InputError: no such file, not an HDF5 file, not one of this schema, tiles that are not done, or a shard that is
            missing or not the one that was written.
    """
    path = Path(path)
    file = opened(path)
    try:
        check_shards(file, path)
        _all_done(file, path)
        arrays: dict[str, Any] = {name: file[name][...] if name in file else None for name in ARRAYS if name != "cross"}
        plan = read_json(file, "plan")
        return Gram(
            values=file["gram"],
            cross=file.get("cross"),
            contraction=str(file.attrs["contraction"]),
            transform=str(file.attrs["transform"]),
            noise=float(file.attrs["noise"]),
            modules=Modules(file["modules"]) if "modules" in file else {},
            cross_modules=Modules(file["crosses"]) if "crosses" in file else {},
            plan=Plan.from_dict(plan) if plan else None,
            meta=read_json(file, "meta") | {"job": read_json(file, "job")} | _ids(file),
            extras={name: _extra(file, name) for name in file.get("extras", ())},
            path=path,
            **arrays,
        )
    except InputError:
        file.close()
        raise
    except (KeyError, ValueError, TypeError, OSError) as error:
        file.close()
        msg = f"{path}: is incomplete or damaged ({error})"
        raise InputError(msg) from error


def read_job(path: str | Path) -> dict[str, Any]:
    """Return what defined a file's values.

    Raises:
        InputError: as `open_gram`.
    """
    with opened(Path(path)) as file:
        try:
            return read_json(file, "job")
        except (KeyError, ValueError, OSError) as error:
            msg = f"{path}: is incomplete or damaged ({error})"
            raise InputError(msg) from error


def first_difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """Return `key: found, wanted` for the first setting in which two jobs differ, or None."""
    for key in [*wanted, *(k for k in found if k not in wanted)]:
        if found.get(key) != wanted.get(key):
            return f"{key} is {found.get(key)!r} there, {wanted.get(key)!r} here"
    return None


def _all_done(file: h5py.File, path: Path) -> None:
    for name in matrices(file):
        flags = f"{tiles_name(name)}/done"
        if flags in file and not file[flags][...].all():
            msg = f"{path}: has tiles of /{name} that are not done; run the job again"
            raise InputError(msg)


def _extra(file: h5py.File, name: str) -> Any:
    """Return a further array; Grams among them stay on disk."""
    dataset = file[f"extras/{name}"]
    return dataset if dataset.ndim > 1 and dataset.shape[-2:] == file["gram"].shape[-2:] else dataset[...]


def _ids(file: h5py.File) -> dict[str, list[str]]:
    return {name: file[name].asstr()[...].tolist() for name in ("example_id", "eval_id") if name in file}
