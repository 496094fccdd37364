"""A training recipe: what a forecast is for, and what fine-tuning then does, batch for batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from ntkengine.arguments import flag, scalar, whole
from ntkengine.errors import InputError

if TYPE_CHECKING:
    import numpy as np

_CHOICES = {
    "optimizer": ("adam", "sgd"),
    "loss": ("squared", "cross-entropy"),
    "schedule": ("constant", "linear"),
}


@dataclass(frozen=True)
class Recipe:
    """How a model is fine-tuned: loss, optimiser, and how much of it.

    The objective is the mean over examples of ½‖f − y‖² ("squared") or of the cross-entropy −log softmax(f)_y
    ("cross-entropy"; with one output, of the logistic loss, f the log-odds of class 1), plus
    (proximal/2)·‖θ − θ_0‖².

    Attributes:
        learning_rate: > 0; of the first step.
        epochs: passes over the examples, >= 1.
        batch_size: examples a step; the last batch of an epoch may be smaller. 0: all examples in every step.
        optimizer: "adam" or "sgd".
        loss: "squared" or "cross-entropy".
        schedule: "constant", or "linear": falling to 0 over the run.
        momentum: of SGD.
        betas: of Adam.
        eps: of Adam, > 0: where a gradient is 0, a step is 0/eps.
        proximal: λ >= 0; a forecast tells the one that comes to its ridge.
        selective: take the proximal gradient only at steps where ⟨∇R(θ_t), θ_t − θ_0⟩ >= 0, R the batch's loss.
        seed: of the order of the examples.

    Raises:
        InputError: a field that cannot be used.
    """

    learning_rate: float
    epochs: int = 1
    batch_size: int = 32
    optimizer: str = "adam"
    loss: str = "squared"
    schedule: str = "constant"
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    proximal: float = 0.0
    selective: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name, low in (("epochs", 1), ("batch_size", 0), ("seed", 0)):
            object.__setattr__(self, name, whole(name, getattr(self, name), low))
        for name in ("learning_rate", "momentum", "eps", "proximal"):
            object.__setattr__(self, name, scalar(getattr(self, name)))
            if not is_number(getattr(self, name)):
                raise InputError(f"{name}: expected a number, got {getattr(self, name)!r}")
        object.__setattr__(self, "selective", flag("selective", self.selective))
        if isinstance(self.betas, tuple | list):
            object.__setattr__(self, "betas", tuple(map(scalar, self.betas)))
        if not isinstance(self.betas, tuple) or len(self.betas) != 2 or not all(map(is_number, self.betas)):
            raise InputError(f"betas: expected two numbers, got {self.betas!r}")
        within = {
            "learning_rate": 0 < self.learning_rate <= 1e30,  # float32 holds it
            "proximal": 0 <= self.proximal <= 1e30,
            "eps": 1e-37 <= self.eps <= 1e30,
            "momentum": 0 <= self.momentum < 1,
            "betas": all(0 <= b < 1 for b in self.betas),
        }
        for name, good in within.items():
            value = getattr(self, name)
            if not good:
                raise InputError(f"{name}: out of range, got {value!r}")
        if self.momentum and self.optimizer != "sgd":
            raise InputError(f"momentum: belongs to optimizer 'sgd', got optimizer {self.optimizer!r}")

    def batches(self, n: int, seed: int | None = None) -> Iterator[np.ndarray]:
        """Yield the rows of every step, in the order of training.

        Args:
            n: examples.
            seed: of the order, other than the recipe's.

        Raises:
            InputError: no examples, or a seed below 0.
        """
        import numpy as np  # here: a job file is read without it

        n = whole("n", n, 1)
        rng = np.random.default_rng(self.seed if seed is None else whole("seed", seed))
        size = min(self.batch_size or n, n)
        for _ in range(self.epochs):
            order = rng.permutation(n)
            for at in range(0, n, size):
                yield order[at : at + size]

    def steps(self, n: int) -> int:
        """Return the steps of the whole run over n examples, at least 1."""
        n = whole("n", n, 1)
        return self.epochs * -(-n // min(self.batch_size or n, n))

    def rate(self, step: int, n: int) -> float:
        """Return the learning rate of a step, counted from 0, of a run over n examples."""
        step = whole("step", step, 0, self.steps(n) - 1)
        return self.learning_rate * (1.0 if self.schedule == "constant" else 1.0 - step / self.steps(n))

    def pulls(self, gradients: Sequence[Any], moved: Sequence[Any]) -> bool:
        """Say whether a step takes the proximal gradient: always, or where `selective` when the loss moves away.

        Args:
            gradients: of the batch's loss, a tensor or array each parameter.
            moved: θ_t − θ_0, likewise.
        """
        if not self.proximal or not self.selective:
            return self.proximal > 0
        return sum(float((g * m).sum()) for g, m in zip(gradients, moved, strict=True)) >= 0.0

    @classmethod
    def of(cls, given: Recipe | Mapping[str, Any]) -> Recipe:
        """Return the recipe, or the one a mapping describes.

        Raises:
            InputError: an unknown field, or a value that cannot be used.
        """
        if isinstance(given, Recipe):
            return given
        if not isinstance(given, Mapping):
            raise InputError(f"recipe: expected a Recipe or a mapping of its fields, got {type(given).__name__}")
        known = cls.__dataclass_fields__
        unknown = sorted(set(given) - set(known), key=str)
        if unknown or "learning_rate" not in given:
            what = f"no field {unknown[0]!r}" if unknown else "needs learning_rate"
            raise InputError(f"recipe: {what}; fields are {', '.join(known)}")
        fields: dict[str, Any] = {
            k: tuple(v) if k == "betas" and hasattr(v, "__len__") else v for k, v in given.items()
        }
        return cls(**fields)


def is_number(value: object) -> TypeGuard[int | float]:
    """Say whether a value is a number that a float can hold, true and false being none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 2**1023  # larger ones are no float
    return isinstance(value, float)
