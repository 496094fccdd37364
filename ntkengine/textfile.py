"""Text files that are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path

from ntkengine.errors import InputError


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
