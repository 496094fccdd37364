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


def make_console(stream: IO[str] | None = None) -> Console:
    """Return a console; without a terminal there are no colours and lines are not folded at 80 columns."""
    stream = sys.stdout if stream is None else stream
    terminal = stream.isatty()
    return Console(file=stream, width=None if terminal else PLAIN_WIDTH, highlight=False, emoji=False)


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

    On a terminal a bar with GFLOP/s and the time left; elsewhere one line every `every_s` seconds and one for a stage
    without a size (total <= 1), such as loading.

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
            text = rate(done) if sized else ""
            bar.update(task, description=escape(stage), completed=done, total=total if sized else None, rate=text)

        yield report


class _Rate:
    """GFLOP/s since the first call with less done than before."""

    def __init__(self) -> None:
        self._start, self._from, self._last = time.perf_counter(), 0.0, float("inf")

    def __call__(self, done: float) -> str:
        if done < self._last and (self._last == float("inf") or done == 0):
            self._start, self._from = time.perf_counter(), done
        self._last = done
        spent = time.perf_counter() - self._start
        return f"{(done - self._from) / spent / 1e9:,.0f} GFLOP/s" if spent > 0.05 and done > self._from else ""


def _lines(stream: IO[str], every_s: float) -> ProgressCall:
    rate, said, stage_said = _Rate(), time.perf_counter(), ""

    def report(done: float, total: float, stage: str) -> None:
        nonlocal said, stage_said
        now = time.perf_counter()
        if total <= 1:
            if stage != stage_said:
                print(stage, file=stream, flush=True)
                said, stage_said = now, stage
            return
        text = rate(done)
        if now - said >= every_s:
            left = (total - done) / max(done, 1.0) * (now - rate._start)
            print(f"{done / total:4.0%}  {stage}  {text}  {left:.0f} s left", file=stream, flush=True)
            said = now

    return report


def _numeric(table: Table, column: int) -> bool:
    cells = [row[column] for row in table.rows if len(row) > column and row[column]]
    return bool(cells) and all(cell[0] in "0123456789+-±>." for cell in cells)
