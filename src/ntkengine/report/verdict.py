"""What forecasts come to, in two or three sentences: the figures that the tables have, and nothing further.

Objects are taken by their public attributes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    losses: Sequence[Interval],
    before: Sequence[Sequence[str]] = (),
) -> list[str]:
    """Return what a ranking says of its first choice.

    Args:
        columns: headings of its table, the first that of names.
        rows: of the table, best first.
        losses: their forecast eval losses.
        before: likewise rows, of the model before training.
    """

    def told(row: Sequence[str]) -> str:
        pairs = zip(columns[1:], row[1:], strict=True)
        return ", ".join(f"{head} {cell}" for head, cell in pairs if cell not in ("", "0"))

    lines = [f"Adapt {rows[0][0]}: {told(rows[0])}.", *(f"{row[0].capitalize()}: {told(row)}." for row in before)]
    return [*lines, *not_told_apart(losses)]


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


def _place(share: float, accuracy: Interval) -> str:
    _, low, high = accuracy
    if low <= share <= high:
        return "within the interval, so the examples do not tell the two apart"
    return "below the interval" if share < low else "above the interval: the forecast is worse"
