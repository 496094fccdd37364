"""What forecasts come to, in two or three sentences: the figures that the tables have, and nothing further.

Objects are taken by their public attributes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ntkengine.digits import nearest

Interval = tuple[float, float, float]
_SHARES = 3  # modules that are named


def forecast_verdict(forecast: Any) -> list[str]:
    """Return what a forecast's own rows say of fine-tuning, of chance, of the ridge, and of the modules.

    Args:
        forecast: from `forecast`.
    """
    rows = dict(forecast.table())
    held = forecast.eval_mse_at_ridge is not None
    accuracy = forecast.eval_accuracy_at_ridge if held else forecast.loo_accuracy_at_ridge
    name = f"{'eval' if held else 'leave-one-out'} {'mse' if accuracy is None else 'accuracy'}"
    value = rows[f"{name} at ridge" if held else name]
    before = "eval" if held else "held-out head" if "at the start, held-out head" in rows else "train"
    start = rows[f"at the start, {before}"]
    lines = [f"Fine-tuning is forecast to reach {name} {value}, a 95 % interval; before it, {start}."]
    share = forecast.start.get(f"{'eval' if held else 'train'}_largest_class")
    if accuracy is not None and share is not None:
        lines.append(
            f"Always naming the largest class gets {rows['share of the largest class']}: {_place(share, accuracy)}."
        )
    lines.append(f"Ridge: {rows['ridge']}; to get it in training: {rows['to get this ridge in training']}.")
    shares = [(name.partition(", ")[2], told) for name, told in rows.items() if name.startswith("share of trace, ")]
    if shares:
        lines.append(f"Modules with most of the trace: {', '.join(' '.join(pair) for pair in shares[:_SHARES])}.")
    return lines


def ranking_verdict(
    rows: Sequence[Sequence[str]],
    losses: Sequence[Interval],
    before: Sequence[str] | None = None,
    start: Interval | None = None,
) -> list[str]:
    """Return what a ranking says of its first choice, and of the model before training.

    Args:
        rows: of its table, best first; cells as `RANKED` names them.
        losses: their forecast eval losses.
        before: likewise the row of the model before training.
        start: its eval loss.
    """
    name, parameters, loss, accuracy, *_ = rows[0]
    figures = [("eval loss", loss, 2), ("accuracy", accuracy, 3)]
    told = ", ".join(f"{what} {_from(before, column)}{cell}" for what, cell, column in figures if cell)
    lines = against_start(losses[0], start)
    if start is not None and losses[0][0] >= start[0]:
        return [*lines, f"The first, {name} ({parameters} parameters): {told}.", *not_told_apart(losses)]
    return [f"Adapt {name} ({parameters} parameters): {told}.", *lines, *not_told_apart(losses)]


def against_start(best: Interval, start: Interval | None) -> list[str]:
    """Return what there is to say where the best forecast is not surely below the model before training.

    Args:
        best: the least forecast eval loss, (value, low, high).
        start: that of the model before training, or None.
    """
    if start is None or start[0] > best[2]:
        return []
    told = f"the model before training ({nearest(start[0])})"
    if best[0] >= start[0]:
        return [
            f"No candidate is forecast to do better than {told}: lower learning rate, fewer epochs, a proximal term, "
            "or more data."
        ]
    return [f"The first is not told apart from no training: {told} lies within its interval."]


def not_told_apart(losses: Sequence[Interval]) -> list[str]:
    """Return how many of some forecasts, best first, lie within the best one's interval; nothing where only it does.

    Args:
        losses: (value, low, high) each.
    """
    near = sum(loss[0] <= losses[0][2] for loss in losses)
    if near < 2:
        return []
    return [
        f"{near} of {len(losses)} forecasts lie within the interval of the first. All are scored on the same "
        "examples, so differences are surer than intervals, but small ones decide nothing."
    ]


def _from(before: Sequence[str] | None, column: int) -> str:
    """Return the middle of a cell of the row before training, and an arrow."""
    return "" if before is None or not before[column] else f"{before[column].partition(' (')[0]} → "


def _place(share: float, accuracy: Interval) -> str:
    _, low, high = accuracy
    if low <= share <= high:
        return "within the interval, so the examples do not tell the two apart"
    return "below the interval" if share < low else "above the interval: the forecast is worse"
