"""Checks of arguments, which every room makes: one line that names the argument, what was expected, and what came."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path
from reprlib import repr as shown
from typing import TYPE_CHECKING, Any

from ntkengine.errors import InputError

if TYPE_CHECKING:
    import numpy as np


SEEDS = (1 << 63) - 1  # the largest that torch's generators and NumPy's take


def whole(name: str, value: Any, least: int = 0, most: int | None = None) -> int:
    """Return an integer as an int; true, false and 2.0 are none.

    Args:
        name: what to call it in a message.
        value: Python's or NumPy's.
        least: the smallest it may be.
        most: the largest.

    Raises:
        InputError: anything else.
    """
    value = scalar(value)
    good = isinstance(value, Integral) and not isinstance(value, bool)
    if not good or value < least or (most is not None and value > most):
        span = f">= {least}" if most is None else f"from {least} to {most}"
        raise InputError(f"{name}: expected an integer {span}, got {shown(value)}")
    return int(value)


def number(
    name: str,
    value: Any,
    least: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
    what: str = "a finite number",
) -> float:
    """Return a finite real number as a float; true and false are none.

    Args:
        name: what to call it in a message.
        value: Python's or NumPy's.
        least: the smallest it may be.
        above: what it must exceed.
        below: what it must stay under.
        what: it is, for the message.

    Raises:
        InputError: anything else.
    """
    value = scalar(value)
    good = isinstance(value, Real) and not isinstance(value, bool)
    try:
        found = float(value) if good else math.nan
    except OverflowError:  # an integer beyond float64
        found = math.inf
    inside = (least is None or found >= least) and (above is None or found > above) and (below is None or found < below)
    if not math.isfinite(found) or not inside:
        limits = ((">=", least), (">", above), ("<", below))
        span = " and".join(f" {sign} {limit:g}" for sign, limit in limits if limit is not None)
        raise InputError(f"{name}: expected {what}{span}, got {shown(value)}")
    return found


def flag(name: str, value: Any) -> bool:
    """Return true or false; InputError for anything else, which would count as true."""
    value = scalar(value)
    if type(value).__name__ not in ("bool", "bool_"):  # NumPy's too
        raise InputError(f"{name}: expected true or false, got {shown(value)}")
    return bool(value)


def choice(name: str, value: Any, options: Sequence[str]) -> str:
    """Return one of some words; InputError for anything else."""
    if not isinstance(value, str) or value not in options:
        raise InputError(f"{name}: expected one of {', '.join(map(repr, options))}, got {shown(value)}")
    return value


def nearest_name(value: str, names: Iterable[str]) -> str:
    """Return a hint at the name that a mistyped one is nearest to; empty where none is near."""
    close = get_close_matches(value, list(names), n=1)
    return f"did you mean {close[0]!r}?" if close else ""


def file_path(name: str, value: Any) -> Path:
    """Return a path given as text or as what stands for a path; InputError for anything else."""
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise InputError(f"{name}: expected a path, got {type(value).__name__}")
    return Path(value)


def called(name: str, value: Any) -> None:
    """Refuse what is given to be called and cannot be; None is left out."""
    if value is not None and not callable(value):
        raise InputError(f"{name}: expected a function, got {type(value).__name__}")


def listed(name: str, value: Any, what: str) -> list[Any]:
    """Return what holds several values as a list, an array's as Python's; InputError for one text or one value."""
    if isinstance(value, str | bytes | type) or not isinstance(value, Iterable):
        raise InputError(f"{name}: expected a list of {what}, got {shown(value)}")
    return list(value.tolist() if hasattr(value, "tolist") else value)


def real_array(name: str, values: Any) -> np.ndarray:
    """Return array-like values as an array of bools, integers or floats, in the type they have.

    Args:
        name: what to call it in a message.
        values: array-like; an array of objects must hold numbers only.

    Raises:
        InputError: words, even of digits; complex numbers; masked entries, whose numbers mean nothing; or what makes no
            array.
    """
    import numpy as np  # here: a job file is read without it

    values = without_tensors(values)
    if np.ma.is_masked(values):
        raise InputError(f"{name}: expected no masked entries, got {np.ma.count_masked(values)}")
    try:
        array = np.asarray(values)
    except InputError:  # of a file that is damaged
        raise
    except (TypeError, ValueError, RuntimeError):  # ragged lists; tensors that NumPy cannot have
        array = np.empty(0, dtype="V")
    if array.dtype.kind == "c":  # NumPy would drop the imaginary part
        raise InputError(f"{name}: expected real numbers, got dtype {array.dtype}")
    if array.dtype.kind == "O" and array.ndim and all(isinstance(x, Real) for x in array.flat):
        array = array.astype(np.float64)
    if array.dtype.kind not in "biuf":
        raise InputError(f"{name}: expected numbers, got {type(values).__name__} that is not numeric")
    return array


def matrix_of(gram: Any) -> Any:
    """Return what a Gram or a frame has stored as its matrix, or else the matrix itself; a tensor as an array."""
    values = getattr(gram, "values", gram)
    return without_tensors(gram if callable(values) else values)


def meta_of(gram: Any) -> Mapping[str, Any]:
    """Return what a Gram notes of itself; of anything else nothing."""
    return getattr(gram, "meta", None) or {}


def without_tensors(value: Any) -> Any:
    """Return a torch tensor as an array of its numbers, on the host, bfloat16 as float32; anything else as it is."""
    if not (hasattr(value, "detach") and hasattr(value, "cpu")):
        return value
    value = value.detach().cpu()
    return (value.float() if "bfloat16" in str(value.dtype) else value).numpy()


def scalar(value: Any) -> Any:
    """Return what an array without axes holds, anything else as it is."""
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0 else value
