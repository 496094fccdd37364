"""One file for each rank, and a virtual dataset over them.

HDF5 fills in for a source file it does not find, without a word. So what is filled in is NaN, and a sharded file is
opened only after each of its shards was found to be the one that was written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ntkengine.errors import InputError
from ntkengine.gram.result import Gram
from ntkengine.store.disk import appearing
from ntkengine.store.schema import SHARD_SCHEMA, matrices, opened, read_json
from ntkengine.store.tiles import tiles_name
from ntkengine.store.writing import write_facts, write_json, write_tiled


def shard_path(path: Path, rank: int, ranks: int) -> Path:
    """Return the name of a rank's shard, in the folder of the whole."""
    return path.with_name(f"{path.stem}.rank-{rank:04d}-of-{ranks:04d}{path.suffix}")


def write_shard(
    path: Path, rank: int, ranks: int, tiled: Mapping[str, tuple[int, Any]], job: Mapping[str, Any]
) -> Path:
    """Write a rank's rows, atomically, and return the shard's path.

    Args:
        path: of the whole.
        rank: whose rows.
        ranks: of how many.
        tiled: by dataset name ("gram", "cross", "modules/<i>"): (first row, its rows × all columns), on axis -2.
        job: what defines the values.

    Raises:
        OSError: the disk refused; no shard has appeared.
    """
    shard = shard_path(path, rank, ranks)
    with appearing(shard) as (file, raw):
        file.attrs["schema"], file.attrs["rank"], file.attrs["ranks"] = SHARD_SCHEMA, rank, ranks
        write_json(file, "job", dict(job))
        write_tiled(file, raw, {name: rows for name, (_, rows) in tiled.items()})
        for name, (start, _) in tiled.items():
            file[name].attrs["start"] = start
        file.attrs["digest"] = _digest(file)
    return shard


def link_shards(
    path: Path,
    ranks: int,
    gram: Gram,
    job: Mapping[str, Any],
    ids: Mapping[str, list[str]],
    partial: Path | None = None,
) -> None:
    """Write the file over all shards, atomically, and remove shards of another number of ranks.

    Args:
        path: of the whole.
        ranks: how many shards there are.
        gram: everything but `values`, `cross` and the modules' matrices, of which only the names are read.
        job: what defines the values; each shard must be of the same.
        ids: as `write_gram`.
        partial: the file's name until it is complete.

    Raises:
        InputError: a shard is missing or of another job, or they do not follow on each other without a gap.
        OSError: the disk refused.
    """
    shards = [shard_path(path, rank, ranks) for rank in range(ranks)]
    facts = []
    pieces: dict[str, list[tuple[int, tuple[int, ...], Any, Path]]] = {}
    for shard in shards:
        with opened(shard, SHARD_SCHEMA) as file:
            if read_json(file, "job") != json.loads(json.dumps(dict(job))):
                msg = f"{shard}: is a shard of another job"
                raise InputError(msg)
            facts.append({"file": shard.name, "bytes": shard.stat().st_size, "digest": str(file.attrs["digest"])})
            for name in matrices(file):
                dataset = file[name]
                piece = (int(dataset.attrs["start"]), dataset.shape, dataset.dtype, shard)
                pieces.setdefault(name, []).append(piece)
    with appearing(path, partial) as (file, _raw):
        write_facts(file, gram, job, ids)
        write_json(file, "shards", facts)
        for name, found in pieces.items():
            found.sort(key=lambda piece: piece[0])
            file.create_virtual_dataset(name, _layout(name, found), fillvalue=np.nan)
        for i, module in enumerate(gram.modules):
            file[f"modules/{i}"].attrs["name"] = module
    for other in path.parent.glob(f"{path.stem}.rank-*-of-*{path.suffix}"):
        if other not in shards:
            other.unlink()


def check_shards(file: h5py.File, path: Path) -> None:
    """Refuse a sharded file any of whose shards is not the one that was written.

    Cost: opens every shard; reads no numbers.

    Raises:
        InputError: naming the shard.
    """
    for shard, fact in shards_of(file, path):
        if not shard.is_file():
            msg = f"{path}: its shard {shard.name} is missing"
            raise InputError(msg)
        if shard.stat().st_size != fact["bytes"]:
            msg = f"{path}: its shard {shard.name} has {shard.stat().st_size} bytes, expected {fact['bytes']}"
            raise InputError(msg)
        with opened(shard, SHARD_SCHEMA) as part:
            if part.attrs.get("digest") != fact["digest"]:
                msg = f"{path}: its shard {shard.name} is of another run"
                raise InputError(msg)


def shards_of(file: h5py.File, path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return a sharded file's shards and what it knows of them; none of a file without shards."""
    facts = read_json(file, "shards") if "json/shards" in file else []
    for fact in facts:
        if Path(fact["file"]).name != fact["file"]:
            msg = f"{path}: its shard {fact['file']!r} is not in its folder"
            raise InputError(msg)
    return [(path.with_name(fact["file"]), fact) for fact in facts]


def _layout(name: str, pieces: list[tuple[int, tuple[int, ...], Any, Path]]) -> h5py.VirtualLayout:
    _, first, dtype, _ = pieces[0]
    rows = 0
    for start, shape, _, shard in pieces:
        if start != rows or shape[:-2] != first[:-2] or shape[-1] != first[-1]:
            msg = f"{shard}: its rows of /{name} start at {start}, expected {rows}, each of {first[-1]} columns"
            raise InputError(msg)
        rows += shape[-2]
    layout = h5py.VirtualLayout(shape=(*first[:-2], rows, first[-1]), dtype=dtype)
    for start, shape, _, shard in pieces:
        layout[..., start : start + shape[-2], :] = h5py.VirtualSource(shard.name, name, shape=shape)
    return layout


def _digest(file: h5py.File) -> str:
    found = hashlib.sha256(json.dumps(read_json(file, "job"), sort_keys=True).encode())
    for name in matrices(file):
        found.update(f"{name} {file[name].shape} {file[name].attrs['start']}".encode())
        found.update(file[f"{tiles_name(name)}/crc32"][...].tobytes())
    return found.hexdigest()
