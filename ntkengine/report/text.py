"""Tables and progress on a terminal, and plain lines where there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from ntkengine.report.tables import Table

PLAIN_WIDTH = 240
ProgressCall = Callable[[float, float, str], None]


class _Console(Console):
    """A console that leaves a closed pipe to the command line; rich's own would exit with 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def make_console(stream: IO[str] | None = None) -> Console:
    """Return a console; without a terminal there are no colours and lines are not folded at 80 columns."""
    stream = sys.stdout if stream is None else stream
    terminal = stream.isatty()
    return _Console(file=stream, width=None if terminal else PLAIN_WIDTH, highlight=False, emoji=False)


def print_table(table: Table, console: Console) -> None:
    """Print one table: first column to the left, numbers to the right, the note below."""
    pairs = not table.columns
    shown = RichTable(
        title=escape(table.title),
        title_justify="left",
        title_style="bold",
        show_header=not pairs,
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    width = max([len(table.columns), *(len(row) for row in table.rows)])
    for i in range(width):
        text = i == 0 or pairs or (len(table.columns) > i and not _numeric(table, i))
        heading = escape(table.columns[i]) if not pairs else ""
        shown.add_column(heading, justify="left" if text else "right", overflow="fold", style="cyan" if i == 0 else "")
    for row in table.rows:
        shown.add_row(*map(escape, row))
    console.print(shown)
    if table.note:
        console.print(escape(table.note), style="dim")
    console.print()


@contextmanager
def show_progress(stream: IO[str] | None = None, every_s: float = 10.0) -> Iterator[ProgressCall]:
    """Give the callable for `progress=`: (done, total, stage), in flops.

    On a terminal a bar with GFLOP/s and the time left; elsewhere at most one line every `every_s` seconds, so that a
    job that is refused at once says only why. A stage without a size, such as loading, has total <= 1.

    Args:
        stream: where to; default standard error.
        every_s: seconds between lines without a terminal.
    """
    stream = sys.stderr if stream is None else stream
    if not stream.isatty():
        yield _lines(stream, every_s)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=stream), transient=True) as bar:
        task = bar.add_task("", total=None, rate="")
        rate = _Rate()

        def report(done: float, total: float, stage: str) -> None:
            sized = total > 1
            text = rate(done, total)[0] if sized else ""
            bar.update(task, description=escape(stage), completed=done, total=total if sized else None, rate=text)

        yield report


class _Rate:
    """GFLOP/s and seconds left, from when the current run of numbers began."""

    def __init__(self) -> None:
        self._start, self._last = 0.0, float("inf")

    def __call__(self, done: float, total: float) -> tuple[str, str]:
        """Return both as text, empty while nothing is known."""
        now = time.perf_counter()
        if done < self._last and (self._last == float("inf") or done == 0):
            self._start = now
        self._last = done
        spent = now - self._start
        if done <= 0 or spent < 0.05:
            return "", ""
        return f"{done / spent / 1e9:,.0f} GFLOP/s", f"{(total - done) * spent / done:.0f} s left"


def _lines(stream: IO[str], every_s: float) -> ProgressCall:
    rate, said_at = _Rate(), time.perf_counter()

    def report(done: float, total: float, stage: str) -> None:
        nonlocal said_at
        known = ", ".join(filter(None, rate(done, total))) if total > 1 else ""
        if time.perf_counter() - said_at >= every_s:
            share = f"{done / total:4.0%}  " if total > 1 else ""
            print(f"{share}{stage}  {known}".rstrip(), file=stream, flush=True)
            said_at = time.perf_counter()

    return report


def _numeric(table: Table, column: int) -> bool:
    cells = [row[column] for row in table.rows if len(row) > column and row[column]]
    return bool(cells) and all(cell[0] in "0123456789+-±>." for cell in cells)
