"""What matrices the solvers refuse by their size, type or shape."""

from __future__ import annotations

from typing import Any

import numpy as np

from ntkengine.arguments import real_array
from ntkengine.errors import InputError

SIZES = 1e-70, 1e70  # of the largest entry: sums of its fourth powers, and their inverses, are float64 numbers


def check_size(name: str, largest: float) -> None:
    """Refuse numbers whose squares leave float64, where sums over them would be infinity or nothing; 0 is well.

    Args:
        name: of the argument.
        largest: absolute value among them.

    Raises:
        InputError: outside `SIZES`.
    """
    if largest and not SIZES[0] <= largest <= SIZES[1]:
        raise InputError(
            f"{name}: expected numbers the largest of which is from {SIZES[0]:g} to {SIZES[1]:g}, got {largest:.3g}; "
            "use another unit"
        )


def check_stored(name: str, values: Any, columns: str = "N") -> tuple[int, int]:
    """Return the shape of a matrix that is read in slices, in memory or not.

    Args:
        name: of the argument.
        values: the matrix.
        columns: what a message calls their number.

    Raises:
        InputError: not a matrix with slices, masked, or of other than integers and floats.
    """
    shape = getattr(values, "shape", None)
    if not isinstance(shape, tuple) or not hasattr(values, "__getitem__"):
        raise InputError(f"{name}: expected a matrix with a shape and slices, got {type(values).__name__}")
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"{name}: expected shape (N, {columns}), got {shape}")
    if np.ma.is_masked(values):
        raise InputError(f"{name}: expected no masked entries, got {np.ma.count_masked(values)}")
    dtype = real_array(name, values[:1]).dtype
    if dtype.kind == "b":
        raise InputError(f"{name}: expected real numbers, got dtype {dtype}")
    return shape
