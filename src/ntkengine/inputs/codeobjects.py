"""What code refers to outside itself, and whose it is."""

from __future__ import annotations

import dis
import importlib
import os
import sysconfig
import types
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_INSTALLED = (
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    f"{Path(__file__).parents[1]}{os.sep}",
    "<frozen",
)


def outside_of(function: types.FunctionType) -> dict[str, Any]:
    """Return by name what a function may use that is not its own: globals, and what own modules hold under its names.

    Modules that are installed count as nothing here: their version stands for them.
    """
    names = sorted(_names(function.__code__))
    found = {n: function.__globals__[n] for n in names if n in function.__globals__}
    return found | _of_own_modules(names, [*found.values(), *_imported(function.__code__, function.__globals__)])


def underlying(value: Any) -> Any:
    """Return the function of a method, property or the like; None of anything else."""
    for name in ("__func__", "fget", "func", "__wrapped__"):
        if not isinstance(value, types.FunctionType):
            value = getattr(value, name, value)
    return value if isinstance(value, types.FunctionType) else None


def installed(file: str) -> bool:
    """Whether code is the interpreter's, an installed library's, or this package's, for which a version stands."""
    return file.startswith(_INSTALLED) or "site-packages" in file or "dist-packages" in file


def without_docstring(function: types.FunctionType) -> types.CodeType:
    """Return a function's code without its docstring, unless the code reads that constant too."""
    code, consts = function.__code__, function.__code__.co_consts
    if not consts or not isinstance(consts[0], str) or consts[0] != function.__doc__:
        return code
    if any(step.opcode in dis.hasconst and step.arg == 0 for step in dis.get_instructions(code)):
        return code
    return code.replace(co_consts=(None, *consts[1:]))


def _names(code: types.CodeType) -> set[str]:
    """Return what a function may ask globals and modules for, by name or by a text such as `getattr` takes."""
    inside = [_names(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return {*code.co_names, *(c for c in code.co_consts if isinstance(c, str) and c.isidentifier())}.union(*inside)


def _imported(code: types.CodeType, home: Mapping[str, Any]) -> list[types.ModuleType]:
    """Return the modules that a function imports when it runs; what cannot be imported it cannot use either."""
    found: list[types.ModuleType] = []
    steps, package = list(dis.get_instructions(code)), home.get("__package__")
    for i, step in enumerate(steps):
        with suppress(Exception):
            if step.opname == "IMPORT_NAME":
                source = importlib.import_module("." * int(steps[i - 2].argval) + str(step.argval), package)
                found.append(source)
            elif step.opname == "IMPORT_FROM":  # a module, or what one holds
                found.append(importlib.import_module(f"{source.__name__}.{step.argval}"))
    return found + [m for c in code.co_consts if isinstance(c, types.CodeType) for m in _imported(c, home)]


def _of_own_modules(names: Iterable[str], values: Iterable[Any]) -> dict[str, Any]:
    """Return by its full name what modules hold under these names; of modules that are installed nothing."""
    found: dict[str, Any] = {}
    homes = [m for m in values if isinstance(m, types.ModuleType)]
    met: set[str] = set()
    while homes:
        home = homes.pop()
        if home.__name__ in met or _stands_by_version(home):
            continue
        met.add(home.__name__)
        here = {n: vars(home)[n] for n in names if n in vars(home)}
        found |= {f"{home.__name__}.{n}": value for n, value in here.items()}
        homes += [m for m in here.values() if isinstance(m, types.ModuleType)]
    return found


def _stands_by_version(module: types.ModuleType) -> bool:
    """Whether a module is installed; one without a file is a folder's, built in, or made by hand."""
    file = getattr(module, "__file__", None)
    if file:
        return installed(file)
    if getattr(getattr(module, "__spec__", None), "origin", None) in ("built-in", "frozen"):
        return True
    return any(installed(f"{folder}{os.sep}") for folder in getattr(module, "__path__", ()))
