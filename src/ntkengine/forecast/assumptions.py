"""What a forecast rests on, in sentences."""

from __future__ import annotations

from typing import Any

import numpy as np

from ntkengine.digits import above
from ntkengine.forecast.crossfit import CrossFit
from ntkengine.forecast.system import Kernel
from ntkengine.report.tables import sketch_note
from ntkengine.report.verdict import EDGE
from ntkengine.ridge.checks import FAR
from ntkengine.spectrum import ConditionNumber


def start_line(held: np.ndarray | None, cross_fit: CrossFit | None, fitted: bool, words: bool) -> str:
    """Return from which outputs leave-one-out and GCV start; nothing where they are of `words`, which have no head."""
    if cross_fit is not None:
        return (
            "Leave-one-out and GCV use heads, and their kernels, that did not see the example; curves and eval do not."
        )
    if held is None:
        return "" if words else "Leave-one-out and GCV are right only if the head was not fitted on these targets."
    line = "Leave-one-out and GCV start from the held-out outputs; curves and eval from the real start."
    return line + (" The kernel is of a head that saw all targets, so they are still too small." if fitted else "")


def assumptions_of(
    kernel: Kernel,
    condition: ConditionNumber,
    ridge: float,
    start: str,
    classes: bool,
    loo_edge: str,
    gcv_edge: str,
    gram: Any,
) -> list[str]:
    """Return the sentences."""
    lines = [
        "The model stays near its linearisation at the start.",
        "Time is learning rate x full-batch steps of gradient descent on the mean over examples of 0.5*||f - y||^2.",
        "Intervals take examples as independent; the chosen ridge minimises an estimate, so its value is a little low.",
    ]
    transform = getattr(gram, "transform", "sgd")
    if transform != "sgd":
        lines.append(f"The kernel uses the {transform!r} inner product; the flow is that of this kernel.")
    if sketch_note(gram):
        lines.append(f"The kernel is approximate ({sketch_note(gram)}); its error is part of the noise.")
    if kernel.divisor > 1:
        lines.append(f"Every output is taken to have the kernel K/{kernel.outputs}, independent of the other outputs.")
    lines += [start] if start else []
    if ridge < FAR * condition.noise:
        share = above(2.0 * condition.noise / ridge, 1)
        lines.append(
            f"The ridge is only {ridge / condition.noise:.2g} times the noise ({above(condition.noise, 2)}): figures "
            f"at it may differ from those of the true kernel by a share of {share} beyond their intervals."
        )
    if not classes:
        lines.append(
            "Targets name no class (C = 1: one number a sign; C > 1: one row of numbers each), so no accuracy is given."
        )
    for name, edge in (("leave-one-out", loo_edge), ("GCV", gcv_edge)):
        if edge == "upper":
            lines.append(f"The {name} {EDGE}: the kernel adds little to the start.")
        if edge == "lower":
            lines.append(f"The {name} optimum is at the smallest ridge tried: less regularisation is not resolved.")
    return lines


def curve_notes(times: np.ndarray, best: float | None, n: int, condition: ConditionNumber) -> list[str]:
    """Return what is to be said of the training curve.

    Args:
        times: (T,) of the curve.
        best: of least eval loss, or None.
        n: train examples.
        condition: of the kernel, with its noise.
    """

    def moved(time: float) -> str:
        # K̃ without what is not resolved is off by at most twice the noise, e^(−K̃t/n) by that times t/n (Duhamel).
        return f"{above(-100.0 * float(np.expm1(-2.0 * condition.noise * time / n)), 1)} %"

    lines = []
    if not condition.resolved:
        line = (
            "Eigenvalues at or below the noise do not move in the training curve; by its last time they may have moved "
        )
        line += f"residuals by {moved(times[-1])} of the start's"
        lines.append(line + (f", by that of least eval loss by {moved(best)}." if best is not None else "."))
    if best is not None and best == times[-1]:
        lines.append("The eval loss still falls at the last time of the curve: it may become less.")
    return lines
