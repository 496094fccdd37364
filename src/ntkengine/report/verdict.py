"""What forecasts come to, in two or three sentences: the figures that the tables have, and nothing further.

Objects are taken by their public attributes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ntkengine.digits import between, nearest
from ntkengine.report.cells import chosen_ridge, largest_class, largest_shares, ridge_in_training, score
from ntkengine.report.tables import span

Interval = tuple[float, float, float]
_SHARES = 3  # modules that are named
EDGE = "optimum is at the largest ridge"  # in the sentence of a forecast's assumptions that says so
_RANKED = {"eval_loss": "eval loss", "eval_accuracy": "accuracy"}  # what is told of a choice


def forecast_verdict(forecast: Any) -> list[str]:
    """Return what a forecast says of fine-tuning, of chance, of the ridge, and of the modules.

    Args:
        forecast: from `forecast`.
    """
    start, held = forecast.start, forecast.eval_mse_at_ridge is not None
    accuracy = forecast.eval_accuracy_at_ridge if held else forecast.loo_accuracy_at_ridge
    kind = "mse" if accuracy is None else "accuracy"
    reached = accuracy or (forecast.eval_mse_at_ridge if held else forecast.loo)
    part = "eval" if held else "train" if start["held_out_mse"] is None else "held_out"
    before = start[f"{part}_{kind}"]
    lines = [
        f"Fine-tuning is forecast to reach {'eval' if held else 'leave-one-out'} {kind} {span(reached)}, a 95 % "
        f"interval; before it, {kind} {score(kind, before)}: {_gain(before, reached, higher=accuracy is not None)}."
    ]
    share = start.get(f"{'eval' if held else 'train'}_largest_class")
    if accuracy is not None and share is not None:
        lines.append(f"Always naming the largest class gets {largest_class(forecast)}: {_place(share, accuracy)}.")
    edges = [f" {line}" for line in forecast.assumptions if EDGE in line and forecast.ridge == forecast.ridges[-1]]
    how = f"to get it in training: {ridge_in_training(forecast)}"
    lines.append(f"Ridge: {chosen_ridge(forecast)}; {how}.{''.join(edges[:1])}")
    shares = largest_shares(forecast, _SHARES)
    if shares:
        lines.append(f"Modules with most of the trace: {', '.join(' '.join(pair) for pair in shares)}.")
    return lines


def training_verdict(history: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[str]:
    """Return what a fine-tuning measured before and after.

    Args:
        history: its measurements.
        names: what their fields are called, those to tell of.
    """
    if len(history) < 2:
        return []
    ends = [(told, history[0].get(name), history[-1].get(name)) for name, told in names.items()]
    pairs = [f"{told} {a:.4g} → {b:.4g}" for told, a, b in ends if a is not None and b is not None]
    return [f"Measured before and after training: {', '.join(pairs)}."] if pairs else []


def against_forecasts(history: Sequence[Mapping[str, Any]], forecasts: Mapping[str, Any]) -> list[str]:
    """Return how the end of a fine-tuning compares with the forecasts from the same start, on the same examples.

    Losses are ½‖f − y‖². A start is the same where its train and eval loss are, to a thousandth.

    Args:
        history: measurements of the fine-tuning.
        forecasts: by name.
    """
    lines = []
    for name, forecast in forecasts.items() if len(history) > 1 else ():
        half, first, last = forecast.outputs / 2, history[0], history[-1]
        starts = [(forecast.start[f"{part}_mse"], first[f"{part}_loss"]) for part in ("train", "eval")]
        if any(None in both or not math.isclose(half * both[0], both[1], rel_tol=1e-3) for both in starts):
            continue
        what, reached, found = "eval accuracy", forecast.eval_accuracy_at_ridge, last["eval_accuracy"]
        if reached is None or found is None:
            what, reached, found = "eval mse", forecast.eval_mse_at_ridge, last["eval_loss"]
            found = None if found is None else found / half
        if reached is not None and found is not None:
            _, low, high = reached
            place = "within the interval" if low <= found <= high else f"{'below' if found < low else 'above'} it"
            lines.append(f"{name} forecast {what} {between(*reached)} at its ridge; measured {found:.4g}, {place}.")
    return lines


def spectrum_verdict(condition: Any, reason: str) -> list[str]:
    """Return what a Gram without a forecast comes to.

    Args:
        condition: its condition number.
        reason: why there is no forecast, in a few words.
    """
    return [f"{reason}: spectrum only; condition number {condition}."]


def ranking_verdict(choices: Sequence[Mapping[str, Any]], start: Mapping[str, Any] | None = None) -> list[str]:
    """Return what a ranking says of its first choice, and of the model before training.

    Args:
        choices: best first: `name`, `parameters`, and the intervals `eval_loss` and `eval_accuracy`, which may be None.
        start: the intervals of the model before training.
    """
    best, losses = choices[0], [choice["eval_loss"] for choice in choices]
    named = f"{best['name']} ({best['parameters']:,} parameters)"
    figures = [(told, None if start is None else start[key], best[key]) for key, told in _RANKED.items()]
    told = ", ".join(f"{what} {_from(before)}{span(after)}" for what, before, after in figures if after)
    first_loss = None if start is None else start["eval_loss"]
    lines = against_start(losses[0], first_loss)
    if first_loss is not None and losses[0][0] >= first_loss[0]:
        return [*lines, f"The first, {named}: {told}.", *not_told_apart(losses)]
    return [f"Adapt {named}: {told}.", *lines, *not_told_apart(losses)]


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


def _from(before: Interval | None) -> str:
    """Return the value before training, and an arrow."""
    return "" if before is None else f"{nearest(before[0])} → "


def _gain(start: float, reached: Interval, higher: bool) -> str:
    """Return whether training helps: `higher` where more is better."""
    _, low, high = reached
    if low <= start <= high:
        return "within the interval, so not told apart from no training"
    return "training helps" if (start < low) is higher else "training is forecast to make it worse"


def _place(share: float, accuracy: Interval) -> str:
    _, low, high = accuracy
    if low <= share <= high:
        return "within the interval, so the examples do not tell the two apart"
    return "below the interval" if share < low else "above the interval: the forecast is worse"
