"""What a forecast is given: each argument checked, and what the Gram brings along in its place."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ntkengine.arguments import meta_of, number, real_array
from ntkengine.digits import above
from ntkengine.errors import InputError
from ntkengine.ridge.checks import as_columns
from ntkengine.spectrum.matrices import EPS
from ntkengine.targets import refuse_bits

log = logging.getLogger(__name__)

_APART = 0.05  # of the largest output


def targets_of(name: str, values: ArrayLike, beside: np.ndarray | None = None) -> np.ndarray:
    """Return targets, (N, C) float64; InputError for other columns than those beside, or 0 and 1 of one output."""
    given = real_array(name, values)
    array = as_columns(name, given, len(given) if given.ndim else 1)
    if beside is not None and array.shape[1] != beside.shape[1]:
        raise InputError(f"{name}: expected {beside.shape[1]} columns, as in targets, got {array.shape[1]}")
    refuse_bits(name, array, beside)
    return array


def check_gram(gram: Any, y: np.ndarray) -> None:
    """Refuse a Gram of losses, which no targets go with, and targets of another number of examples.

    Args:
        gram: as `forecast` takes it.
        y: targets, (N, C).

    Raises:
        InputError: naming it.
    """
    if meta_of(gram).get("readout") == "loss":
        raise InputError("gram: is of readout 'loss', whose outputs no targets go with; expected 'logits', 'margin', …")
    _as_many("targets", y, getattr(gram, "outputs", None), "train")


def holds(gram: Any, y: np.ndarray) -> bool:
    """Whether the Gram holds these targets, (N, C)."""
    own = getattr(gram, "targets", None)
    if own is None or len(own) != len(y):
        return False
    kept = as_columns("targets", own, len(y))
    return kept.shape == y.shape and bool(np.allclose(kept, y))


def eval_targets_of(gram: Any, given: ArrayLike | None, y: np.ndarray) -> np.ndarray | None:
    """Return targets of the eval examples, (M, C) float64: what was given, else the Gram's, with its own targets.

    Raises:
        InputError: of another number of examples than the Gram's.
    """
    default, own = getattr(gram, "eval_targets", None), getattr(gram, "targets", None)
    if given is None and default is not None and own is not None and not holds(gram, y):
        log.warning("eval_targets: none, as those that the Gram holds go with its own targets, and these are others")
        default = None
    chosen = default if given is None else given
    if chosen is None:
        return None
    found = targets_of("eval_targets", chosen, y)
    _as_many("eval_targets", found, getattr(gram, "eval_outputs", None), "eval")
    return found


def _as_many(name: str, y: np.ndarray, outputs: Any, which: str) -> None:
    if outputs is not None and len(y) != len(outputs):
        raise InputError(
            f"{name}: expected {len(outputs)} rows, one for each {which} example of the Gram, got {y.shape}"
        )


def differing(here: np.ndarray, there: np.ndarray) -> int | None:
    """Return the example whose outputs (N, C) differ most, None where rounding, in half precision too, explains all."""
    off = np.abs(here - there).max(axis=1)
    return int(off.argmax()) if off.max() > _APART * np.abs(there).max() else None


def offset_of(name: str, given: ArrayLike | None, default: ArrayLike | None, shape: tuple[int, ...]) -> np.ndarray:
    """Return f0, (N, C): what was given, else the default, else 0."""
    chosen = default if given is None else given
    if chosen is None:
        return np.zeros(shape)
    array = as_columns(name, chosen, shape[0])
    if array.shape != shape and given is None:
        whose = name.replace("offset", "targets")
        raise InputError(f"{whose}: expected {array.shape}, a column for each output (`encode_targets`), got {shape}")
    if array.shape != shape:
        raise InputError(f"{name}: expected shape {shape}, as targets, got {array.shape}")
    return array


def eval_offset_of(
    gram: Any, given: ArrayLike | None, offset: ArrayLike | None, f0: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
    """Return f0 on the eval rows, which must come from the same start as `offset`."""
    own = getattr(gram, "outputs", None)
    moved = offset is not None and (own is None or not np.array_equal(as_columns("outputs", own, len(f0)), f0))
    if given is None and moved:
        raise InputError("eval_offset: expected f0 on the eval examples from the same start as offset, got none")
    default = getattr(gram, "eval_outputs", None)
    if given is None and default is None and f0.any():
        raise InputError("eval_offset: expected f0 on the eval examples, as offset is not 0; got none")
    found = offset_of("eval_offset", given, default, shape)
    if offset is None and own is None and found.any():
        raise InputError("offset: expected f0 on the train examples, as that of the eval examples is not 0; got none")
    return found


def ridge_of(ridge: float, noise: float) -> float:
    """Return a ridge as a float; InputError when it is not positive, or below the noise."""
    found = number("ridge", ridge, above=0, what="a number")
    if found < noise:
        raise InputError(f"ridge: expected a number > 0 and not below the noise {above(noise, 4)}, got {ridge!r}")
    return found


def refuse_indefinite(eigenvalues: np.ndarray, noise: float) -> None:
    """Refuse a kernel with an eigenvalue more negative than its error, in the same unit, explains.

    Raises:
        InputError: naming the eigenvalue.
    """
    bottom, top = float(eigenvalues.min()), float(eigenvalues.max())
    most = 2.0 * noise + 10.0 * float(np.sqrt(len(eigenvalues))) * EPS * top  # the noise is an estimate
    if bottom < -most:
        raise InputError(
            f"gram: expected no eigenvalue below {-most:.3g}, found one at {bottom:.3g}; if that is rounding, say so "
            "by the noise of a Gram-like object"
        )
