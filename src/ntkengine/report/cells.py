"""Figures of a forecast as the cells of its table, and the sentences above a report, have them.

Objects are taken by their public attributes.
"""

from __future__ import annotations

from typing import Any

from ntkengine.digits import measured
from ntkengine.report.tables import shortened


def score(kind: str, value: float) -> str:
    """Return an "mse" or an "accuracy" without its interval."""
    return f"{value:.3f}" if kind == "accuracy" else f"{value:.4g}"


def aligned(value: float, error: float, digits: int) -> str:
    """Return an alignment with its error; one that the noise may have made is not resolved."""
    return measured(value, error, digits) if error < 1.0 else "not resolved: within what the noise may do"


def largest_class(forecast: Any) -> str:
    """Return the share of the largest class of train and of eval, those that are known."""
    shares = ((name, forecast.start.get(f"{name}_largest_class")) for name in ("train", "eval"))
    return ", ".join(f"{name} {share:.3f}" for name, share in shares if share is not None)


def chosen_ridge(forecast: Any) -> str:
    """Return the ridge, and what the two criteria chose."""
    return f"{forecast.ridge:.3g} (LOO {forecast.ridge_loo:.3g}, GCV {forecast.ridge_gcv:.3g})"


def ridge_in_training(forecast: Any) -> str:
    """Return what has the effect of the ridge in training."""
    return f"proximal {forecast.proximal:.3g}, or stop at time {forecast.stopping_time:.3g}"


def largest_shares(forecast: Any, most: int) -> list[tuple[str, str]]:
    """Return the modules with most of the trace, each with its share."""
    names = dict(zip(forecast.modules, shortened(list(forecast.modules)), strict=True))
    shares = sorted(forecast.modules.items(), key=lambda item: -item[1])[:most]
    return [(names[name], f"{share:.1%}") for name, share in shares]
