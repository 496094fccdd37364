"""The calibration's picture, from its lines alone: `python -m bench plot`."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.experiments import calibration, runs, tasks
from bench.record import RESULTS

KINDS = {"qv": "o", "k": "s", "mid": "^", "all": "D"}


def draw() -> bool:
    """Draw forecast against measured, the means over seeds, to calibration.png; False: there are no lines."""
    real, told = runs.lines(), calibration.lines()
    if not (real and told):
        return False
    present = [t for t in tasks.TASKS if any(f["config"]["task"] == t for f in told)]
    figure = Figure(figsize=(4.2 * len(present), 7.6), layout="constrained")
    axes = figure.subplots(2, len(present), squeeze=False)
    for column, task in enumerate(present):
        means = _means(task, real, told)
        for row, (title, x, y) in enumerate((("training loss", 0, 1), ("test loss", 2, 3))):
            ax = axes[row][column]
            for kind, marker in KINDS.items():
                points = np.array([values for name, values in means.items() if f"-{kind}-" in name])
                if len(points):
                    ax.plot(points[:, x], points[:, y], marker, ms=4, mfc="none", label=kind)
            ends = [min(*ax.get_xlim(), *ax.get_ylim()), max(*ax.get_xlim(), *ax.get_ylim())]
            ax.plot(ends, ends, lw=0.6, color="#999999")
            ax.set_title(f"{task}: {title} after training", size=10)
            ax.set_xlabel("forecast" if row == 0 else "forecast, on validation text")
            ax.set_ylabel("measured")
            ax.legend(fontsize=7.5, frameon=False)
    figure.savefig(RESULTS / "calibration.png", dpi=110)
    return True


def _means(task: str, real: list[dict[str, Any]], told: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return by set-up forecast and measured training loss, forecast and measured test loss: means over seeds."""
    measured = {(r["config"]["seed"], r["config"]["setup"]): r for r in real if r["config"]["task"] == task}
    found: dict[str, list[list[float]]] = {}
    for line in told:
        key = line["config"]["seed"], line["config"]["setup"]
        if line["config"]["task"] == task and key in measured:
            run = measured[key]
            values = [line["train_loss"], run["train_loss"][-1], line["rehearsal"], run["test_loss"]]
            found.setdefault(key[1], []).append(values)
    return {name: np.mean(values, axis=0).tolist() for name, values in found.items()}
