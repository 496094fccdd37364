"""One file for each rank, and a virtual dataset over them.

HDF5 fills in for a source file it does not find, without a word. So what is filled in is NaN, and a sharded file is
opened only after each of its shards was found to be the one that was written.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ntkengine.errors import InputError
from ntkengine.gram.result import Gram
from ntkengine.store.disk import Latched, appearing
from ntkengine.store.folder import parts_of, staged
from ntkengine.store.opening import opened
from ntkengine.store.schema import SHARD_SCHEMA, matrices, read_json
from ntkengine.store.tiles import tiles_name
from ntkengine.store.writing import create_tiled, fill, write_facts, write_json, write_names


def shard_path(path: Path, rank: int, ranks: int) -> Path:
    """Return the name of a rank's shard, in the folder of the whole."""
    return path.with_name(f"{path.stem}.rank-{rank:04d}-of-{ranks:04d}{path.suffix}")


class Shard:
    """A rank's file, being written.

    Args:
        file: with room for its matrices.
        raw: what it writes to.
    """

    def __init__(self, file: h5py.File, raw: Latched) -> None:
        self._file, self._raw = file, raw

    def put(self, name: str, row: int, values: np.ndarray) -> None:
        """Write rows of a matrix.

        Args:
            name: of the dataset.
            row: of the shard, where they start: a multiple of `TILE`.
            values: (…, rows, columns), `TILE` rows but for the last ones.

        Raises:
            OSError: the disk refused.
        """
        fill(self._file, self._raw, name, values, row)


@contextmanager
def writing_shard(
    path: Path, rank: int, ranks: int, tiled: Mapping[str, tuple[int, tuple[int, ...], Any]], job: Mapping[str, Any]
) -> Iterator[Shard]:
    """Give a rank's shard to fill; it appears, among the file's parts, at the end of the block.

    Args:
        path: of the whole.
        rank: whose rows.
        ranks: of how many.
        tiled: by dataset name (as `schema.matrices`): first row, shape and type of the rank's rows × all columns; rows
            are on axis -2.
        job: what defines the values.

    Raises:
        OSError: the disk refused; no shard has appeared.
    """
    shard = shard_path(staged(path), rank, ranks)
    shard.parent.mkdir(parents=True, exist_ok=True)
    with appearing(shard, parts_of(path) / f"{shard.name}.partial") as (file, raw):
        file.attrs["schema"], file.attrs["rank"], file.attrs["ranks"] = SHARD_SCHEMA, rank, ranks
        write_json(file, "job", dict(job))
        for name, (start, shape, dtype) in tiled.items():
            create_tiled(file, name, shape, dtype).attrs["start"] = start
        yield Shard(file, raw)
        file.attrs["digest"] = _digest(file)


def link_shards(path: Path, ranks: int, gram: Gram, job: Mapping[str, Any], ids: Mapping[str, list[str]]) -> None:
    """Write the file over all shards, beside them among the parts: `placing.place` gives them all their names.

    Args:
        path: of the whole.
        ranks: how many shards there are.
        gram: everything but `values`, `cross` and the modules' matrices, of which only the names are read.
        job: what defines the values; each shard must be of the same.
        ids: as `write_gram`.

    Raises:
        InputError: a shard is missing or of another job, or they do not follow on each other without a gap.
        OSError: the disk refused.
    """
    whole = staged(path)
    facts = []
    pieces: dict[str, list[tuple[int, tuple[int, ...], Any, Path]]] = {}
    for shard in (shard_path(whole, rank, ranks) for rank in range(ranks)):
        with opened(shard, SHARD_SCHEMA) as file:
            if read_json(file, "job") != json.loads(json.dumps(dict(job))):
                msg = f"{shard}: is a shard of another job"
                raise InputError(msg)
            facts.append({"file": shard.name, "bytes": shard.stat().st_size, "digest": str(file.attrs["digest"])})
            for name in matrices(file):
                dataset = file[name]
                piece = (int(dataset.attrs["start"]), dataset.shape, dataset.dtype, shard)
                pieces.setdefault(name, []).append(piece)
    with appearing(whole, parts_of(path) / f"{path.name}.partial") as (file, raw):
        write_facts(file, raw, gram, job, ids)
        write_json(file, "shards", facts)
        for name, found in pieces.items():
            found.sort(key=lambda piece: piece[0])
            file.create_virtual_dataset(name, _layout(name, found), fillvalue=np.nan)
        write_names(file, gram)


def check_shards(file: h5py.File, path: Path) -> None:
    """Refuse a sharded file any of whose shards is not the one that was written.

    Cost: opens every shard; reads no numbers.

    Raises:
        InputError: naming the shard.
    """
    rows: Counter[str] = Counter()
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
            rows.update({name: part[name].shape[-2] for name in matrices(part)})
    for name in matrices(file):
        if file[name].is_virtual and file[name].shape[-2] != rows[name]:
            msg = f"{path}: /{name} has {file[name].shape[-2]} rows, its shards {rows[name]}"
            raise InputError(msg)


def shards_of(file: h5py.File, path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return a sharded file's shards and what it knows of them; none of a file without shards."""
    facts = read_json(file, "shards", list) if "json/shards" in file else []
    for fact in facts:
        kinds = {"file": str, "bytes": int, "digest": str}
        if not isinstance(fact, dict) or any(type(fact.get(name)) is not kind for name, kind in kinds.items()):
            msg = f"{path}: /json/shards: expected file, bytes and digest of each shard, got {fact!r}"
            raise InputError(msg)
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
