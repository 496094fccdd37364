"""Training curves: gradient flow of the linearised model, in closed form.

Shapes: N train and M eval examples, C outputs, T times.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ntkengine.arguments import real_array
from ntkengine.errors import InputError
from ntkengine.forecast.scores import hits, mean_interval, wilson_interval
from ntkengine.forecast.system import Flow

_TIMES = 121
_DECADES = 10.0  # at most, of the default times
_KNOWN = 0.1  # of n/noise: until then the noise moves residuals by less than 1 − e^−0.2 of them


def checked_times(times: ArrayLike) -> np.ndarray:
    """Return given times as a sorted float64 (T,); InputError unless all are finite and > 0."""
    array = real_array("times", times).astype(np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all() or (array <= 0).any():
        raise InputError(f"times: expected a list of finite numbers > 0, got {array!r}")
    return np.sort(array)


def default_times(n: int, top: float, bottom: float, noise: float) -> np.ndarray:
    """Return a log grid from 0.01·n/λ_max to 100·n/λ_min, but no further than the noise lets the flow be known.

    Args:
        n: examples the loss is a mean over.
        top: λ_max > 0.
        bottom: λ_min.
        noise: error of an eigenvalue, > 0.

    Returns:
        (121,) float64, spanning at least three and at most ten decades.
    """
    first = 0.01 * n / top
    last = _KNOWN * n / noise
    last = min(100.0 * n / bottom, last) if bottom > noise else last
    return np.geomspace(first, min(max(last, 1e3 * first), first * 10.0**_DECADES), _TIMES)


def flow_curves(
    flow: Flow,
    y: np.ndarray,
    y_eval: np.ndarray | None,
    f0_eval: np.ndarray | None,
    times: np.ndarray,
    noise: float,
    classes: bool,
) -> dict[str, Any]:
    """Return the curves of `Forecast` along times, and the best time on them, by field name.

    Args:
        flow: systems decomposed for y − f0.
        y: (N, C) targets.
        y_eval: (M, C) or None.
        f0_eval: (M, C), the start on the eval rows, or None.
        times: (T,).
        noise: eigenvalues at or below it do not move.
        classes: whether to score accuracies.

    Returns:
        (T,) float64 by name, or None where there is nothing to score; `best_time`, `best_eval_loss` and
        `best_eval_accuracy`.

    Cost: T·n·m·(n + M) multiply-adds a system.
    """
    n = len(y)
    names = ("train_loss", "train_accuracy", "eval_loss", "eval_accuracy", "displacement")
    found: dict[str, list[float]] = {name: [] for name in names}
    best = None  # eval losses and hits by example at the time of the least eval loss
    for t in times:

        def decay(v: np.ndarray, t: float = t) -> np.ndarray:
            return np.where(v > noise, np.exp(-np.maximum(v, 0.0) * t / n), 1.0)

        def reach(v: np.ndarray, t: float = t) -> np.ndarray:
            """(1 − e^{−λt/n})/λ on the resolved eigenvalues."""
            resolved = v > noise
            return np.where(resolved, -np.expm1(-v * t / n * resolved) / np.where(resolved, v, 1.0), 0.0)

        residual = flow.train(decay)
        found["train_loss"].append(0.5 * float((residual**2).sum()) / n)
        found["displacement"].append(float(np.sqrt(flow.energy(lambda v: v * reach(v) ** 2))))
        if classes:
            found["train_accuracy"].append(float(hits(y - residual, y).mean()))
        if y_eval is not None and f0_eval is not None:
            f = f0_eval + flow.evaluate(reach)
            losses, right = 0.5 * ((f - y_eval) ** 2).sum(axis=1), hits(f, y_eval) if classes else None
            found["eval_loss"].append(float(losses.mean()))
            if found["eval_loss"][-1] == min(found["eval_loss"]):
                best = float(t), losses, right
            if right is not None:
                found["eval_accuracy"].append(float(right.mean()))
    curves: dict[str, Any] = {f"curve_{name}": np.array(values) if values else None for name, values in found.items()}
    curves |= dict.fromkeys(("best_time", "best_eval_loss", "best_eval_accuracy"))
    if best is not None:
        t, losses, right = best
        curves |= {"best_time": t, "best_eval_loss": mean_interval(losses)}
        if right is not None:
            curves["best_eval_accuracy"] = wilson_interval(int(right.sum()), len(right))
    return curves
