"""Numbers as text that does not contradict their errors: errors and upper bounds are rounded up, lower bounds down."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Decimal

_MOST = 8  # digits of a number whose error lies below them


def measured(value: float, error: float, most: int = _MOST) -> str:
    """Return `value ± error` as text, of `with_error`."""
    return " ± ".join(with_error(value, error, most))


def with_error(value: float, error: float, most: int = _MOST) -> tuple[str, str]:
    """Return a number to the second digit of its error, and the error.

    The number has at least two digits. The error printed is that of the number printed: what rounding
    took off is part of it, and it is rounded up.

    Args:
        value: the number.
        error: >= 0; infinite or NaN where it is not known.
        most: digits the number has at most.
    """
    if not (math.isfinite(value) and math.isfinite(error)):
        return f"{value:.4g}", "unknown" if math.isnan(error) else f"{error:g}"
    exact, off = _exact(value), _exact(error)
    if not exact:
        return "0", above(off, 2)
    least = _place(exact, most)
    place = min(max(least, _place(off, 2)) if off else least, _place(exact, 2))
    shown = _rounded(exact, place, ROUND_HALF_EVEN)
    return _text(shown.normalize() if place == least else shown), above(off + abs(shown - exact), 2)


def between(value: float, low: float, high: float, digits: int = 4) -> str:
    """Return `value (low to high)`, low rounded down and high up."""
    return f"{nearest(value, digits)} ({below(low, digits)} to {above(high, digits)})"


def above(value: float | Decimal, digits: int = 4) -> str:
    """Return a number rounded up to so many digits: an error, or an upper bound."""
    return _cut(value, digits, ROUND_CEILING)


def below(value: float | Decimal, digits: int = 4) -> str:
    """Return a number rounded down to so many digits: a lower bound."""
    return _cut(value, digits, ROUND_FLOOR)


def nearest(value: float | Decimal, digits: int = 4) -> str:
    """Return a number rounded to so many digits."""
    return _cut(value, digits, ROUND_HALF_EVEN)


def _cut(value: float | Decimal, digits: int, how: str) -> str:
    if not math.isfinite(value):
        return f"{value:g}"
    exact = _exact(value)
    return _text(_rounded(exact, _place(exact, digits), how).normalize()) if exact else "0"


def _exact(value: float | Decimal) -> Decimal:
    # The shortest decimal that reads as this float: 1e-05 is not rounded up to 1.1e-05.
    return value if isinstance(value, Decimal) else Decimal(repr(float(value)))


def _place(value: Decimal, digits: int) -> int:
    return value.adjusted() - digits + 1


def _rounded(value: Decimal, place: int, how: str) -> Decimal:
    return value.quantize(Decimal(1).scaleb(place), rounding=how)


def _text(value: Decimal) -> str:
    size = value.adjusted()
    digits = size - int(value.as_tuple().exponent) + 1
    return f"{value:f}" if not value or -4 <= size < max(digits, 6) else f"{float(value):.{max(digits, 1) - 1}e}"
