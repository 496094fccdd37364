"""Where a model's weights lie, and how one is brought into memory in another dtype."""

from __future__ import annotations

import json
import math
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ntkengine.errors import InputError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_AHEAD = 256 << 20  # bytes the operating system is asked to read ahead, either way


def pread(fd: int, nbytes: int, offset: int) -> bytearray | None:
    """Return so many bytes of a file from an offset; None when it ends before."""
    raw = bytearray(nbytes)
    view, done = memoryview(raw), 0
    while done < nbytes:
        got = os.preadv(fd, [view[done:]], offset + done)
        if not got:
            return None
        done += got
    return raw


@dataclass(frozen=True)
class Entry:
    """A tensor in a safetensors file."""

    path: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows [start, stop) of the tensor in the file's dtype; what lies around it is read ahead."""
        rows = self.shape[0] if self.shape else 1
        stop = rows if stop is None else stop
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        row = self.nbytes // rows
        fd = os.open(self.path, os.O_RDONLY)
        try:
            raw = pread(fd, (stop - start) * row, self.offset + start * row)
            if raw is None:
                msg = f"{self.path}: ends before its header says"
                raise InputError(msg)
            if hasattr(os, "posix_fadvise") and stop - start == rows:
                low = max(0, self.offset - _AHEAD)
                os.posix_fadvise(fd, low, self.offset + self.nbytes + _AHEAD - low, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(fd)
        return torch.frombuffer(raw, dtype=self.dtype).view(stop - start, *self.shape[1:])


@dataclass(frozen=True, eq=False)
class Held:
    """A weight in memory, to be brought in another dtype: an `Entry` without a file."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        return tuple(self.weight.shape)

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self.weight.numel() * self.weight.element_size()

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows [start, stop) of it."""
        return self.weight.detach()[start:stop]


def entries(folder: Path) -> dict[str, Entry]:
    """Return the tensors of a folder's safetensors files, by name.

    Raises:
        InputError: a file that is not safetensors, or a dtype that is not a plain float.
    """
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):  # the library checks the whole header
                pass
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            msg = f"{path}: is not a safetensors file ({' '.join(str(error).split())[:200]})"
            raise InputError(msg) from error
        for name, about in header.items():
            if name == "__metadata__":
                continue
            if about["dtype"] not in _DTYPES:
                msg = f"{path}: {name} has dtype {about['dtype']}; stream=True reads {', '.join(_DTYPES)}"
                raise InputError(msg)
            start, stop = about["data_offsets"]
            offset = 8 + length + start
            found[name] = Entry(str(path), _DTYPES[about["dtype"]], tuple(about["shape"]), offset, stop - start)
    return found


class Resident:
    """The weights brought last, up to a number of bytes: one block's, so that its microbatches read it once.

    Attributes:
        limit: bytes; a larger weight is not kept.
    """

    def __init__(self, limit: int = 512 << 20) -> None:
        self.limit = limit
        self._kept: OrderedDict[tuple[Entry | Held, torch.dtype, torch.device], Tensor] = OrderedDict()
        self._bytes = 0

    def bring(self, entry: Entry | Held, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a weight, from its file if need be."""
        key = entry, dtype, device
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        size = math.prod(entry.shape) * dtype.itemsize
        self.shrink(self.limit - size)
        weight = entry.read().to(device).to(dtype)  # converted there: a GPU is faster at it
        if size <= self.limit:
            self._kept[key] = weight
            self._bytes += size
        return weight

    def shrink(self, limit: int) -> None:
        """Let go of the weights unused for longest until at most `limit` bytes are held."""
        while self._kept and self._bytes > max(limit, 0):
            _, old = self._kept.popitem(last=False)
            self._bytes -= old.numel() * old.element_size()


RESIDENT = Resident()
