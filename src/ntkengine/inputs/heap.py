"""Freed memory: kept for the next tensor while there is room, given back to the system near a job's limit.

Fresh pages cost more than the sums done in them: a job that gave every freed tensor back at once took 1.9 times as
long. Kept memory fragments instead: what lies between tensors in use cannot all be used again.
"""

from __future__ import annotations

import ctypes
import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD
_KEPT, _SMALL = 1 << 30, 1 << 24
_STATM = Path("/proc/self/statm")


class Heap:
    """The process's memory, where glibc is its allocator; anywhere else nothing is done.

    Attributes:
        limit: bytes above what the process held when the job began, from which freed memory is given back.
    """

    def __init__(self) -> None:
        self.limit = float("inf")
        self._before = 0
        try:
            self._libc: ctypes.CDLL | None = ctypes.CDLL(None)
            self._trim, self._option = self._libc.malloc_trim, self._libc.mallopt
        except (OSError, AttributeError, TypeError):
            log.debug("no mallopt: the allocator stays as it is")
            self._libc = None

    def begin(self, limit: float = float("inf")) -> None:
        """Keep freed tensors from here on: up to 1 GiB of them; with a limit, counted from here, only small ones."""
        self.limit = limit
        if self._libc is None:
            return
        bounded = limit < float("inf")
        for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            self._option(option, _SMALL if bounded else _KEPT)
        if bounded:
            self._trim(0)
            self._before = _held()

    def relieve(self) -> None:
        """Give freed memory back if the process has come near its limit: between two microbatches."""
        if self.limit < float("inf") and self._libc is not None and _held() - self._before > self.limit:
            self._trim(0)

    def taken(self) -> int:
        """Return the bytes held above what the process held when the job began; 0 of one without a limit."""
        if self.limit == float("inf") or self._libc is None:
            return 0
        self._trim(0)
        return max(0, _held() - self._before)


def _held() -> int:
    """Return the bytes of memory that no file backs; 0 where the system does not tell."""
    try:
        _, resident, shared = map(int, _STATM.read_text(encoding="ascii").split()[:3])
    except (OSError, ValueError):
        return 0
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


HEAP = Heap()
