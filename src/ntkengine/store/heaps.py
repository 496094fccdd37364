"""Where HDF5 keeps texts: heaps without a checksum, in which a damaged length makes the library loop for ever.

So they are walked through here before the first text is read (measured: HDF5 2.0 hangs). A heap is its sign, a version,
its size, then objects one after the other: number, uses, and a length, rounded up to 8 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import h5py

from ntkengine.errors import InputError

_SIGN = b"GCOL\x01\0\0\0"
_HEAD = 16  # bytes of a heap's head, and of an object's
_SMALL = 1 << 26  # bytes
_MOST = 1 << 28  # bytes of a file that are no numbers of its datasets


def vet_heaps(path: Path, datasets: Iterable[h5py.Dataset] | None = None) -> None:
    """Refuse a file with a heap that does not add up.

    Args:
        path: the file.
        datasets: all of its; None before it is opened, which already reads heaps where a dataset is virtual. Then only
            a small file is looked at, as one over shards is.

    Raises:
        InputError: naming the heap's place.

    Cost: reads a small file once before it is opened, else everything but the datasets' numbers after that.
    """
    size = path.stat().st_size
    if (datasets is None) != (size <= _SMALL):
        return
    with path.open("rb") as file:
        for start, stop in [(0, size)] if datasets is None else _gaps(datasets, size):
            if stop - start > _MOST:
                raise InputError(f"{path}: {stop - start} bytes from {start} on belong to no dataset")
            file.seek(start)
            raw, at = file.read(stop - start), 0
            while (at := raw.find(_SIGN, at)) >= 0:
                length = _length(raw, at + 8)
                if not _adds_up(raw[at : at + length], length):
                    raise InputError(f"{path}: is incomplete or damaged (its texts at byte {start + at})")
                at += length


def _gaps(datasets: Iterable[h5py.Dataset], size: int) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) of what lies between the numbers of datasets."""
    taken: list[tuple[int, int]] = []
    for item in datasets:
        if item.chunks is not None:
            item.id.chunk_iter(lambda chunk: taken.append((chunk.byte_offset, chunk.size)))
        elif (offset := item.id.get_offset()) is not None:
            taken.append((offset, item.id.get_storage_size()))
    at = 0
    for offset, length in sorted(taken):
        if offset > at:
            yield at, offset
        at = max(at, offset + length)
    if size > at:
        yield at, size


def _adds_up(heap: bytes, size: int) -> bool:
    at = _HEAD
    while at + _HEAD <= len(heap) == size:
        length = _length(heap, at + 8)
        if int.from_bytes(heap[at : at + 2], "little"):
            length = _HEAD + length + -length % 8
        if length < _HEAD:
            return False
        at += length
    return len(heap) == size and at <= size


def _length(raw: bytes, at: int) -> int:
    return int.from_bytes(raw[at : at + 8], "little")
