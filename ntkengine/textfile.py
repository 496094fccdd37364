"""Text files that are whole or absent, and what strangers' text may hold."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ntkengine.errors import InputError

_DEEPEST = 64  # what walks through nested values afterwards recurses


def check_folder(path: Path) -> None:
    """Refuse a file whose folder is not there, before anything is computed for it.

    Raises:
        InputError: naming both.
    """
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path}: folder {path.parent} does not exist")


def write_text(path: Path, text: str) -> None:
    """Write a file under its name, atomically.

    Raises:
        OSError: the disk refused; what was there before still is.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def parse_json(text: str, where: object, kind: type | tuple[type, ...] = object, expected: str = "JSON") -> Any:
    """Return the value of a JSON text.

    Args:
        text: of one value.
        where: what messages call it.
        kind: what the value must be.
        expected: that, in words.

    Raises:
        InputError: malformed, nested deeper than 64 levels, a text in it that is no Unicode, or another kind.
    """
    try:
        value = json.loads(text)
        check_plain(value)
    except (ValueError, RecursionError) as error:  # ValueError: also of a number with thousands of digits
        raise InputError(f"{where}: malformed JSON ({str(error).splitlines()[0]})") from error
    if not isinstance(value, kind):
        raise InputError(f"{where}: expected {expected}, got {type(value).__name__}")
    return value


def check_plain(value: object, depth: int = 0) -> None:
    """Refuse nested values that could not be shown or written later.

    Raises:
        ValueError: nested too deeply, half of a surrogate pair in a text, or a date.
    """
    if depth > _DEEPEST:
        raise ValueError(f"nested deeper than {_DEEPEST} levels")
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, dict):
        for name, item in value.items():
            check_plain(name, depth + 1)
            check_plain(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            check_plain(item, depth + 1)
    elif not isinstance(value, int | float | None):
        raise ValueError(f"expected texts, numbers, lists and tables, got {value}")
