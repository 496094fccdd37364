"""Figures of forecasts, rankings and fine-tunings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ntkengine import digits
from ntkengine.report.drawing import PALETTE, blank, finished
from ntkengine.report.modulesfigure import modules_figure

_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#0072b2", "#d55e00", "#009e73", "#b2182b", "#7a7a7a"


def forecast_figures(forecast: Any) -> dict[str, Any]:
    """Return matplotlib figures by name: `spectrum`, `risk`, `curve`, and `modules` where the shares are known.

    Args:
        forecast: a Forecast.

    Returns:
        Figures bound to no window and no global state; `figure.savefig(path)` writes one.

    Raises:
        InputError: matplotlib is not installed.
    """
    figures = {
        "spectrum": spectrum_figure(forecast.eigenvalues, forecast.noise, str(forecast.condition)),
        "risk": risk_figure(forecast),
        "curve": curve_figure(forecast),
    }
    if forecast.modules:
        figures["modules"] = modules_figure(forecast.modules)
    return figures


def spectrum_figure(eigenvalues: np.ndarray, noise: float, condition: str) -> Any:
    """Return eigenvalues against their rank on log axes, with the floor below which they are noise.

    Args:
        eigenvalues: (n,) descending. Unit gradient².
        noise: error of each.
        condition: the condition number as text, for the title.
    """
    figure, axes = blank()
    above = eigenvalues > max(noise, 0.0)
    rank = np.arange(1, len(eigenvalues) + 1)
    positive = eigenvalues > 0
    axes.loglog(rank[above], eigenvalues[above], ".-", color=_BLUE, ms=4, lw=1, label=f"{int(above.sum())} resolved")
    hidden = positive & ~above
    if hidden.any():
        axes.loglog(
            rank[hidden], eigenvalues[hidden], ".", color=_GREY, ms=3, label=f"{int((~above).sum())} unresolved"
        )
    if noise > 0:
        axes.axhline(noise, color=_RED, lw=1, ls="--", label=f"error of each, {digits.above(noise, 2)}")
        axes.axhspan(axes.get_ylim()[0], noise, color=_RED, alpha=0.07, lw=0)
    axes.set(
        xlabel="rank", ylabel="eigenvalue (gradient²)", title=f"Spectrum: condition number {condition.split(' (')[0]}"
    )
    return finished(figure)


def risk_figure(forecast: Any) -> Any:
    """Return the errors along the ridge path, with the chosen ridge and the leave-one-out interval there."""
    figure, axes = blank()
    lines = (
        ("train", forecast.train_mse, _GREY, ":"),
        ("leave-one-out", forecast.loo_mse, _BLUE, "-"),
        ("GCV", forecast.gcv, _GREEN, "--"),
        ("eval", forecast.eval_mse, _ORANGE, "-"),
    )
    for label, values, colour, style in lines:
        if values is not None:
            width = 2.6 if label == "leave-one-out" else 1.4
            axes.plot(forecast.ridges, values, style, color=colour, lw=width, label=label)
    value, low, high = forecast.loo
    bars = [[value - low], [high - value]]
    if np.isfinite(bars).all():
        axes.errorbar([forecast.ridge], [value], yerr=bars, color=_BLUE, fmt="o", ms=4, capsize=3, label="95% interval")
    axes.axvline(forecast.ridge, color="black", lw=0.8, ls=":", label=f"chosen ridge {forecast.ridge:.2g}")
    start = forecast.start.get("eval_mse")
    if start is not None:
        axes.axhline(start, color=_ORANGE, lw=0.8, ls=(0, (1, 3)), label="eval before training")
    best = min(float(np.min(v)) for _, v, _, _ in lines[1:] if v is not None)
    worst = max(float(v[-1]) for _, v, _, _ in lines if v is not None)
    tested = [float(np.max(v)) for _, v, _, _ in lines[1:] if v is not None]
    # Interpolation can be arbitrarily bad: keep the part where the choice is made in view, and the interval whole.
    ceiling = min(max(tested), 3.0 * max(best, worst))
    axes.set_ylim(0, max(ceiling, high if np.isfinite(high) else 0.0) * 1.08)
    axes.set_xscale("log")
    axes.set(
        xlabel="ridge (gradient²)", ylabel="mean squared error", title="Kernel ridge regression along the ridge path"
    )
    return finished(figure)


def curve_figure(forecast: Any) -> Any:
    """Return the forecast loss, and the accuracy below it where targets name classes, against training time."""
    accuracies = forecast.curve_train_accuracy is not None or forecast.curve_eval_accuracy is not None
    figure, first = blank(rows=2 if accuracies else 1)
    axes = list(first) if accuracies else [first]
    panels = (
        ("loss, mean of ½‖f − y‖²", forecast.curve_train_loss, forecast.curve_eval_loss),
        ("accuracy", forecast.curve_train_accuracy, forecast.curve_eval_accuracy),
    )
    for ax, (label, train, held) in zip(axes, panels, strict=False):
        if train is not None:
            ax.semilogx(forecast.times, train, color=_GREY, lw=1.6, label="train")
        if held is not None:
            ax.semilogx(forecast.times, held, color=_ORANGE, lw=1.6, label="eval")
        if forecast.best_time is not None:
            ax.axvline(forecast.best_time, color="black", lw=0.8, ls=":", label="least eval loss")
        ax.set_ylabel(label)
    axes[0].set_ylim(bottom=0)
    axes[0].set_title("Forecast training curve (gradient flow)")
    axes[-1].set_xlabel("time: learning rate × full-batch steps")
    return finished(figure)


def selection_figure(names: Sequence[str], losses: Sequence[tuple[float, float, float]]) -> Any:
    """Return the forecast eval loss of subsets of modules with 90 % intervals, the best on top.

    Args:
        names: of the subsets.
        losses: (value, low, high) of each.
    """
    value, low, high = np.array(losses).T
    figure, ax = blank(height=1.2 + 0.28 * len(names))
    place = np.arange(len(names))[::-1]
    ax.errorbar(value, place, xerr=[value - low, high - value], fmt="o", ms=4, lw=1, color=PALETTE[0])
    ax.set_yticks(place, [name if len(name) <= 40 else f"{name[:37]}…" for name in names])
    ax.set_xlabel("forecast eval loss, 90 % interval")
    ax.set_title("Which modules to adapt")
    return finished(figure)


def training_figure(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Any:
    """Return losses measured while a model was fine-tuned.

    Args:
        curves: (steps, losses) by name, at least one; those of the linear model are dashed.

    Raises:
        ValueError: no curve, or an empty one.
    """
    if not curves or not all(len(x) for x, _ in curves.values()):
        raise ValueError(f"curves: expected at least one with at least one point, got {list(curves)}")
    figure, ax = blank()
    for i, (name, (steps, losses)) in enumerate(curves.items()):
        ax.plot(steps, losses, "o--" if "linear" in name else "o-", ms=3, color=PALETTE[i % 2], label=name)
    ax.set(xlabel="step", ylabel="mean loss", title="Measured while fine-tuning")
    return finished(figure)
