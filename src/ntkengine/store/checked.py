"""Stored arrays of which nothing is handed out that does not match its checksum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ntkengine.errors import InputError
from ntkengine.store.opening import opened
from ntkengine.store.schema import SHARD_SCHEMA, matches
from ntkengine.store.shards import shards_of
from ntkengine.store.tiles import checksum, slabs, tile_shape, tiles_name
from ntkengine.textfile import reason_of


class Checked(h5py.Dataset):
    """A dataset that looks at its checksum before it is read.

    Args:
        dataset: of a file open for reading.
        path: the file.
    """

    def __init__(self, dataset: h5py.Dataset, path: Path) -> None:
        super().__init__(dataset.id, readonly=True)
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the file's path: it is opened, and its checksums are looked at, anew."""
        return again, (type(self), self._path, self.name)

    def __getitem__(self, args: Any, new_dtype: Any = None) -> Any:
        """Return what is indexed, as h5py does.

        Raises:
            InputError: it does not match its checksum.
        """
        if isinstance(args, tuple) and any(getattr(one, "ndim", 0) > 1 for one in args):
            return self[...][args]  # as of `np.ix_`, which h5py does not know
        self._check(args)
        return super().__getitem__(args, new_dtype)

    def read_direct(self, dest: np.ndarray, source_sel: Any = None, dest_sel: Any = None) -> None:
        """Read into an array, as h5py does.

        Raises:
            InputError: it does not match its checksum.
        """
        self._check(... if source_sel is None else source_sel)
        super().read_direct(dest, source_sel, dest_sel)

    def _check(self, index: Any) -> None:
        raise NotImplementedError


class CheckedArray(Checked):
    """An array with one checksum: the first read of any of it reads all of it."""

    _sound = False

    def _check(self, _index: Any) -> None:
        if self._sound:
            return
        total = 0
        for where in slabs(self.shape):
            total = checksum(super(Checked, self).__getitem__(where), total)
        if not matches(self, total):
            raise InputError(f"{self._path}: {self.name} does not match its checksum")
        self._sound = True


class CheckedTiles(Checked):
    """A matrix in tiles, sharded or not: each tile is looked at when it is first touched.

    Cost: what is read for the first time is read twice, the second time from the system's cache.
    """

    def __init__(self, dataset: h5py.Dataset, path: Path) -> None:
        super().__init__(dataset, path)
        self._bands: list[_Band] | None = None

    def _check(self, index: Any) -> None:
        if self._bands is None:
            try:
                self._bands = list(self._read_bands())
            except InputError:
                raise
            except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
                msg = f"{self._path}: {self.name}: its checksums cannot be read ({reason_of(error)})"
                raise InputError(msg) from error
        box = _box(index, self.shape)
        for band in self._bands:
            for where in band.unseen(box):
                self._look(band, where)

    def _look(self, band: _Band, tile: tuple[int, ...]) -> None:
        where = band.place(tile)
        try:
            found = super(Checked, self).__getitem__(where)
        except OSError as error:  # a gzip stream that is none
            msg = f"{self._path}: {self.name}: a tile cannot be read ({reason_of(error)})"
            raise InputError(msg) from error
        if checksum(found) != band.sums[tile]:
            *_, r, c = where
            raise InputError(
                f"{self._path}: {self.name}: the tile at row {r.start}, column {c.start} does not match its checksum "
                "(`ntkengine verify --repair` mends what can be mended)"
            )
        band.seen[tile] = True

    def _read_bands(self) -> Iterator[_Band]:
        group, name = tiles_name(self.name[1:]), self.name[1:]
        if not self.is_virtual:
            yield _Band.of(0, self.shape, self.file[f"{group}/crc32"][...])
            return
        for shard, _ in shards_of(self.file, self._path):
            with opened(shard, SHARD_SCHEMA) as part:
                if name in part:
                    yield _Band.of(int(part[name].attrs["start"]), part[name].shape, part[f"{group}/crc32"][...])


def again(kind: type[Checked], path: Path, name: str) -> Checked:
    """Return an array of a file that is opened again."""
    file = opened(path)
    if name not in file:
        raise InputError(f"{path}: holds no {name} any more")
    return kind(file[name], path)


@dataclass
class _Band:
    """Rows of a matrix whose tiles count from its first one.

    Attributes:
        start: first row.
        shape: (…, rows, columns).
        sums: (…, down, across) checksums of its tiles.
        seen: of the same shape: which have been found to match.
    """

    start: int
    shape: tuple[int, ...]
    sums: np.ndarray
    seen: np.ndarray

    @classmethod
    def of(cls, start: int, shape: tuple[int, ...], sums: np.ndarray) -> _Band:
        h, w = tile_shape(shape)[-2:]
        sums = sums.reshape(*shape[:-2], -(-shape[-2] // h), -(-shape[-1] // w))
        return cls(start, shape, sums, np.zeros(sums.shape, dtype=bool))

    def unseen(self, box: tuple[slice, ...]) -> list[tuple[int, ...]]:
        """Return the tiles in a box of the matrix that have not been looked at."""
        *layers, r, c = box
        h, w = tile_shape(self.shape)[-2:]
        first, stop = max(r.start - self.start, 0), min(r.stop - self.start, self.shape[-2])
        if first >= stop or c.start >= c.stop:
            return []
        at = (*layers, slice(first // h, -(-stop // h)), slice(c.start // w, -(-c.stop // w)))
        return [tuple(tile) for tile in (np.argwhere(~self.seen[at]) + [s.start for s in at]).tolist()]

    def place(self, tile: tuple[int, ...]) -> tuple[Any, ...]:
        """Return where a tile is in the matrix."""
        *layer, i, j = tile
        h, w = tile_shape(self.shape)[-2:]
        rows = slice(self.start + i * h, self.start + min((i + 1) * h, self.shape[-2]))
        return (*layer, rows, slice(j * w, min((j + 1) * w, self.shape[-1])))


def _box(index: Any, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Return, axis by axis, the smallest range known to hold what an index selects."""
    given = list(index) if isinstance(index, tuple) else [index]
    gap = next((i for i, one in enumerate(given) if one is Ellipsis), len(given))
    rest = given[gap + 1 :]
    given = [*given[:gap], *[slice(None)] * (len(shape) - gap - len(rest)), *rest]
    if len(given) != len(shape):  # not an index: h5py says so
        return tuple(slice(0, n) for n in shape)
    return tuple(_range(one, n) for one, n in zip(given, shape, strict=True))


def _range(one: Any, n: int) -> slice:
    if isinstance(one, int | np.integer):
        return slice(int(one) % n, int(one) % n + 1) if -n <= one < n else slice(0, 0)
    if isinstance(one, slice):
        start, stop, step = one.indices(n)
        return slice(start, max(start, stop)) if step > 0 else slice(0, n)
    return slice(0, n)
