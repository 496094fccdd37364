"""The exceptions a user can meet, each with one plain meaning."""

from __future__ import annotations

from signal import Signals
from typing import Any

_SHOWN = dict.fromkeys("\n\r\t", " ")


class InputError(ValueError):
    """What the user gave cannot be used: the message says what, where, and what was expected.

    The command line prints it and exits with 2. It is one line that a terminal can show, whatever names a file gave it.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__("".join(c if c.isprintable() else _SHOWN.get(c) or ascii(c)[1:-1] for c in str(message)))


class CheckFailed(RuntimeError):  # noqa: N818  (reads as what happened)
    """A result disagrees with plain autograd: the message names the parameter and the examples."""


class NonFinite(RuntimeError):  # noqa: N818
    """A gradient is not finite: the message names the module and the example."""


class NotConverged(RuntimeError):  # noqa: N818
    """An iteration stopped short of its tolerance.

    Attributes:
        partial: what had been found so far.
        residual: how far from the tolerance it stopped.
    """

    def __init__(self, message: str, partial: Any = None, residual: float = float("nan")) -> None:
        super().__init__(message)
        self.partial = partial
        self.residual = residual


class Stopped(BaseException):  # noqa: N818
    """A signal asked the process to stop, and it did, with its work written down where it has a file.

    Like KeyboardInterrupt it comes from outside, and is no `Exception` that code in between could take for its own.

    Attributes:
        signal: its number.
        how: what there is to go on from; empty where that is not known.
    """

    def __init__(self, signal: int, how: str = "") -> None:
        super().__init__(f"stopped by {Signals(signal).name}" + (f": {how}" if how else ""))
        self.signal = signal
        self.how = how


class RankFailed(RuntimeError):  # noqa: N818
    """Another process of the job failed: the message names its rank, its host and the reason.

    Attributes:
        rank: of the process.
        traceback: its stack, as text.
    """

    def __init__(self, message: str, rank: int = 0, stack: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.traceback = stack
