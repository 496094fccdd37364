"""Tiles of a stored matrix: what is written, checked and repaired at once."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

TILE = 256

Where = tuple[Any, ...]  # an index: layers, then a slice of rows and one of columns


def tile_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a tile of a (…, rows, columns) array."""
    rows, columns = (max(1, min(TILE, n)) for n in shape[-2:])
    return (*(1 for _ in shape[:-2]), rows, columns)


def tile_places(shape: tuple[int, ...], first_row: int = 0) -> list[Where]:
    """Return where the tiles are, in row-major order.

    Args:
        shape: (…, rows, columns).
        first_row: of a shard, the row of the whole that its row 0 is; its tiles still count from its own row 0.
    """
    rows, columns = tile_shape(shape)[-2:]
    return [
        (*layer, slice(first_row + i, first_row + min(i + rows, shape[-2])), slice(j, min(j + columns, shape[-1])))
        for layer in np.ndindex(*shape[:-2])
        for i in range(0, shape[-2], rows)
        for j in range(0, shape[-1], columns)
    ]


def slabs(shape: tuple[int, ...]) -> Iterator[Where]:
    """Yield where the pieces of an array are that are read or written at once, in the order of its bytes."""
    if len(shape) < 2:
        yield (...,)
        return
    for layer in np.ndindex(*shape[:-2]):
        for i in range(0, shape[-2], TILE):
            yield (*layer, slice(i, min(i + TILE, shape[-2])))


def checksum(array: np.ndarray, before: int = 0) -> int:
    """Return the CRC-32 of an array's bytes, after those that `before` is of."""
    return zlib.crc32(np.ascontiguousarray(array).data.cast("B"), before) if array.size else before


def checksum_of(value: Any) -> int:
    """Return the CRC-32 of plain JSON types."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def tiles_name(dataset: str) -> str:
    """Return the group that holds a dataset's checksums and flags."""
    return "tiles" if dataset == "gram" else f"tiles/{dataset}"
