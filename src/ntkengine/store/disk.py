"""Bytes on a disk that may be full, and a process that may be killed."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import h5py

_NO_LINKS = errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV


class Latched(io.RawIOBase):
    """A file for HDF5 that never fails: after the first error what is written goes nowhere, and `check` raises it.

    HDF5 does not come back from a failed write: what it could not flush is tried again when the process ends, which
    then crashes (measured with HDF5 2.0: a segmentation fault after ENOSPC).
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.error: OSError | None = None
        self._at = self._size = 0
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)

    def seekable(self) -> bool:  # noqa: D102
        return True

    def readable(self) -> bool:  # noqa: D102
        return True

    def writable(self) -> bool:  # noqa: D102
        return True

    def tell(self) -> int:  # noqa: D102
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:  # noqa: D102
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:  # noqa: D102
        view = memoryview(buffer).cast("B")
        data = os.pread(self._fd, len(view), self._at)
        view[:] = data + bytes(len(view) - len(data))
        self._at += len(view)
        return len(view)

    def write(self, data: Any) -> int:  # noqa: D102
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view) and self.error is None:
            try:
                done += os.pwrite(self._fd, view[done:], self._at + done)
            except OSError as error:
                self.error = error
        self._at += len(view)
        self._size = max(self._size, self._at)
        return len(view)

    def truncate(self, size: int | None = None) -> int:  # noqa: D102
        self._size = self._at if size is None else size
        try:
            os.ftruncate(self._fd, self._size)
        except OSError as error:
            self.error = self.error or error
        return self._size

    def flush(self) -> None:
        """Do nothing: `sync` does."""

    def check(self) -> None:
        """Raise what went wrong so far.

        Raises:
            OSError: with the file's name.
        """
        if self.error is not None:
            raise OSError(self.error.errno, self.error.strerror, str(self.path)) from self.error

    def sync(self) -> None:
        """Return when everything is on the disk.

        Raises:
            OSError: something is not.
        """
        self.check()
        os.fsync(self._fd)

    def close(self) -> None:  # noqa: D102
        if not self.closed:
            os.close(self._fd)
        super().close()


@contextmanager
def appearing(path: Path, partial: Path | None, *, over: bool = False) -> Iterator[tuple[h5py.File, Latched]]:
    """Give an HDF5 file to write that appears under its name once complete and on the disk.

    Args:
        path: the name.
        partial: the name until then, on the same file system; None: beside it.
        over: take the place of a file of that name.

    Raises:
        OSError: the disk refused, or the name is taken; nothing has appeared.
    """
    partial = partial or path.with_name(f".{path.name}.{os.getpid()}.partial")
    raw = Latched(partial)
    try:
        with h5py.File(raw, "w", libver=("v110", "v110")) as file:
            yield file, raw
        raw.sync()
        if over:
            partial.replace(path)
        else:
            give_name(partial, path)
        sync_folder(path.parent)
    finally:
        raw.close()
        with suppress(FileNotFoundError):
            partial.unlink()


def give_name(partial: Path, path: Path) -> None:
    """Give a complete file its name, unless that is taken.

    Raises:
        OSError: it is; the file is still there under its old name.
    """
    try:
        os.link(partial, path)  # unlike a renaming, fails where there is a file
    except FileExistsError as error:
        if not path.samefile(partial):  # else a process was killed before it took the old name away
            raise OSError(error.errno, "a file of that name has appeared meanwhile", str(path)) from error
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if path.exists():
            raise OSError(errno.EEXIST, "a file of that name has appeared meanwhile", str(path)) from error
        partial.replace(path)
        return
    partial.unlink()


def sync_folder(folder: Path) -> None:
    """Return when the names in a folder are on the disk, where the file system can tell."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)
