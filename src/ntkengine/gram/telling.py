"""How far a job is, left where other processes find it."""

from __future__ import annotations

import time
from collections.abc import Callable

from ntkengine.store import Folder

_TELL_S = 2.0

Progress = Callable[[float, float, str], None]


class Telling:
    """Word of a job in the folder of its parts.

    Args:
        folder: of the parts.
        speaks: whether this process leaves word, one of those that share the job.
    """

    def __init__(self, folder: Folder, *, speaks: bool) -> None:
        self.folder, self.speaks = folder, speaks
        self._began, self._last = time.time(), time.monotonic()

    def watched(self, progress: Progress | None) -> Progress:
        """Return a progress that is also left for other processes."""

        def report(done: float, total: float, stage: str) -> None:
            self.tell(done, total, stage)
            if progress is not None:
                progress(done, total, stage)

        return report

    def tell(self, done: float, total: float, stage: str, *, now: bool = False) -> None:
        """Leave word, every two seconds, or now."""
        if self.speaks and (now or time.monotonic() - self._last > _TELL_S):
            self._last = time.monotonic()
            self.folder.tell({"done": done, "total": total, "stage": stage, "started": self._began})
