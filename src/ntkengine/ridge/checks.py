"""What solvers and estimators refuse, in one place.

Shapes: n rows of a training kernel, t rows of a test kernel.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from numbers import Real
from reprlib import repr as shown
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import assert_all_finite, check_array, column_or_1d

from ntkengine.arguments import matrix_of, real_array, whole, without_tensors
from ntkengine.digits import above
from ntkengine.errors import InputError
from ntkengine.spectrum import as_matrix
from ntkengine.spectrum.checks import check_size
from ntkengine.spectrum.matrices import declared_noise

log = logging.getLogger(__name__)

FAR = 20.0  # times the noise: a ridge from there on lets it move errors by less than a tenth


def kernel_of(X: Any) -> np.ndarray:
    """Return a training kernel as a symmetric float64 matrix.

    Raises:
        InputError: sparse, not square, not real, not finite, or not symmetric.
        TypeError: entries that are no numbers.
    """
    if hasattr(X, "noise"):
        return as_matrix(X)
    return as_matrix(_array(X if scipy.sparse.issparse(X) else matrix_of(X)))


def check_ridge(X: Any, ridge: float, weight: float) -> None:
    """Refuse a ridge below the noise that a kernel carries; warn of one that is less than `FAR` times it.

    Args:
        X: what the estimator was given; a bare array carries none, a Gram computed with check=False an unknown one.
        ridge: in the unit of K.
        weight: the largest of the examples: it multiplies the kernel.

    Raises:
        InputError: naming both.
    """
    told = getattr(X, "noise", None)
    noise = 0.0 if isinstance(told, float) and math.isnan(told) else weight * (declared_noise(X) or 0.0)
    if ridge < noise:
        raise InputError(
            f"ridge: expected at least the noise of the kernel, {above(noise, 3)}, got {ridge:.6g}; a computation with "
            "precision='exact' has less"
        )
    if ridge < FAR * noise:
        log.warning(
            "ridge: %.3g is only %.2g times the kernel's noise, which may move errors at it by a share of %s",
            ridge,
            ridge / noise,
            above(2.0 * noise / ridge, 1),
        )


def check_cross(X: Any, rows: int, multiple: int, name: str) -> np.ndarray:
    """Return a test kernel as finite float64, (t, rows).

    Args:
        X: K(test, train).
        rows: of the training kernel.
        multiple: rows an example owns.
        name: of the estimator, for the message.

    Raises:
        InputError: another shape, or entries that are not finite real numbers.
        TypeError: entries that are no numbers.
    """
    cross = _array(X).astype(np.float64, copy=False)
    if cross.shape[1] != rows:
        raise InputError(
            f"X: expected K(test, train) of shape (t, {rows}), got {cross.shape}: X has {cross.shape[1]} features, but "
            f"{name} is expecting {rows} features as input"
        )
    if len(cross) % multiple:
        raise InputError(f"X: expected a multiple of {multiple} rows (one per output), got {len(cross)}")
    return cross


def check_target(y: Any, name: str) -> None:
    """Refuse a missing y."""
    if y is None:
        raise InputError(f"{name} requires y to be passed, but the target y is None")


def with_classes(class_weight: Any, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return sample weights times class weights.

    Args:
        class_weight: None; "balanced": every class gets the same total, the sum of all weights kept; or a mapping from
            label to weight.
        labels: (n,).
        weights: (n,) sample weights.

    Raises:
        InputError: weights of classes that are negative or not finite.
    """
    told = class_weight.values() if isinstance(class_weight, Mapping) else []
    words = class_weight is None or isinstance(class_weight, Mapping) or (class_weight == "balanced") is True
    if not words or not all(isinstance(w, Real) for w in told):
        raise InputError(f"class_weight: expected None, 'balanced' or numbers by class, got {shown(class_weight)}")
    if told and (unknown := [label for label in class_weight if label not in labels.tolist()]):
        raise InputError(f"class_weight: expected weights of classes among y, got one of {unknown[0]!r}")
    if class_weight is None or told:
        found = weights * compute_sample_weight(class_weight, labels)
        if not np.isfinite(found).all() or (found < 0).any():
            raise InputError(f"class_weight: expected finite numbers >= 0, got {class_weight!r}")
        return found
    _, codes = np.unique(labels, return_inverse=True)
    totals = np.bincount(codes, weights)
    return weights * np.divide(totals.sum() / np.count_nonzero(totals), totals, where=totals > 0, out=totals * 0)[codes]


