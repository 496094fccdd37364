"""A saved ranking of modules as a section of a report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ntkengine.errors import InputError
from ntkengine.report.html import Section
from ntkengine.report.plots import selection_figure
from ntkengine.report.tables import BEFORE, RANKED, Table, span, trained
from ntkengine.report.verdict import ranking_verdict
from ntkengine.textfile import parse_json

_START = {"name": BEFORE, "parameters": 0, "kernel": None}
_SHOWN = 20  # subsets in the figure


def selection_section(path: Path) -> Section:
    """Return the section of a ranking that `ntkengine select --save` wrote.

    Raises:
        InputError: no such file, or one that is no ranking.
    """
    try:
        found = parse_json(path.read_text(encoding="utf-8"), path, dict, "an object")
        choices, recipe = found["choices"], found["recipe"]
        rows = [_row(c) for c in choices]
        known = found.get("start")
        start, before = (None, None) if known is None else (_three(known["eval_loss"]), _row(known | _START))
        losses = [_three(c["eval_loss"]) for c in choices]
        note = f"LoRA of rank {found['peft']['r']}, {trained(recipe)}; best first"
        notes = [str(line) for line in found["assumptions"]]
        names = [str(c["name"]) for c in choices[:_SHOWN]]
        best = [str(m) for c in choices[:1] for m in c["modules"]]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        raise InputError(f"{path}: expected a ranking written by `ntkengine select --save`") from None
    if not rows:
        raise InputError(f"{path}: holds no ranked subsets")
    columns = RANKED[: len(rows[0])]
    adapted = Table("The best choice adapts", (), [(f"{i + 1}", m) for i, m in enumerate(best)])
    figures = {"forecast eval loss of subsets of modules": selection_figure(names, losses[:_SHOWN])}
    verdict = ranking_verdict(rows, losses, before, start)
    rows += [] if before is None else [before]
    return Section(str(path), [Table("Which modules to adapt", columns, rows, note), adapted], figures, notes, verdict)


def _row(choice: dict[str, Any]) -> tuple[str, ...]:
    kernel = choice["kernel"]
    return (
        str(choice["name"]),
        f"{int(choice['parameters']):,}",
        span(_three(choice["eval_loss"])),
        "" if choice["eval_accuracy"] is None else span(_three(choice["eval_accuracy"])),
        f"{float(choice['train_loss']):.4g}",
        "" if kernel is None else str(kernel["condition"]),
    )


def _three(value: list[float | None]) -> tuple[float, float, float]:
    middle, low, high = (math.inf if v is None else float(v) for v in value)  # one example has no standard error
    if low > middle or middle > high:
        raise ValueError(value)
    return middle, low, high
