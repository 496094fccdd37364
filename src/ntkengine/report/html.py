"""One HTML file that stands alone: text, tables and pictures, no links and no scripts."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from ntkengine.report.tables import Table
from ntkengine.textfile import check_folder, write_text

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --paper: #fbfbf9; --soft: #6a737d; --line: #dfe2e5; --card: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e6ea; --paper: #16191d; --soft: #98a1ab; --line: #33383f; --card: #1e2227; } }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; } h2 { font-size: 1.3rem; margin: 3rem 0 .75rem;
  border-bottom: 1px solid var(--line); padding-bottom: .3rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
.verdict p { margin: .3rem 0; overflow-wrap: anywhere; }
p.note, .lead { color: var(--soft); font-size: .9rem; margin: .3rem 0 0; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .22rem .9rem .22rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; } th { font-weight: 600; white-space: nowrap; } td:first-child { min-width: 11rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: .5rem; }
figure img { display: block; width: 100%; height: auto; }
details { margin: 1rem 0; } summary { cursor: pointer; font-weight: 600; }
ul { padding-left: 1.2rem; }
"""
PAGE = "<!doctype html>"  # what a report starts with
_FOLDED = 24  # rows above which a table starts closed


@dataclass(frozen=True)
class Section:
    """One Gram's part of a report.

    Attributes:
        title: heading.
        tables: in order.
        figures: matplotlib figures by name; the name is the picture's text alternative.
        notes: sentences under "What this rests on".
        verdict: sentences that go to the top of the page.
    """

    title: str
    tables: Sequence[Table] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    verdict: Sequence[str] = ()


def write_report(path: str | Path, sections: Sequence[Section], title: str = "Tangent kernel report") -> Path:
    """Write the report under its name, atomically.

    Args:
        path: the HTML file; its folder exists.
        sections: one for each Gram, and any before them.
        title: of the page.

    Returns:
        The path.

    Raises:
        InputError: the folder does not exist, or the path is one, or a file that is no page.
    """
    path = Path(path)
    check_folder(path, PAGE)
    text = render_report(sections, title)
    write_text(path, text)
    return path


def render_report(sections: Sequence[Section], title: str = "Tangent kernel report") -> str:
    """Return the page as text."""
    lead = (
        "Empirical neural tangent kernel, exact unless its facts say sketched, and what it forecasts of fine-tuning. "
        "Every number is read from the files named below."
    )
    told = [section for section in sections if section.verdict]
    body = "\n".join([*([_verdicts(told)] if told else []), *map(_section, sections)])
    return (
        f'{PAGE}\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n{body}\n</body>\n</html>\n'
    )


def _verdicts(sections: Sequence[Section]) -> str:
    parts = ['<section class="verdict">\n<h2>In short</h2>']
    for section in sections:
        parts += [f"<h3>{escape(section.title)}</h3>"] if len(sections) > 1 else []
        parts += [f"<p>{escape(line)}</p>" for line in section.verdict]
    return "\n".join([*parts, "</section>"])


def _section(section: Section) -> str:
    parts = [f"<section>\n<h2>{escape(section.title)}</h2>"]
    parts += [_table(table) for table in section.tables if len(table.rows) <= _FOLDED]
    if section.figures:
        pictures = (_figure(name, figure) for name, figure in section.figures.items())
        parts.append('<div class="figures">\n' + "\n".join(pictures) + "\n</div>")
    if section.notes:
        items = "\n".join(f"<li>{escape(note)}</li>" for note in section.notes)
        parts.append(f"<h3>What this rests on</h3>\n<ul>\n{items}\n</ul>")
    parts += [_table(table) for table in section.tables if len(table.rows) > _FOLDED]
    return "\n".join([*parts, "</section>"])


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    inner = f'<div class="scroll"><table>\n{f"<tr>{head}</tr>" if head else ""}\n{rows}\n</table></div>'
    if table.note:
        inner += f'\n<p class="note">{escape(table.note)}</p>'
    if len(table.rows) > _FOLDED:
        return f"<details><summary>{escape(table.title)} ({len(table.rows)} rows)</summary>\n{inner}\n</details>"
    return f"<h3>{escape(table.title)}</h3>\n{inner}"


def _figure(name: str, figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<figure><img alt="{escape(name)}" src="data:image/png;base64,{data}"></figure>'