def _array(X: Any) -> np.ndarray:
    X = without_tensors(X)
    if scipy.sparse.issparse(X):
        raise InputError(f"X: expected a dense kernel matrix, got a sparse {type(X).__name__}")
    if not hasattr(X, "__array__") and not isinstance(X, list | tuple):
        raise InputError(f"X: expected a matrix, got {type(X).__name__}")
    if np.ma.is_masked(X):
        raise InputError(f"X: expected no masked entries, got {np.ma.count_masked(X)}")
    try:
        raw = np.asarray(X)
        kind = next((k for x in raw.flat for k in _odd(x)), "O") if raw.dtype.kind == "O" else raw.dtype.kind
        # Symmetry and noise are judged by the type it came in. Of words scikit-learn would make numbers.
        found = None if kind in "cUSV" else check_array(X, dtype=[np.float64, np.float32])
    except ValueError as error:
        raise InputError(f"X: {error}") from error
    if found is None:
        what = "complex ones: Complex data not supported" if kind == "c" else f"{type(X).__name__} that is not numeric"
        raise InputError(f"X: expected real numbers, got {what}")
    return found


def _odd(entry: Any) -> str:
    """Return the kind of an object that scikit-learn would make a number of, or fail on; else nothing."""
    return "U" if isinstance(entry, str | bytes) else "c" if isinstance(entry, complex) else ""


def class_labels(y: Any) -> np.ndarray:
    """Return the class of each example, (n,): numbers or words.

    Raises:
        InputError: what scikit-learn does not take for classes.
    """
    if np.ma.is_masked(y):
        raise InputError(f"y: expected no masked entries, got {np.ma.count_masked(y)}")
    try:
        labels = column_or_1d(y, warn=True)
        if labels.dtype.kind == "f":
            assert_all_finite(labels, input_name="y")
        check_classification_targets(labels)
    except ValueError as error:
        raise InputError(f"y: {str(error).splitlines()[0]}") from error
    return labels


def as_weights(weights: Any, examples: int) -> np.ndarray:
    """Return sample weights, (examples,) float64; ones for None, a single number for all.

    Raises:
        InputError: another shape, negative, not finite, or all zero.
    """
    if weights is None:
        return np.ones(examples)
    found = real_array("sample_weight", weights).astype(np.float64, copy=False)
    if found.ndim == 0:
        found = np.full(examples, float(found))
    if found.shape != (examples,):
        raise InputError(f"sample_weight: expected shape ({examples},), got {found.shape}")
    if not np.isfinite(found).all() or (found < 0).any() or not found.any():
        raise InputError("sample_weight: expected finite numbers >= 0, not all zero")
    check_size("sample_weight", float(found.max()))
    return found


def as_columns(name: str, values: ArrayLike, rows: int, *, any_size: bool = False) -> np.ndarray:
    """Return values as finite float64 columns, (rows, m).

    Args:
        name: what to call it in a message.
        values: (rows,) or (rows, m).
        rows: how many rows it must have.
        any_size: also numbers whose squares leave float64.

    Returns:
        (rows, m) float64.

    Raises:
        InputError: another shape, not numeric, not finite, or too small or large to be squared.
    """
    array = real_array(name, values).astype(np.float64, copy=False)
    if array.ndim not in (1, 2) or array.shape[0] != rows or not array.size:
        raise InputError(f"{name}: expected shape ({rows},) or ({rows}, m), got {array.shape}")
    if not np.isfinite(array).all():
        raise InputError(f"{name}: expected finite numbers, row {int(np.argwhere(~np.isfinite(array))[0][0])} is not")
    if not any_size:
        check_size(name, float(np.abs(array).max()))
    return array.reshape(rows, -1)


def fold_labels(name: str, folds: ArrayLike, rows: int) -> np.ndarray:
    """Return the fold of each row, (rows,) numbers or words.

    Raises:
        InputError: another shape, or a row without one.
    """
    words = np.asarray(folds) if all(isinstance(x, str) for x in np.ravel(np.asarray(folds, dtype=object))) else None
    labels = real_array(name, folds) if words is None else words
    if labels.shape != (rows,):
        raise InputError(f"{name}: expected shape ({rows},), got {labels.shape}")
    if (labels != labels).any():
        raise InputError(f"{name}: expected a fold for every row, row {int(np.argmax(labels != labels))} has NaN")
    return labels


def check_block(block: int, rows: int, columns: int) -> int:
    """Return the rows an example owns; InputError where they do not divide the rows there are."""
    block = whole("block", block, 1)
    if rows % block or (block > 1 and columns != 1):
        raise InputError(
            f"block: expected a divisor of {rows} rows, with one column when above 1; "
            f"got {block} with {columns} columns"
        )
    return block
