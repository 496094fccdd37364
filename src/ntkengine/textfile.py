"""Text files that are whole or absent, and what strangers' text may hold."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from ntkengine.errors import InputError

_START = 4096  # bytes in which a result shows what it is
_DEEPEST = 64  # what walks through nested values afterwards recurses


def reason_of(error: BaseException) -> str:
    """Return why something could not be read or written, without the codes and names that systems put around it."""
    if isinstance(error, UnicodeDecodeError):
        return "expected UTF-8 text"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()
    return (str(error) or type(error).__name__).splitlines()[0]


def check_folder(path: Path, mark: str = "") -> None:
    """Refuse a file that could not be written, before anything is computed for it.

    Args:
        path: the file.
        mark: text near the start of what is written: a file that is there and has it not is no earlier result.

    Raises:
        InputError: its folder is not there or takes no file, it is a folder itself, or a file of another kind.
    """
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path}: folder {path.parent} does not exist")
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected the name of a file")
    if mark and path.exists():
        with path.open("rb") as file:
            if mark.encode() not in file.read(_START):
                raise InputError(f"{path}: is there already, and nothing this command wrote; name another file")
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise InputError(f"{path}: folder {path.parent} takes no file: {reason_of(error)}") from None


def made_folder(path: Path) -> Path:
    """Return a folder after making it where it is not there; InputError where a file has its name."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise InputError(f"{path}: is a file, expected a folder") from None
    return path


def check_apart(**files: Path | None) -> None:
    """Refuse two results under one name.

    Args:
        files: by the option that names them.

    Raises:
        InputError: naming both options.
    """
    seen: dict[Path, str] = {}
    for option, path in files.items():
        other = None if path is None else seen.setdefault(path.absolute(), option)
        if other not in (None, option):
            raise InputError(f"{option}: expected another name than {other}'s, got {path} for both")


def json_text(value: Any, indent: int | None = None) -> str:
    """Return plain values as JSON; NaN and infinity, which JSON lacks, are null."""
    return json.dumps(_finite(value), allow_nan=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Write a file under its name, atomically.

    Raises:
        OSError: the disk refused; what was there before still is.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(f"{path}: is not written: {error.strerror}") from error
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
        InputError: malformed, a key twice in one object, nested deeper than 64 levels, a text in it that is no Unicode,
            or another kind.
    """
    try:
        value = _DECODER.decode(text)
        check_plain(value)
    except (ValueError, RecursionError) as error:  # ValueError: also of a number with thousands of digits
        raise InputError(f"{where}: malformed JSON ({str(error).splitlines()[0]})") from error
    if not isinstance(value, kind):
        raise InputError(f"{where}: expected {expected}, got {type(value).__name__}")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object's values by key; of two under one key the last would be taken."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct)


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
