"""From what a label column holds to class indices."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np

from ntkengine.errors import InputError

log = logging.getLogger(__name__)

_UNREAL = frozenset({"nan", "inf", "infinity"})


def class_indices(
    values: Sequence[Any],
    where: Sequence[str],
    column: str,
    source: str,
    given: Sequence[str] | None,
    label_names: Sequence[str] | None,
) -> tuple[np.ndarray, list[str]]:
    """Return class indices, (N,) int64, and the class names.

    Args:
        values: one label an example: text or a number.
        where: each example's place, for messages.
        column: what they stand in, for messages.
        source: likewise.
        given: names that a data set has for the numbers in its column.
        label_names: class names in order; default those of the data set, else the values found, sorted.

    Raises:
        InputError: an unknown label, decimal numbers in place of classes, one number written in two ways, names that
            are not distinct, one class only.
    """
    if given is not None and (label_names is None or set(label_names) <= set(given)):
        values = [_named(value, given, place, column) for value, place in zip(values, where, strict=True)]
        if len(set(values)) > 1:
            label_names = label_names or given
    if label_names is None:
        _refuse_unreal(values, where, column)
        _refuse_decimals(values, where, column)
        _refuse_spellings(values, where, column)
        _warn_of_doubles(values, column)
    names = [label_text(n) for n in label_names] if label_names is not None else _class_names(values)
    if len(set(names)) != len(names):
        msg = f"label_names: expected distinct names, got {', '.join(names)}"
        raise InputError(msg)
    index = {n: i for i, n in enumerate(names)}
    for value, place in zip(values, where, strict=True):
        if label_text(value) not in index:
            msg = f"{place}: unknown label {value!r} in column {column!r}, expected one of {', '.join(names)}"
            raise InputError(msg)
    if label_names is None and len(names) < 2:
        msg = f"{source}: column {column!r} holds one class only ({names[0]!r}), expected two or more"
        raise InputError(msg)
    return np.array([index[label_text(v)] for v in values], dtype=np.int64), names


def _refuse_unreal(values: Sequence[Any], where: Sequence[str], column: str) -> None:
    """Refuse labels that are NaN or infinite, as numbers or beside numbers."""
    texts = [str(value).strip().lower().lstrip("+-") for value in values]
    odd = next((i for i, text in enumerate(texts) if text in _UNREAL), None)
    if odd is None:
        return
    others = [text for text in texts if text not in _UNREAL]
    if not isinstance(values[odd], str) or (others and _numbers(others) is not None):
        msg = f"{where[odd]}: column {column!r} has {values[odd]!r} among numbers, expected a class"
        raise InputError(msg)


def label_text(value: Any) -> str:
    """Return a label as text: 1, "1" and 1.0 are one class; the text "1.0" is not theirs, and refused beside them."""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    return str(value).strip()


def _named(value: Any, names: Sequence[str], where: str, column: str) -> str:
    """Return the name of a class that a data set has by its number."""
    if isinstance(value, str):
        return value
    if not 0 <= value < len(names):
        msg = f"{where}: column {column!r} has no label: {value} is none of the classes {', '.join(names)}"
        raise InputError(msg)
    return names[int(value)]


def _class_names(values: Iterable[Any]) -> list[str]:
    names = sorted({label_text(v) for v in values})  # as text first: an order of equal numbers must not vary
    return names if _numbers(names) is None else sorted(names, key=float)


def _numbers(names: Sequence[str]) -> list[float] | None:
    """Return the numbers that all of the names are, or None; NaN is none, it has no order."""
    try:
        numbers = [float(name) for name in names]
    except ValueError:
        return None
    return numbers if all(x == x for x in numbers) else None


def _refuse_decimals(values: Sequence[Any], where: Sequence[str], column: str) -> None:
    """Refuse ratings and other targets of a regression: each number would become a class of its own."""
    numbers = _numbers([label_text(v) for v in values]) or []
    at = next((i for i, x in enumerate(numbers) if math.isfinite(x) and not x.is_integer()), None)
    if at is not None:
        msg = (
            f"{where[at]}: column {column!r} holds decimal numbers ({label_text(values[at])}), expected classes; if "
            "each number is a class, name them all in label_names (--label-names); for regression read with label=None "
            "and give the numbers as targets, in Python"
        )
        raise InputError(msg)


def _refuse_spellings(values: Sequence[Any], where: Sequence[str], column: str) -> None:
    """Refuse a number written in two ways, such as 1 and 1.0 in a csv: whether it is one class is not for us to say."""
    names = {label_text(value): place for value, place in zip(values, where, strict=True)}
    seen: dict[Decimal, str] = {}
    for name, place in names.items():
        try:
            number = Decimal(name)
        except InvalidOperation:
            continue
        other = name if number.is_nan() else seen.setdefault(number, name)
        if other != name:
            msg = (
                f"{place}: column {column!r} holds one number written in two ways, {other} and {name}; write it in "
                "one way, or name them both in label_names (--label-names) if they are two classes"
            )
            raise InputError(msg)


def _warn_of_doubles(values: Sequence[Any], column: str) -> None:
    """Log a warning of labels that differ only in case, which are two classes, or in blanks around, which are one."""
    seen: dict[str, str] = {}
    for text in sorted({str(value) for value in values}):
        other = seen.setdefault(text.strip().casefold(), text)
        if other != text:
            one = other.strip() == text.strip()
            how = "blanks around them, and are one class" if one else "case, and are two classes"
            log.warning("column %r: labels %r and %r differ only in %s", column, other, text, how)
            return
