"""The figures, from the lines on record alone."""

from __future__ import annotations

from collections.abc import Callable

from bench import scaling
from bench.experiments import condition, deviation, picture
from bench.record import RESULTS

FIGURES: dict[str, Callable[[], bool]] = {
    "scaling.png": scaling.draw,
    "calibration.png": picture.draw,
    "condition.png": condition.draw,
    "deviation.png": deviation.draw,
}


def main() -> int:
    """Draw every figure whose lines are there, beside them; return 1 if there were none at all."""
    drawn = [name for name, draw in FIGURES.items() if draw()]
    for name in FIGURES:
        print(RESULTS / name if name in drawn else f"{name}: no lines")
    return 0 if drawn else 1
