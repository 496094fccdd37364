"""A forecast's simulated training: the recipe run on the kernels of a Gram."""

from __future__ import annotations

from typing import Any

import numpy as np

from ntkengine.errors import InputError
from ntkengine.forecast.simulate import Simulation, simulate
from ntkengine.forecast.system import Kernel
from ntkengine.recipe import Recipe


def simulated(
    gram: Any,
    kernel: Kernel,
    y: np.ndarray,
    f0: np.ndarray,
    y_eval: np.ndarray | None,
    f0_eval: np.ndarray | None,
    recipe: Recipe | dict[str, Any],
) -> Simulation:
    """Return the recipe simulated on a Gram, by module where it has them.

    Args:
        gram: the Gram.
        kernel: its systems.
        y: (N, C) targets.
        f0: (N, C) start.
        y_eval: (M, C) or None.
        f0_eval: (M, C) or None.
        recipe: the training, or a mapping of its fields.

    Raises:
        InputError: a Gram of another inner product, Adam without per-module Grams, or "per-output" with several
            outputs.
    """
    if getattr(gram, "transform", "sgd") != "sgd":
        raise InputError(
            f"gram: expected the plain inner product (transform 'sgd') to simulate a recipe on, got {gram.transform!r}"
        )
    recipe = Recipe.of(recipe)
    if kernel.layout == "per-output":
        raise InputError("recipe: expected a Gram of contraction 'trace' or 'full', got 'per-output'")
    modules, crosses = getattr(gram, "modules", None) or {}, getattr(gram, "cross_modules", None) or {}
    sizes = _sizes(gram)
    known = bool(modules) and all(name in sizes for name in modules) and (y_eval is None or bool(crosses))
    if recipe.optimizer == "adam" and not known:
        raise InputError(
            "recipe: Adam scales each module's gradient by itself: expected a Gram computed with per_module=True "
            "(--per-module), got one without modules"
        )
    names = list(modules) if known else []
    grams = [np.asarray(modules[n], dtype=np.float64) / kernel.divisor for n in names] or kernel.matrices
    across = None
    if y_eval is not None:
        across = [np.asarray(crosses[n], dtype=np.float64) / kernel.divisor for n in names] or kernel.crosses
    return simulate(
        grams,
        y,
        recipe,
        offset=f0,
        sizes=[sizes[n] for n in names] or None,
        crosses=across,
        eval_targets=y_eval,
        eval_offset=f0_eval,
    )


def training_notes(training: Simulation | None) -> list[str]:
    """Return what a simulated training rests on."""
    if training is None:
        return []
    lines = ["The simulated training is the linearised model's, on one order of batches."]
    if training.recipe.optimizer == "adam":
        lines.append("Adam's steps are derived with one second moment a module; real Adam has one an entry.")
    if training.eval_losses is not None:
        lines.append(
            "Its 90% intervals add the draw of eval examples and a share for what the linearisation leaves out, "
            "measured on real runs, not derived."
        )
    return lines


def _sizes(gram: Any) -> dict[str, int]:
    """Return the parameters of each module, as far as the Gram's plan tells."""
    found: dict[str, int] = {}
    plan = getattr(gram, "plan", None)
    for row in [] if plan is None else plan.parameters:
        found[row.module] = found.get(row.module, 0) + row.rows * row.columns
    return found
