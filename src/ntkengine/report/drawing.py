"""How every figure looks. The only matplotlib import, made when a figure is drawn."""

from __future__ import annotations

from typing import Any

import numpy as np

from ntkengine.errors import InputError

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#a6611a", "#4d4d4d")


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


def blank(rows: int = 1, height: float | None = None, ratios: tuple[float, ...] | None = None) -> tuple[Any, Any]:
    """Return a figure and its axes, one below the other, several as an array.

    Args:
        rows: how many.
        height: of the figure, in inches.
        ratios: of their heights; with them each has its own x axis.
    """
    figure = require()(figsize=(6.4, height or (4.0 if rows == 1 else 5.2)), layout="constrained")
    axes = figure.subplots(rows, sharex=rows > 1 and ratios is None, height_ratios=ratios)
    for ax in np.atleast_1d(axes):
        ax.grid(True, color="#e6e6e6", lw=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def finished(figure: Any, legend: bool = True) -> Any:
    """Return a figure with its texts in size, and with legends where something has a label."""
    for ax in figure.axes:
        ax.title.set_size(10)
        ax.tick_params(labelsize=8)
        if legend and ax.get_legend_handles_labels()[1]:
            ax.legend(fontsize=7.5, frameon=False)
    return figure
