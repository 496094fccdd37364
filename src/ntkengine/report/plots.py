"""Figures of a forecast. The only matplotlib import, made when a figure is drawn."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ntkengine import digits
from ntkengine.errors import InputError

_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#0072b2", "#d55e00", "#009e73", "#b2182b", "#7a7a7a"
_KINDS = 9  # module kinds with a colour of their own
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


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
    figure, axes = _figure()
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
    return _finish(figure)


def risk_figure(forecast: Any) -> Any:
    """Return the errors along the ridge path, with the chosen ridge and the leave-one-out interval there."""
    figure, axes = _figure()
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
    return _finish(figure)


def curve_figure(forecast: Any) -> Any:
    """Return the forecast loss, and the accuracy below it where targets name classes, against training time."""
    accuracies = forecast.curve_train_accuracy is not None or forecast.curve_eval_accuracy is not None
    figure, first = _figure(rows=2 if accuracies else 1)
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
    return _finish(figure)


def selection_figure(names: Sequence[str], losses: Sequence[tuple[float, float, float]]) -> Any:
    """Return the forecast eval loss of subsets of modules with 90 % intervals, the best on top.

    Args:
        names: of the subsets.
        losses: (value, low, high) of each.
    """
    value, low, high = np.array(losses).T
    figure, ax = _figure(height=1.2 + 0.28 * len(names))
    place = np.arange(len(names))[::-1]
    ax.errorbar(value, place, xerr=[value - low, high - value], fmt="o", ms=4, lw=1, color=_palette(0))
    ax.set_yticks(place, [name if len(name) <= 40 else f"{name[:37]}…" for name in names])
    ax.set_xlabel("forecast eval loss, 90 % interval")
    ax.set_title("Which modules to adapt")
    return _finish(figure)


def training_figure(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Any:
    """Return losses measured while a model was fine-tuned.

    Args:
        curves: (steps, losses) by name, at least one; those of the linear model are dashed.

    Raises:
        ValueError: no curve, or an empty one.
    """
    if not curves or not all(len(x) for x, _ in curves.values()):
        raise ValueError(f"curves: expected at least one with at least one point, got {list(curves)}")
    figure, ax = _figure()
    for i, (name, (steps, losses)) in enumerate(curves.items()):
        ax.plot(steps, losses, "o--" if "linear" in name else "o-", ms=3, color=_palette(i % 2), label=name)
    ax.set(xlabel="step", ylabel="mean loss", title="Measured while fine-tuning")
    return _finish(figure)


def modules_figure(shares: Mapping[str, float]) -> Any:
    """Return each module's share of the trace: one bar a layer, stacked by kind, and one bar a kind.

    Args:
        shares: share by module name; they sum to 1.
    """
    layers, kinds = _grouped(shares)
    names = sorted(kinds, key=lambda kind: -kinds[kind])
    told = names[:_KINDS]
    colours = {kind: _palette(i) for i, kind in enumerate(told)}
    height = max(2.6, 0.24 * len(layers) + 0.2 * len(told) + 1.6)
    figure, (ax, by_kind) = _figure(rows=2, height=height, ratios=(max(len(layers), 2), max(len(told), 2)))
    for i, parts in enumerate(layers.values()):
        left = 0.0
        for kind in sorted(parts, key=lambda kind: -kinds[kind]):
            ax.barh(
                i, 100 * parts[kind], left=100 * left, color=colours.get(kind, "#cccccc"), edgecolor="white", lw=0.4
            )
            left += parts[kind]
    ax.set_yticks(range(len(layers)), list(layers), fontsize=7)
    ax.invert_yaxis()
    figure.suptitle("Share of the trace by layer (top) and by kind of module (bottom)", fontsize=10)
    rest = sum(kinds[kind] for kind in names[_KINDS:])
    rows = [(kind, kinds[kind], colours[kind]) for kind in told]
    if rest > 0:
        rows.append((f"{len(names) - _KINDS} others", rest, "#cccccc"))
    by_kind.barh(range(len(rows)), [100 * r[1] for r in rows], color=[r[2] for r in rows])
    by_kind.set_yticks(range(len(rows)), [_short(r[0]) for r in rows], fontsize=7)
    by_kind.invert_yaxis()
    by_kind.set_xlabel("share of the trace (%)")
    return _finish(figure, legend=False)


def _grouped(shares: Mapping[str, float]) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Return shares by layer then kind, and by kind. A layer is the first number in the name."""
    layers: dict[str, dict[str, float]] = {}
    kinds: dict[str, float] = {}
    numbered = [name for name in shares if _LAYER.search(name)]
    outside = sorted(set(shares) - set(numbered))
    for name in [*sorted(numbered, key=lambda n: int(_number(n))), *outside]:
        found = _LAYER.search(name)
        kind = name[found.end() :] or "layer" if found else _own(name)
        layer = f"layer {found[1]}" if found else _own(name).split(".")[0]
        layers.setdefault(layer, {})
        layers[layer][kind] = layers[layer].get(kind, 0.0) + shares[name]
        kinds[kind] = kinds.get(kind, 0.0) + shares[name]
    return layers, kinds


def _number(name: str) -> str:
    found = _LAYER.search(name)
    return found[1] if found else "-1"


def _own(name: str) -> str:
    """Drop the wrapper's and the model's own prefix of a module outside the layers."""
    parts = [part for part in name.split(".") if part not in {"base_model", "model", "transformer"}]
    for i, part in enumerate(parts):
        if part in {"embeddings", "pooler", "classifier", "score"}:
            return ".".join(parts[i:])
    return ".".join(parts) or name


def _short(name: str) -> str:
    return name if len(name) <= 34 else f"…{name[-33:]}"


def _palette(index: int) -> str:
    colours = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#a6611a", "#4d4d4d")
    return colours[index % len(colours)]


def require() -> Any:
    """Return matplotlib's Figure class.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("figures: matplotlib is not installed; pip install matplotlib") from error
    return Figure


def _figure(rows: int = 1, height: float | None = None, ratios: tuple[float, ...] | None = None) -> tuple[Any, Any]:
    figure = require()(figsize=(6.4, height or (4.0 if rows == 1 else 5.2)), layout="constrained")
    axes = figure.subplots(rows, sharex=rows > 1 and ratios is None, height_ratios=ratios)
    for ax in np.atleast_1d(axes):
        ax.grid(True, color="#e6e6e6", lw=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _finish(figure: Any, legend: bool = True) -> Any:
    for ax in figure.axes:
        ax.title.set_size(10)
        ax.tick_params(labelsize=8)
        if legend and ax.get_legend_handles_labels()[1]:
            ax.legend(fontsize=7.5, frameon=False)
    return figure
