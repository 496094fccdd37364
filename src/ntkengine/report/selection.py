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
_COLUMNS = RANKED[:6]
_SHOWN = 20  # subsets in the figure


def selection_section(path: Path) -> Section:
    """Return the section of a ranking that `ntkengine select --save` wrote.

    Raises:
        InputError: no such file, or one that is no ranking.
    """
    try:
        found = parse_json(path.read_text(encoding="utf-8"), path, dict, "an object")
        choices, recipe, known = [_read(c) for c in found["choices"]], found["recipe"], found.get("start")
        start = None if known is None else _read(known | _START)
        note = f"LoRA of rank {found['peft']['r']}, {trained(recipe)}; best first"
        notes = [str(line) for line in found["assumptions"]]
        best = [str(m) for c in choices[:1] for m in c["modules"]]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        raise InputError(f"{path}: expected a ranking written by `ntkengine select --save`") from None
    if not choices:
        raise InputError(f"{path}: holds no ranked subsets")
    rows = [_row(c) for c in (choices if start is None else [*choices, start])]
    adapted = Table("The best choice adapts", (), [(f"{i + 1}", m) for i, m in enumerate(best)])
    shown = choices[:_SHOWN]
    figure = selection_figure([c["name"] for c in shown], [c["eval_loss"] for c in shown])
    ranked, verdict = Table("Which modules to adapt", _COLUMNS, rows, note), ranking_verdict(choices, start)
    return Section(str(path), [ranked, adapted], {"forecast eval loss of subsets of modules": figure}, notes, verdict)


def _read(choice: dict[str, Any]) -> dict[str, Any]:
    """Return what is shown of a choice, as numbers and text."""
    accuracy, kernel = choice["eval_accuracy"], choice["kernel"]
    return {
        "name": str(choice["name"]),
        "parameters": int(choice["parameters"]),
        "eval_loss": _three(choice["eval_loss"]),
        "eval_accuracy": None if accuracy is None else _three(accuracy),
        "train_loss": float(choice["train_loss"]),
        "condition": "" if kernel is None else str(kernel["condition"]),
        "modules": choice.get("modules"),
    }


def _row(choice: dict[str, Any]) -> tuple[str, ...]:
    return (
        choice["name"],
        f"{choice['parameters']:,}",
        span(choice["eval_loss"]),
        span(choice["eval_accuracy"]),
        f"{choice['train_loss']:.4g}",
        choice["condition"],
    )


def _three(value: list[float | None]) -> tuple[float, float, float]:
    middle, low, high = (math.inf if v is None else float(v) for v in value)  # one example has no standard error
    if low > middle or middle > high:
        raise ValueError(value)
    return middle, low, high
