"""One training run's forecast as figures with intervals.

Three errors are told apart and added as independent:
* sampling: the eval examples are a draw; standard error of the mean over them, more above a loss, which is skewed;
* chance: the start of the adapters and the order of batches; standard deviation over repeats, known the less, the
  fewer there are;
* model: what a first-order forecast leaves out. It grows with how far outputs move: `MODEL` times the root mean square
  movement of the eval outputs, a share measured once on real runs (bench/experiments/calibration.py), not derived.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student

from ntkengine.forecast.scores import Z90, reach_above

# Of the eval loss, for each unit of root mean square movement of outputs; for accuracy, likewise.
MODEL_LOSS, MODEL_ACCURACY = 0.06, 0.1


@dataclass(frozen=True)
class Outcome:
    """What a training run is forecast to reach; intervals are (value, low, high) at 90 %.

    Attributes:
        train_loss: mean over training examples.
        eval_loss: mean over eval examples, for another draw of as many of them; None without eval examples.
        eval_accuracy: likewise; None where targets name no class.
        sampling: standard error of the eval loss over eval examples.
        chance: its standard deviation between runs that differ in their seeds; 0 with one repeat.
        model: the share that a first-order forecast leaves out.
    """

    train_loss: float
    eval_loss: tuple[float, float, float] | None
    eval_accuracy: tuple[float, float, float] | None
    sampling: float
    chance: float
    model: float


def outcome(
    train_losses: np.ndarray, eval_losses: np.ndarray | None, eval_correct: np.ndarray | None, movement: float
) -> Outcome:
    """Return the outcome of R repeats.

    Args:
        train_losses: (R, N).
        eval_losses: (R, M) or None.
        eval_correct: (R, M) bool; None without eval examples, or where targets name no class.
        movement: root mean square of f_t − f_0 over the eval outputs.
    """
    train = float(train_losses.mean())
    if eval_losses is None:
        return Outcome(train, None, None, 0.0, 0.0, 0.0)
    sampling, chance = _errors(eval_losses)
    model = MODEL_LOSS * movement
    return Outcome(
        train_loss=train,
        eval_loss=_loss(eval_losses.mean(axis=0), sampling, chance, model, len(eval_losses)),
        eval_accuracy=None if eval_correct is None else _accuracy(eval_correct, movement),
        sampling=sampling,
        chance=chance,
        model=model,
    )


def _loss(
    over_examples: np.ndarray, sampling: float, chance: float, model: float, repeats: int
) -> tuple[float, float, float]:
    """Return the mean loss and its interval.

    Upwards the draw of examples reaches as far as `reach_above` says; the distances of independent errors are added as
    squares on each side by itself.

    Source: Zou and Donner 2008.
    """
    M, loss = len(over_examples), float(over_examples.mean())
    drawn, others = float(half_width(sampling, 0.0, 0.0, examples=M)), half_width(0.0, chance, model, repeats)
    above = reach_above(over_examples, drawn, _quantile(M))
    return loss, max(0.0, loss - float(np.hypot(drawn, others))), loss + float(np.hypot(above, others))


def _accuracy(correct: np.ndarray, movement: float) -> tuple[float, float, float]:
    """Return the share of hits; where nearly all agree, with the spread there is when some more hit, as many miss."""
    M, share, more = correct.shape[1], float(correct.mean()), Z90**2 / 2
    sampling, chance = _errors(correct.astype(np.float64))
    near = (M * share + more) / (M + 2 * more)
    spread = ((correct.mean(axis=0) - near) ** 2).sum() + more * (near**2 + (1 - near) ** 2)
    least = float(np.sqrt(spread) / (M + 2 * more))
    width = float(half_width(max(sampling, least), chance, MODEL_ACCURACY * movement, *correct.shape))
    return share, max(0.0, share - width), min(1.0, share + width)


def half_width(
    sampling: ArrayLike, chance: ArrayLike, model: ArrayLike, repeats: int = 1, examples: float = np.inf
) -> np.ndarray:
    """Return half a 90 % interval, for one more run, of three independent errors.

    Sampling counts twice, for the eval draw and the one to come; chance for the run to come and, 1/R of its variance,
    for the mean of R. Each of the two has Student's quantile of its own degrees of freedom: one quantile for their sum
    (Welch and Satterthwaite) falls to 82 % at R = 2, where a few repeats agree by luck.

    Args:
        sampling: standard error over eval examples.
        chance: standard deviation between runs; 0 with one repeat.
        model: what the first order leaves out.
        repeats: R.
        examples: M.
    """
    among, between = _quantile(examples), _quantile(repeats)
    drawn = 2 * np.square(among * np.asarray(sampling))
    return np.sqrt(
        drawn + (1 + 1 / repeats) * np.square(between * np.asarray(chance)) + np.square(Z90 * np.asarray(model))
    )


def _quantile(count: float) -> float:
    """Return Student's 95 % point for the mean of some values."""
    return float(student.ppf(0.95, max(count - 1, 1)))


def _errors(values: np.ndarray) -> tuple[float, float]:
    """Return (standard error over examples, standard deviation over repeats) of the mean of (R, M)."""
    R, M = values.shape
    over_examples = values.mean(axis=0)
    sampling = float(over_examples.std(ddof=1) / np.sqrt(M)) if M > 1 else float("inf")
    return sampling, float(values.mean(axis=1).std(ddof=1)) if R > 1 else 0.0
