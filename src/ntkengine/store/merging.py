"""A Gram file copied, tile by tile, each checked on the way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np

from ntkengine.errors import InputError
from ntkengine.store.checking import find_damage
from ntkengine.store.disk import Latched, appearing
from ntkengine.store.folder import followed
from ntkengine.store.opening import opened
from ntkengine.store.schema import GROUPS, matrices
from ntkengine.store.shards import check_shards
from ntkengine.store.tiles import checksum, tile_places, tiles_name
from ntkengine.store.writing import create_tiled

# By dataset, by number of the tile: what is put there instead; None: nothing, the tile stays open.
Patches = Mapping[str, Mapping[int, np.ndarray | None]]


def merge_gram(path: str | Path, out: str | Path, *, compress: bool = False) -> None:
    """Write a Gram file, sharded or not, as one file, atomically.

    Args:
        path: the file.
        out: the copy; another name.
        compress: by gzip.

    Raises:
        InputError: not a Gram file, a damaged one, or `out` exists or its folder does not.
        OSError: the disk refused; there is no copy.
    """
    path, out = followed(Path(path)), followed(Path(out))
    if out.exists() or not out.parent.is_dir():
        msg = f"{out}: exists; choose another name" if out.exists() else f"{out}: folder {out.parent} does not exist"
        raise InputError(msg)
    damage = find_damage(path)
    if damage:
        cure = "" if damage[0].dataset is None else " (`ntkengine verify --repair`)"
        msg = f"{path}: {damage[0].text}; a copy would hide that{cure}"
        raise InputError(msg)
    with opened(path) as source:
        check_shards(source, path)
        copy_gram(source, out, {}, compress=compress)


def copy_gram(
    source: h5py.File,
    out: Path,
    patches: Patches,
    *,
    compress: bool = False,
    partial: Path | None = None,
    over: bool = False,
) -> None:
    """Write what is in an open file, and of its matrices other tiles where given, under a name, atomically.

    Raises:
        OSError: the disk refused, the name is taken and not to be written `over`, or a tile that is copied does not
            match its checksum.
    """
    tiled = matrices(source)
    with appearing(out, partial, over=over) as (file, raw):
        for name in source:
            if name not in ("gram", "cross", *GROUPS, "tiles", "json"):
                source.copy(name, file)
        for name in source["json"]:
            if name != "shards":
                source.copy(f"json/{name}", file.require_group("json"))
        for key, value in source.attrs.items():
            file.attrs[key] = value
        for name in tiled:
            made = create_tiled(file, name, source[name].shape, source[name].dtype, compress=compress)
            for key, value in source[name].attrs.items():
                made.attrs[key] = value
        for name in tiled:
            _copy_tiles(source, file, raw, name, patches.get(name, {}))


def _copy_tiles(
    source: h5py.File, file: h5py.File, raw: Latched, name: str, patches: Mapping[int, np.ndarray | None]
) -> None:
    group = tiles_name(name)
    known = source[f"{group}/crc32"][...] if f"{group}/crc32" in source else None
    sums, done = file[f"{group}/crc32"], file[f"{group}/done"]
    for k, where in enumerate(tile_places(source[name].shape)):
        tile = patches[k] if k in patches else source[name][where]
        if tile is None:
            file[name][where] = np.nan
            continue
        if k not in patches and known is not None and checksum(tile) != known[k]:
            msg = f"tile {k} of /{name} does not match its checksum"
            raise OSError(msg)
        file[name][where] = tile
        sums[k], done[k] = checksum(tile), True
        raw.check()
