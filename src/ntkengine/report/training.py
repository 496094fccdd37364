"""A fine-tuning that was run, as a section of a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ntkengine.errors import InputError
from ntkengine.report.html import Section
from ntkengine.report.plots import training_figure
from ntkengine.report.tables import Table, trained
from ntkengine.textfile import parse_json

_COLUMNS = {
    "step": "step",
    "epoch": "epoch",
    "train_loss": "train loss",
    "eval_loss": "eval loss",
    "train_accuracy": "train accuracy",
    "eval_accuracy": "eval accuracy",
    "displacement": "‖θ_t − θ_0‖",
    "relative_gap": "gap to the linear model",
    "linear_eval_loss": "linear eval loss",
}


def training_section(path: Path) -> Section:
    """Return the section of measurements that `ntkengine finetune --history` wrote.

    Raises:
        InputError: no such file, or one that holds no such measurements.
    """
    try:
        first, *history = (parse_json(line, path, dict) for line in path.read_text(encoding="utf-8").splitlines())
        recipe, seconds, measuring = first["recipe"], float(first["seconds"]), float(first["measuring_seconds"])
        shown = {name: head for name, head in _COLUMNS.items() if any(m[name] is not None for m in history)}
        rows = [tuple(_cell(m[name]) for name in shown) for m in history]
        how = trained(recipe)
        figure = training_figure(_curves(history))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        raise InputError(f"{path}: expected measurements written by `ntkengine finetune --history`") from None
    note = f"{how}; {seconds:.3g} s of training and {measuring:.3g} s of measuring"
    notes = ["Measured, not forecast. Losses are means over examples, without a proximal term."]
    if "relative_gap" in shown:
        notes.append(
            "The gap is ‖f_θ − f̄_θ̄‖ / ‖f_θ − f_θ0‖ over the training outputs: at 1 the linear model says nothing."
        )
    figured = (name for name in shown if name.endswith("_loss"))
    if any(m[name] is None for name in figured for m in history):
        notes.append("A measurement without a finite loss has an empty cell, and no point in the figure.")
    table = Table("What fine-tuning did", tuple(shown.values()), rows, note)
    return Section(str(path), [table], {"measured losses by step": figure}, notes)


def _curves(history: Sequence[dict[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """Return (steps, losses) by name, without the measurements that have none."""
    names = {
        "train": "train_loss",
        "eval": "eval_loss",
        "linear model, train": "linear_train_loss",
        "linear model, eval": "linear_eval_loss",
    }
    points = {
        label: [(float(m["step"]), float(m[name])) for m in history if m[name] is not None]
        for label, name in names.items()
    }
    return {label: ([x for x, _ in both], [y for _, y in both]) for label, both in points.items() if both}


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
