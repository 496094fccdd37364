"""Accuracies, intervals and alignment: how predictions and kernels are scored.

Shapes: N examples, C outputs.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import t as student
from torch import Tensor

from ntkengine.spectrum import Estimate

Z95 = 1.959963984540054  # two-sided 95% point of the normal distribution
Z90 = 1.6448536269514722  # of the 90% interval


def name_classes(targets: np.ndarray, eval_targets: np.ndarray | None = None) -> bool:
    """Say whether targets (N, C), and eval targets (M, C) if any, name a class for each example.

    C = 1: every target is one of two numbers, one for each sign, and `targets` has both; more than two are values to be
    met, not classes. C > 1: every row has one largest entry, and rows with the same one are equal, as the codes of a
    class are; where no two rows have it in common, there are two numbers in all.
    """
    joint = targets if eval_targets is None else np.vstack([targets, eval_targets])
    if targets.shape[1] == 1:
        return len(np.unique(joint)) == 2 and bool((targets > 0).any() and (targets < 0).any())
    ordered = np.sort(joint, axis=1)
    if not (ordered[:, -1] > ordered[:, -2]).all():
        return False
    codes, named = np.unique(joint, axis=0), np.unique(joint.argmax(axis=1))
    return len(codes) == len(named) and (len(codes) < len(joint) or len(np.unique(joint)) == 2)


def tells_classes(targets: Tensor, eval_targets: Tensor | None = None) -> bool:
    """Say the same of targets as a loss has them: classes (N,), or numbers (N, C)."""
    if targets.ndim == 1:
        return True
    return name_classes(targets.cpu().numpy(), None if eval_targets is None else eval_targets.cpu().numpy())


def hits(predictions: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return whether each prediction names the target's class.

    Args:
        predictions: (..., N, C). C = 1: the class is the sign. C > 1: the largest entry. 0, and a tie, is a miss.
        targets: (N, C).

    Returns:
        (..., N) bool.
    """
    if targets.shape[1] == 1:
        return (np.sign(predictions) == np.sign(targets))[..., 0]
    named = targets.argmax(axis=-1)
    own = np.take_along_axis(predictions, np.broadcast_to(named[:, None], (*predictions.shape[:-1], 1)), axis=-1)
    others = np.where(np.arange(targets.shape[1]) == named[:, None], -np.inf, predictions)
    return own[..., 0] > others.max(axis=-1)


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return the mean of non-negative values and a 95% interval from its standard error, by Student's t.

    Upwards it is as `reach_above` has it.

    Args:
        values: (N,), one per example.

    Returns:
        (mean, low, high); low is not below 0. With one value the interval is (0, inf).
    """
    mean, N = float(values.mean()), len(values)
    quantile = float(student.ppf(0.975, N - 1)) if N > 1 else math.inf
    half = quantile * float(values.std(ddof=1)) / math.sqrt(N) if N > 1 else math.inf
    return mean, max(mean - half, 0.0), mean + reach_above(values, half, quantile)


def reach_above(values: np.ndarray, half: float, quantile: float) -> float:
    """Return how far above the mean of non-negative values an interval reaches that reaches `half` below it.

    m·(e^((half + more)/m) − 1) with m the mean and more = s·g·(1 + 2·quantile²)/(6N), of standard deviation s and
    skewness g >= 0. Few of the values have most of a loss, and where none of those was drawn, mean and standard error
    are both too small: the logarithm, and the term for the skewness, take that into account. Both vanish as N grows.

    Args:
        values: (N,), one per example.
        half: quantile times a standard error.
        quantile: Student's.

    Source: Johnson 1978, Chen 1995 (skewness, first order).
    """
    mean = float(values.mean())
    if not 0 < half < 700 * mean:  # all are equal, or their mean says nothing
        return half
    third = max(0.0, float(((values - mean) ** 3).mean()))
    more = third * (1 + 2 * quantile**2) / (6 * len(values) * float(values.var(ddof=1)))
    return mean * math.expm1(min((half + more) / mean, 700.0))


def wilson_interval(correct: int, total: int) -> tuple[float, float, float]:
    """Return a proportion and its 95% Wilson score interval, (value, low, high).

    Source: Wilson 1927.
    """
    share, z2 = correct / total, Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 / (1 + z2 / total) * np.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    low, high = (min(max(float(end), 0.0), 1.0) for end in (centre - half, centre + half))
    return share, min(low, share), max(high, share)  # by rounding none and all would lie outside


def centred_alignment(gram: np.ndarray, targets: np.ndarray, noise: float = 0.0) -> Estimate | None:
    """Return the centred kernel-target alignment, ⟨K_c, Y_c⟩_F / (‖K_c‖_F ‖Y_c‖_F), between −1 and 1.

    K_c = H K H and Y_c = H y yᵀ H with H = I − 11ᵀ/N. Uncentred, an empirical NTK's near-constant top mode would hide
    the rest.

    Args:
        gram: (N, N) over examples.
        targets: (N, C).
        noise: bound of ‖K̃ − K‖₂, for the given K̃. It moves ⟨K_c, Y_c⟩ by at most noise·tr Y_c, and ‖K_c‖_F by at most
            noise·√(N − 1).

    Returns:
        The alignment with its error; the error is infinite where K_c is not larger than what the noise may add to it.
        None where K_c or Y_c is zero (constant targets).

    Source: Cortes, Mohri and Rostamizadeh 2012.
    """
    centred = targets - targets.mean(axis=0)
    K = gram - gram.mean(axis=0) - gram.mean(axis=1)[:, None] + gram.mean()
    norm = float(np.linalg.norm(K) * np.linalg.norm(centred.T @ centred))
    if norm <= 1e-14 * float(np.linalg.norm(gram)) * float(np.linalg.norm(targets)) ** 2:
        return None
    value = float(np.sum(centred * (K @ centred)) / norm)
    size, off = float(np.linalg.norm(K)), noise * math.sqrt(len(K) - 1)
    moved = noise * float((centred**2).sum()) / float(np.linalg.norm(centred.T @ centred))
    return Estimate(value, (moved + abs(value) * off) / (size - off) if size > off else math.inf, exact=True)
