"""Where a model's weights lie, and how one is brought into memory in another dtype."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ntkengine.errors import InputError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
_DTYPES |= {"BOOL": torch.bool}
_AHEAD = 256 << 20  # bytes the operating system is asked to read ahead, either way


def pread(fd: int, nbytes: int, offset: int) -> bytearray | None:
    """Return so many bytes of a file from an offset; None when it ends before."""
    raw = bytearray(nbytes)
    return raw if fill(fd, memoryview(raw), offset) else None


def fill(fd: int, view: memoryview, offset: int) -> bool:
    """Fill the bytes with a file's from an offset; return False when it ends before."""
    done = 0
    while done < len(view):
        got = os.preadv(fd, [view[done:]], offset + done)
        if not got:
            return False
        done += got
    return True


def stamp_of(fd: int) -> tuple[int, int, int]:
    """Return what tells an open file from another of its name: its number, its time of change in ns, its size."""
    found = os.fstat(fd)
    return found.st_ino, found.st_mtime_ns, found.st_size


@dataclass(frozen=True)
class Entry:
    """A tensor in a safetensors file.

    Attributes:
        path: the file's.
        dtype: in the file.
        shape: the tensor's.
        offset: of its first byte.
        nbytes: its bytes.
        stamp: of the file when its header was read (`stamp_of`); another one means other weights.
        rounded: dtypes it is rounded to on its way, one after the other.
    """

    path: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    stamp: tuple[int, int, int]
    rounded: tuple[torch.dtype, ...] = ()

    def through(self, dtype: torch.dtype) -> Entry:
        """Return the entry with its weight as a model in that dtype has it, whatever it is brought in."""
        last = self.rounded[-1] if self.rounded else self.dtype
        return self if torch.promote_types(last, dtype) == dtype else replace(self, rounded=(*self.rounded, dtype))

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows [start, stop) of the tensor as rounded; what lies around it is read ahead."""
        rows = self.shape[0] if self.shape else 1
        stop = rows if stop is None else stop
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        row = self.nbytes // rows
        raw = bytearray((stop - start) * row)
        self._fill(memoryview(raw), start * row)
        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        return self.as_rounded(torch.frombuffer(raw, dtype=self.dtype).view(shape))

    def read_to(self, buffer: Tensor) -> Tensor:
        """Return the tensor in a buffer of as many bytes, not rounded yet; what lies around it is read ahead."""
        self._fill(buffer.numpy().data, 0)
        return buffer.view(self.dtype).view(self.shape)

    def as_rounded(self, weight: Tensor) -> Tensor:
        """Return a weight in the file's dtype, on any device, as rounded."""
        with torch._C.DisableTorchFunction():  # under `unrounded` nothing would be rounded
            for dtype in self.rounded:
                weight = weight.to(dtype)
        return weight

    def _fill(self, view: memoryview, start: int) -> None:
        fd = os.open(self.path, os.O_RDONLY)
        try:
            if stamp_of(fd) != self.stamp:
                msg = f"{self.path}: was changed after the model was loaded from it; load it again"
                raise InputError(msg)
            if not fill(fd, view, self.offset + start):
                msg = f"{self.path}: ends before its header says"
                raise InputError(msg)
            if hasattr(os, "posix_fadvise") and len(view) == self.nbytes:
                low = max(0, self.offset - _AHEAD)
                os.posix_fadvise(fd, low, self.offset + self.nbytes + _AHEAD - low, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(fd)


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

    def as_rounded(self, weight: Tensor) -> Tensor:
        """Return the weight as it is: a model in memory has rounded it."""
        return weight


def entries(paths: Iterable[Path]) -> dict[str, Entry]:
    """Return the tensors of safetensors files, by name; of a name in several the last.

    Raises:
        InputError: a file that is not safetensors, or a dtype that is neither a plain float nor whole numbers.
    """
    found = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt"):  # the library checks the whole header
                pass
            with path.open("rb") as file:
                stamp = stamp_of(file.fileno())
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
            found[name] = Entry(str(path), _DTYPES[about["dtype"]], tuple(about["shape"]), offset, stop - start, stamp)
    return found
