"""How a notebook shows an object: a few facts as a small table."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def html_facts(title: str, rows: Sequence[Sequence[str]], columns: Sequence[str] = (), note: str = "") -> str:
    """Return a small HTML table, everything in it escaped.

    Args:
        title: above it.
        rows: texts.
        columns: headings; none for label and value pairs.
        note: below it.
    """
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    parts = [f"<tr>{head}</tr>"] if columns else []
    parts += [
        "<tr>" + "".join(_cell(cell, i == 0 and not columns) for i, cell in enumerate(row)) + "</tr>" for row in rows
    ]
    foot = f"<p>{escape(note)}</p>" if note else ""
    return f"<div><table><caption><b>{escape(title)}</b></caption>{''.join(parts)}</table>{foot}</div>"


def _cell(text: str, label: bool) -> str:
    kind = "th" if label else "td"
    return f'<{kind} style="text-align: left">{escape(text)}</{kind}>'
