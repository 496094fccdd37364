"""What is wrong with a Gram file: every checksum compared, every number looked at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from ntkengine.arguments import file_path
from ntkengine.errors import InputError
from ntkengine.store.folder import followed
from ntkengine.store.opening import opened
from ntkengine.store.schema import SHARD_SCHEMA, matches, matrices, module_of, read_json, root
from ntkengine.store.shards import check_shards, shards_of
from ntkengine.store.tiles import Where, checksum, checksum_of, slabs, tile_places, tiles_name


@dataclass(frozen=True)
class Damage:
    """Something wrong.

    Attributes:
        text: what, in one line.
        dataset: the matrix whose tile it is; None when it is no tile.
        where: the tile's place in that matrix.
    """

    text: str
    dataset: str | None = None
    where: Where | None = None


def verify_gram(path: str | Path) -> list[str]:
    """Return what is wrong with a file; an empty list when everything has its checksum and every number is finite.

    Raises:
        InputError: no such file, not HDF5, or another schema.
    Cost: reads the whole file once, and its shards.
    """
    return [damage.text for damage in find_damage(path)]


def find_damage(path: str | Path) -> list[Damage]:
    """Return what is wrong with a file.

    Raises:
        InputError: as `verify_gram`.
    """
    path = followed(file_path("path", path))
    with opened(path) as file:
        try:
            return list(_all_damage(file, path))
        except (KeyError, OSError, ValueError, RuntimeError, TypeError) as error:
            return [Damage(f"a dataset is missing or unreadable: {error}")]


def damaged_tiles(file: h5py.File, name: str, first_row: int = 0, of: str = "") -> Iterator[Damage]:
    """Yield the damaged tiles of one matrix.

    Args:
        file: it is in.
        name: of its dataset.
        first_row: of a shard, the row of the whole that its row 0 is.
        of: said after the dataset's name.
    """
    dataset, group = file[name], tiles_name(name)
    places = tile_places(dataset.shape, first_row)
    if f"{group}/crc32" not in file:
        if name == "gram":
            yield Damage("a dataset is missing or unreadable: /tiles/crc32")
        elif not np.isfinite(dataset[...]).all():  # files from before other matrices had checksums
            yield Damage(f"/{name} has values that are not finite")
        return
    sums, done = file[f"{group}/crc32"][...], file[f"{group}/done"][...]
    if len(places) != len(sums) or len(places) != len(done):
        yield Damage(f"{len(places)} tiles of /{name}{of} but {len(sums)} checksums")
        return
    for k, (here, there) in enumerate(zip(tile_places(dataset.shape), places, strict=True)):
        said = f"tile {k} of /{name}{of}"
        if not done[k]:
            yield Damage(f"{said} is not done", name, there)
            continue
        try:
            tile = dataset[here]
        except OSError as error:
            yield Damage(f"{said} cannot be read ({str(error).splitlines()[0]})", name, there)
            continue
        if checksum(tile) != sums[k]:
            yield Damage(f"{said} does not match its checksum", name, there)
        elif not np.isfinite(tile).all():
            yield Damage(f"{said} has values that are not finite", name, there)


def _all_damage(file: h5py.File, path: Path) -> Iterator[Damage]:
    shards = shards_of(file, path)
    if shards:
        try:
            check_shards(file, path)
        except InputError as error:
            yield Damage(str(error).removeprefix(f"{path}: "))
            return
    for shard, _ in shards:
        with opened(shard, SHARD_SCHEMA) as part:
            for name in matrices(part):
                start = int(part[name].attrs["start"])
                yield from damaged_tiles(part, name, start, f" in {shard.name}")
                if part[name].size and _corner(file[name], start).tobytes() != _corner(part[name], 0).tobytes():
                    yield Damage(f"/{name} does not show what {shard.name} holds")
    for name in matrices(file):
        if not file[name].is_virtual:
            yield from damaged_tiles(file, name)
    found: list[h5py.Dataset] = []
    file.visititems(lambda _name, item: found.append(item) if isinstance(item, h5py.Dataset) else None)
    tiled = set(matrices(file))
    for dataset in found:
        name = str(dataset.name).lstrip("/")
        if name in tiled or name.startswith("tiles/"):
            continue
        if not matches(dataset, _checksum(dataset)):
            yield Damage(f"/{name} does not match its checksum")
        elif dataset.dtype.kind == "f" and not all(np.isfinite(dataset[at]).all() for at in slabs(dataset.shape)):
            yield Damage(f"/{name} has values that are not finite")
    for name in (name for name in matrices(file) if "/" in name):
        try:
            module_of(file[name])
        except ValueError as error:
            yield Damage(str(error))
    for name in ("job", "meta", "plan"):
        if f"json/{name}" not in file:
            yield Damage(f"a dataset is missing or unreadable: /json/{name}")
    noise = float(file.attrs.get("noise", np.nan))
    if not np.isfinite(noise) and not (np.isnan(noise) and _unmeasured(file)):
        yield Damage("the noise is not a finite number")
    if not matches(file, checksum_of(root(file))):
        yield Damage("the root's attributes do not match their checksum")


def _unmeasured(file: h5py.File) -> bool:
    """Return whether a file says that its Gram's noise was not measured: unchecked, or a model that has no float64."""
    return "json/meta" in file and read_json(file, "meta").get("noise_relative") is None


def _corner(dataset: h5py.Dataset, row: int) -> np.ndarray:
    return np.asarray(dataset[..., row, 0])


def _checksum(dataset: h5py.Dataset) -> int:
    if h5py.check_string_dtype(dataset.dtype) is not None:
        values = dataset.asstr()[()]
        return checksum_of(values.tolist() if isinstance(values, np.ndarray) else values)
    total = 0
    for where in slabs(dataset.shape):
        total = checksum(dataset[where], total)
    return total
