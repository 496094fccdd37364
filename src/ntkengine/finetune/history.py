"""What a fine-tuning run went through, as numbers by step."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ntkengine.recipe import Recipe


@dataclass(frozen=True)
class Measured:
    """The model, and its linearisation where that was trained along, after some steps.

    Losses are means over examples, without the proximal term.

    Attributes:
        step: steps done.
        epoch: passes over the examples done.
        time: learning rates summed over them.
        train_loss: over all training examples.
        train_accuracy: likewise; None where targets name no class, as are all accuracies.
        eval_loss: over the eval examples, or None.
        eval_accuracy: likewise.
        displacement: ‖θ_t − θ_0‖.
        linear_train_loss: of the linearised model trained on the same batches; None without it, as all that follows.
        linear_train_accuracy: likewise.
        linear_eval_loss: likewise.
        linear_eval_accuracy: likewise.
        linear_displacement: ‖θ̄_t − θ_0‖.
        gap: ‖f_θt − f̄_θ̄t‖ over all outputs of the training examples.
        relative_gap: the gap divided by ‖f_θt − f_θ0‖; None while that is 0.
        divergence: mean over training examples of KL(softmax f_θt ‖ softmax f̄_θ̄t).
        eval_gap: the gap over the eval examples.
        eval_relative_gap: the relative gap over them.
        eval_divergence: the divergence over them.
    """

    step: int
    epoch: float
    time: float
    train_loss: float
    train_accuracy: float | None
    eval_loss: float | None
    eval_accuracy: float | None
    displacement: float
    linear_train_loss: float | None = None
    linear_train_accuracy: float | None = None
    linear_eval_loss: float | None = None
    linear_eval_accuracy: float | None = None
    linear_displacement: float | None = None
    gap: float | None = None
    relative_gap: float | None = None
    divergence: float | None = None
    eval_gap: float | None = None
    eval_relative_gap: float | None = None
    eval_divergence: float | None = None


@dataclass(frozen=True)
class FineTuning:
    """A finished run; the model holds the parameters it ended with.

    Attributes:
        recipe: what was run.
        history: measurements in order, the first before training.
        outputs: (N, C) float64, f of the training examples after the run.
        eval_outputs: (M, C) float64, or None.
        batch_losses: (steps,) float64, the loss of each step's batch before the step.
        seconds: of training, without measurements.
        measuring_seconds: of those.
    """

    recipe: Recipe
    history: list[Measured]
    outputs: np.ndarray
    eval_outputs: np.ndarray | None
    batch_losses: np.ndarray
    seconds: float
    measuring_seconds: float

    def __repr__(self) -> str:
        first, last = self.history[0], self.history[-1]
        facts = [f"train loss {first.train_loss:.4g} to {last.train_loss:.4g}"]
        if last.eval_loss is not None:
            facts.append(f"eval loss {first.eval_loss:.4g} to {last.eval_loss:.4g}")
        return f"FineTuning({len(self.batch_losses)} steps of {self.recipe.optimizer}: {', '.join(facts)})"

    def table(self) -> list[tuple[str, ...]]:
        """Return rows for printing, the first naming the columns; columns without a number are left out."""
        names = [n for n in Measured.__dataclass_fields__ if any(getattr(m, n) is not None for m in self.history)]
        return [tuple(names), *(tuple(_shown(getattr(m, n)) for n in names) for m in self.history)]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-able values."""
        return {
            "recipe": asdict(self.recipe),
            "history": [asdict(m) for m in self.history],
            "outputs": self.outputs.tolist(),
            "eval_outputs": None if self.eval_outputs is None else self.eval_outputs.tolist(),
            "batch_losses": self.batch_losses.tolist(),
            "seconds": self.seconds,
            "measuring_seconds": self.measuring_seconds,
        }


def _shown(value: float | int | None) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"
