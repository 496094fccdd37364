"""Text files that are whole or absent."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from ntkengine.errors import InputError


def check_folder(path: Path) -> None:
    """Refuse a file that could not be written, before anything is computed for it.

    Raises:
        InputError: its folder is not there or takes no file, or it is a folder itself.
    """
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path}: folder {path.parent} does not exist")
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected the name of a file")
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise InputError(f"{path}: folder {path.parent} takes no file: {error.strerror}") from None


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
    finally:
        partial.unlink(missing_ok=True)
