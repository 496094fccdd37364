"""A fine-tuning that was run, as a table, and as a section of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ntkengine.errors import InputError
from ntkengine.report.html import Section
from ntkengine.report.plots import training_figure
from ntkengine.report.tables import Table, trained
from ntkengine.report.verdict import against_forecasts, training_verdict
from ntkengine.textfile import parse_json

# What a measurement's fields are called wherever people see them.
COLUMNS = {
    "step": "step",
    "epoch": "epoch",
    "train_loss": "train loss",
    "train_accuracy": "train accuracy",
    "eval_loss": "eval loss",
    "eval_accuracy": "eval accuracy",
    "displacement": "‖θ − θ₀‖",
    "linear_train_loss": "linear: train loss",
    "linear_eval_loss": "linear: eval loss",
    "gap": "‖f − f̄‖",
    "relative_gap": "‖f − f̄‖ / ‖f − f₀‖",
    "divergence": "KL",
}
_TOLD = ("eval_loss", "eval_accuracy", "train_loss", "train_accuracy")  # at the top of a report


def training_table(run: Mapping[str, Any]) -> Table:
    """Return the measurements of a fine-tuning, a row each; columns without a number are left out.

    Args:
        run: `recipe`, `history`, `seconds` and `measuring_seconds` of `FineTuning.to_dict`.
    """
    history = run["history"]
    shown = {name: head for name, head in COLUMNS.items() if any(m[name] is not None for m in history)}
    rows = [tuple(_cell(m[name]) for name in shown) for m in history]
    times = f"{run['seconds']:.3g} s of training and {run['measuring_seconds']:.3g} s of measuring"
    return Table("Fine-tuning", tuple(shown.values()), rows, f"{trained(run['recipe'])}; {times}")


def training_section(path: Path, forecasts: Mapping[str, Any] | None = None) -> Section:
    """Return the section of measurements that `ntkengine finetune --history` wrote.

    Args:
        path: the file.
        forecasts: of the same report, by name; those from the same start are held against what was measured.

    Raises:
        InputError: no such file, or one that holds no such measurements.
    """
    try:
        first, *history = (parse_json(line, path, dict) for line in path.read_text(encoding="utf-8").splitlines())
        table = training_table(first | {"history": history})
        figure = training_figure(_curves(history))
        verdict = training_verdict(history, {name: COLUMNS[name] for name in _TOLD})
        if first["recipe"].get("loss", "squared") == "squared":
            verdict += against_forecasts(history, forecasts or {})
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        raise InputError(f"{path}: expected measurements written by `ntkengine finetune --history`") from None
    notes = ["Measured, not forecast. Losses are means over examples, without a proximal term."]
    if COLUMNS["gap"] in table.columns:
        notes.append(
            "f̄ is the linear model, trained beside f. Norms are over the training outputs: where ‖f − f̄‖ / ‖f − f₀‖ is "
            "1, it says nothing of f."
        )
    figured = (name for name, head in COLUMNS.items() if head in table.columns and name.endswith("_loss"))
    if any(m[name] is None for name in figured for m in history):
        notes.append("A measurement without a finite loss has an empty cell, and no point in the figure.")
    return Section(str(path), [table], {"measured losses by step": figure}, notes, verdict)


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
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"
