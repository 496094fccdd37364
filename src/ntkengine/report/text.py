"""Tables and colours on a terminal, and plain lines where there is none."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from typing import IO

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from ntkengine.report.tables import Table

_ENDLESS = 1 << 20  # columns of a pipe: nothing is folded there
_LEGIBLE = 16  # columns a text is not squeezed below, unless all of it is shorter
_GAP, _EDGES = 3, 2  # blank columns between two of a table, and around it


class _Console(Console):
    """A console that leaves a closed pipe to the command line; rich's own would exit with 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def make_console(stream: IO[str] | None = None) -> Console:
    """Return a console; without a terminal there are no colours and no line is folded, with NO_COLOR set no colours."""
    stream = sys.stdout if stream is None else stream
    terminal = stream.isatty()
    return _Console(
        file=stream,
        width=None if terminal else _ENDLESS,
        force_terminal=terminal,
        color_system="auto" if terminal and not os.environ.get("NO_COLOR") else None,
        highlight=False,
        emoji=False,
    )


def print_table(table: Table, console: Console) -> None:
    """Print one table: texts to the left, numbers to the right, the note below.

    Texts fold where the terminal is narrow, numbers never do: a table whose numbers do not fit side by side has
    intervals below their values, and if that does not help is printed row by row, a line for each column.
    """
    for form in (table, _stacked(table), _turned(table)):
        columns = _columns(form)
        frame = _GAP * (len(columns) - 1) + _EDGES
        if sum(c.least for c in columns) + frame <= console.width:
            break
    table, pairs = form, not form.columns
    widths = _fitted(columns, console.width - frame, pairs)
    shown = RichTable(
        title=escape(table.title),
        title_justify="left",
        title_style="bold",
        show_header=not pairs,
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for i, (column, width) in enumerate(zip(columns, widths, strict=True)):
        shown.add_column(
            "" if pairs else escape(table.columns[i]),
            justify="left" if column.text else "right",
            width=width,
            overflow="fold",
            style="cyan" if i == 0 else "",
        )
    for row in table.rows:
        shown.add_row(*map(escape, row))
    if console.is_terminal:
        console.print(shown)
    else:  # in a file no blanks to the right, which one long text would put behind every line
        with console.capture() as held:
            console.print(shown)
        console.file.writelines(f"{line.rstrip()}\n" for line in held.get().splitlines())
    if table.note:
        console.print(escape(table.note), style="dim")
    console.print()


@dataclass(frozen=True)
class _Column:
    """What a column needs: of numbers all, of texts and headings a legible part."""

    text: bool
    least: int
    most: int


def _columns(table: Table) -> list[_Column]:
    found = []
    for i in range(max([len(table.columns), *(len(row) for row in table.rows)])):
        cells = [row[i] for row in table.rows if len(row) > i]
        heading = table.columns[i] if table.columns else ""
        text = i == 0 or not table.columns or not _numeric(cells)
        longest = max((cell_len(line) for cell in cells for line in cell.split("\n")), default=0)
        least = max(max(map(cell_len, heading.split()), default=0), min(longest, _LEGIBLE) if text else longest)
        found.append(_Column(text, least, max(longest, cell_len(heading))))
    return found


def _fitted(columns: list[_Column], room: int, pairs: bool) -> list[int]:
    """Return each column's width: all it can use, or of what is left over in turn, texts first.

    Of (label, value) pairs a label leaves half of the room to values that need it.
    """
    widths = [c.least for c in columns]
    if pairs:
        widths[0] = max(widths[0], min(columns[0].most, room // 2))
    left = room - sum(widths)
    for i in sorted(range(len(columns)), key=lambda i: i == 0 if pairs else not columns[i].text):
        more = max(0, min(left, columns[i].most - widths[i]))
        widths[i] += more
        left -= more
    return widths


def _stacked(table: Table) -> Table:
    """Return a table with what is in brackets on a line of its own."""
    if not table.columns:
        return table
    return replace(table, rows=[tuple(cell.replace(" (", "\n(") for cell in row) for row in table.rows])


def _turned(table: Table) -> Table:
    """Return a table of (heading, value) pairs, the rows one after the other with an empty line between."""
    if not table.columns:
        return table
    rows: list[tuple[str, ...]] = []
    for row in table.rows:
        rows += [("", "")] if rows else []
        rows += [(heading, cell) for heading, cell in zip(table.columns, row, strict=False) if cell]
    return Table(table.title, (), rows, table.note)


def _numeric(cells: list[str]) -> bool:
    told = [cell for cell in cells if cell]
    return bool(told) and all(cell[0] in "0123456789+-±><≤≥∞." or cell in ("nan", "inf") for cell in told)
