"""How far a job is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from ntkengine.report.text import make_console

ProgressCall = Callable[[float, float, str], None]
_SOON_S = 0.05  # before that a rate means nothing
_FEW = 0.02  # of the work: before that, the time left means nothing


@contextmanager
def show_progress(stream: IO[str] | None = None, every_s: float = 10.0, unit: str = "GFLOP") -> Iterator[ProgressCall]:
    """Give the callable for `progress=`: (done, total, stage), in flops or in the unit.

    `with ntk.show_progress() as progress: gram = ntk.compute_gram(..., progress=progress)`.

    On a terminal a bar with the rate and the time left. Elsewhere at most one line every `every_s` seconds, and one at
    the end of a job that took as long: one that is refused at once says only why. A stage without a size, such as
    loading, has total <= 1.

    Args:
        stream: where to; default standard error.
        every_s: seconds between lines without a terminal.
        unit: of what is counted; "GFLOP" for numbers of flops, any other for as many of it.
    """
    stream = sys.stderr if stream is None else stream
    rate = _Rate(unit)
    if not stream.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):
        lines = _Lines(stream, every_s, rate)
        yield lines
        lines.end()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=make_console(stream), transient=True) as bar:
        task = bar.add_task("", total=None, rate="", left="")

        def report(done: float, total: float, stage: str) -> None:
            sized = total > 1
            speed, left = rate(done, total) if sized else ("", "")
            size = total if sized else None
            bar.update(task, description=escape(stage), completed=done, total=size, rate=speed, left=left)

        yield report


def duration(seconds: float) -> str:
    """Return a time as 8 s, 2 min 05 s or 3 h 20 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class _Rate:
    """Rate and time left, from when the current run of numbers began."""

    def __init__(self, unit: str) -> None:
        self._unit, self._scale = unit, 1e9 if unit == "GFLOP" else 1.0
        self._start, self._last, self._total, self._before = 0.0, float("inf"), 0.0, 0.0

    def __call__(self, done: float, total: float) -> tuple[str, str]:
        """Return both as text, empty while nothing is known."""
        now = time.perf_counter()
        if done < self._last or total != self._total:
            self._start, self._before, self._total = now, done, total
        self._last = done
        spent, made = now - self._start, done - self._before
        if made <= 0 or spent < _SOON_S:
            return "", ""
        speed = made / spent
        left = "" if made < _FEW * (total - self._before) else f"{duration((total - done) / speed)} left"
        return f"{_short(speed / self._scale)} {self._unit}/s", left


class _Lines:
    """Plain lines, seldom."""

    def __init__(self, stream: IO[str], every_s: float, rate: _Rate) -> None:
        self._stream, self._every_s, self._rate = stream, every_s, rate
        self._start = self._said_at = time.perf_counter()
        self._stage = ""

    def __call__(self, done: float, total: float, stage: str) -> None:
        """Print a line if it is time."""
        self._stage = stage
        known = ", ".join(filter(None, self._rate(done, total))) if total > 1 else ""
        if time.perf_counter() - self._said_at >= self._every_s:
            share = f"{done / total:4.0%}  " if total > 1 else ""
            self._say(f"{share}{stage}  {known}")
            self._said_at = time.perf_counter()

    def end(self) -> None:
        """Print the last line, of a job that took long enough for others."""
        spent = time.perf_counter() - self._start
        if self._stage and spent >= self._every_s:
            self._say(f"done after {duration(spent)}")

    def _say(self, line: str) -> None:
        print(line.rstrip(), file=self._stream, flush=True)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
