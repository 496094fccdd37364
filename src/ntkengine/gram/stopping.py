"""A clean stop: SIGTERM, or SIGINT once, lets a job finish what it has in hand and write it down."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ntkengine.errors import Stopped


class Stop:
    """Whether this process was asked to stop, and whether that has to wait.

    Attributes:
        signal: which signal asked; None: none yet.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._waits = 0

    @contextmanager
    def waits(self) -> Iterator[None]:
        """Only take note of a signal in here: the caller asks `signal` when it can stop."""
        self._waits += 1
        try:
            yield
        finally:
            self._waits -= 1

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: at once
        self.signal = number
        if not self._waits:
            raise Stopped(number)


_current: Stop | None = None


@contextmanager
def stopping() -> Iterator[Stop]:
    """Give the process's `Stop`, listening to the signals that nobody else listens to; a job within a job shares it."""
    global _current
    if _current is not None:
        yield _current
        return
    stop = _current = Stop()
    before: dict[int, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            usual_handlers: dict[int, Any] = {
                signal.SIGTERM: signal.SIG_DFL,
                signal.SIGINT: signal.default_int_handler,
            }
            for number, usual in usual_handlers.items():
                if signal.getsignal(number) == usual:
                    before[number] = signal.signal(number, stop._note)
        yield stop
    finally:
        _current = None
        for number, handler in before.items():
            signal.signal(number, handler)
