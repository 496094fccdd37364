"""Damaged tiles: from their mirror image where that is sound, else opened for the next run of the same job."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ntkengine.errors import InputError
from ntkengine.store.checking import Damage, find_damage
from ntkengine.store.folder import Folder, followed
from ntkengine.store.merging import copy_gram
from ntkengine.store.opening import opened
from ntkengine.store.schema import GROUPS, is_cross, matrices, module_of, read_json
from ntkengine.store.shards import shards_of
from ntkengine.store.tiles import Where, tile_places, tiles_name


def repair_gram(path: str | Path) -> tuple[int, int]:
    """Repair what a file's own numbers can, and open the other damaged tiles; a sharded file becomes one file.

    A tile of a symmetric Gram is its mirror image's transpose, to the last bit. With tiles left open the file gives up
    its name until the next run of the same job has filled them.

    Returns:
        (tiles repaired, tiles left open); (0, 0) of a sound file, which is not touched.

    Raises:
        InputError: something else than tiles is damaged, or a process is at work on this file.
        OSError: the disk refused; the file is as it was.
    """
    path = followed(Path(path))
    damage = find_damage(path)
    for found in damage:
        if found.dataset is None:
            msg = f"{path}: {found.text}; only tiles can be repaired: remove the file and run the job again"
            raise InputError(msg)
    tiles = [found for found in damage if found.dataset is not None]
    if not tiles:
        return 0, 0
    with Folder(path) as folder, opened(path) as source:
        patches = _mirrored(source, tiles)
        left = sum(tile is None for found in patches.values() for tile in found.values())
        shards = [shard for shard, _ in shards_of(source, path)]
        copy_gram(source, folder.damaged if left else path, patches, partial=folder.partial, over=True)
        if left:
            path.unlink()
        for shard in shards:
            shard.unlink()
    return sum(len(found) for found in patches.values()) - left, left


def open_damaged(path: Path) -> tuple[dict[str, Any], dict[str, list[Where]], dict[str, Any]]:
    """Return a damaged file's job, its open tiles by dataset, and its meta with more.

    That is `width`, rows per sample, and `modules` and `crosses`, the dataset of each module by its name.

    Raises:
        InputError: as `open_gram`.
    """
    with opened(path) as file:
        found = {}
        for name in matrices(file):
            done = file[f"{tiles_name(name)}/done"][...]
            places = tile_places(file[name].shape)
            found[name] = [where for where, fine in zip(places, done, strict=True) if not fine]
        width = file["outputs"].shape[1] if file.attrs["contraction"] == "full" else 1
        open_tiles = {name: where for name, where in found.items() if where}
        named = {g: [n for n in matrices(file) if n.startswith(f"{g}/")] for g in GROUPS}
        names = {g: {module_of(file[n]): n for n in group} for g, group in named.items()}
        return read_json(file, "job"), open_tiles, read_json(file, "meta") | {"width": width} | names


# By dataset: rows, columns (ascending indices into the matrix) and values (…, rows, columns).
Computed = Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]


def differences(damaged: Path, computed: Computed) -> dict[str, float]:
    """Return by dataset how far recomputed values are from sound stored ones, relative, in the Frobenius norm.

    Raises:
        InputError: as `open_gram`.
    """
    found = {}
    with opened(damaged) as source:
        for name in computed:
            off = size = 0.0
            for _, where, done, got, (i, j) in _recomputed(source, name, computed):
                if done and got.size:
                    kept = source[name][where][np.ix_(i, j)]
                    off, size = off + float(np.square(got - kept).sum()), size + float(np.square(kept).sum())
            found[name] = (off / size) ** 0.5 if size else 0.0
    return found


def fill_tiles(damaged: Path, path: Path, computed: Computed, partial: Path) -> None:
    """Write the whole file under its name, its open tiles filled from recomputed rows and columns.

    Args:
        damaged: the file with open tiles.
        path: the whole.
        computed: covers all open tiles.
        partial: the file's name until it is complete.

    Raises:
        ValueError: an open tile that the recomputed rows and columns do not cover.
        OSError: the disk refused.
    """
    patches: dict[str, dict[int, np.ndarray | None]] = {}
    with opened(damaged) as source:
        for name in matrices(source):
            for k, (*_, r, c), done, got, _ in _recomputed(source, name, computed):
                if done:
                    continue
                if got.shape != (r.stop - r.start, c.stop - c.start):
                    msg = f"tile {k} of /{name}: only {got.shape} of it was computed again"
                    raise ValueError(msg)
                patches.setdefault(name, {})[k] = np.ascontiguousarray(got)
        copy_gram(source, path, patches, partial=partial)


def _recomputed(
    source: h5py.File, name: str, computed: Computed
) -> Iterator[tuple[int, Where, bool, np.ndarray, tuple[np.ndarray, np.ndarray]]]:
    """Yield each tile's number, place, flag, what there is of it in `computed`, and where in the tile that is."""
    nothing = np.zeros(0, dtype=int)
    rows, columns, values = computed.get(name, (nothing, nothing, np.zeros((*source[name].shape[:-2], 0, 0))))
    done = source[f"{tiles_name(name)}/done"][...]
    for k, where in enumerate(tile_places(source[name].shape)):
        *layer, r, c = where
        i, j = (np.flatnonzero((at >= s.start) & (at < s.stop)) for at, s in ((rows, r), (columns, c)))
        got = values[(*layer, *np.ix_(i, j))]
        yield k, where, bool(done[k]), got, (rows[i] - r.start, columns[j] - c.start)


def _mirrored(source: h5py.File, damage: list[Damage]) -> dict[str, dict[int, np.ndarray | None]]:
    job = read_json(source, "job")
    symmetric = not job.get("two_inputs") and source.attrs["transform"] != "asymmetric-sign"
    patches: dict[str, dict[int, np.ndarray | None]] = {}
    for name in {found.dataset for found in damage if found.dataset is not None}:
        places = tile_places(source[name].shape)
        bad = {_key(found.where) for found in damage if found.dataset == name}
        for k, where in enumerate(places):
            if not any(_overlap(_key(where), key) for key in bad):
                continue
            *layer, r, c = where
            mirror = (*layer, c, r)
            sound = symmetric and not is_cross(name) and not any(_overlap(_key(mirror), key) for key in bad)
            patches.setdefault(name, {})[k] = np.ascontiguousarray(source[name][mirror].T) if sound else None
    return patches


def _key(where: Where | None) -> tuple[Any, ...]:
    *layer, r, c = where or ()
    return (*layer, r.start, r.stop, c.start, c.stop)


def _overlap(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Return whether two places share an entry: tiles of a shard need not lie on those of the whole."""
    (*layer, a, b, c, d), (*same, e, f, g, h) = one, other
    return layer == same and a < f and e < b and c < h and g < d
