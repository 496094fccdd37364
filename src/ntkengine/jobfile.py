"""The job file: one `compute_gram` call as TOML, checked key by key.

out = "k.h5"
[model]  path, num_labels, dtype, device, seed, stream, allow_pickle, trust_remote_code, task;  [model.peft] PEFT's own
[data]   train, eval, text, text_pair, label, label_names, limit, eval_limit, shuffle, max_length, truncate, template
[head]   fit, ridge, folds, seed
[gram]   arguments of `compute_gram`, words
[forecast]  ridge
[finetune]  fields of `Recipe`, linear, measure_every
"""

from __future__ import annotations

import copy
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from ntkengine.arguments import nearest_name
from ntkengine.errors import InputError
from ntkengine.jobparts import Job
from ntkengine.recipe import is_number
from ntkengine.textfile import check_plain, reason_of

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    list[str]: "a list of texts",
    tuple[float, float]: "two numbers",
    dict: "a table",
    type(None): "nothing",
}


def read_job(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Job:
    """Return the job of a TOML file.

    Args:
        path: the file; relative paths in it are taken from its folder.
        overrides: nested like the file, and stronger; None values leave the file's. Its paths are taken as they are.

    Raises:
        InputError: no such file, not TOML, or a key or value that does not belong, named.
    """
    path = Path(path)
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
        check_plain(found)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        if error.object.startswith(b"\x89HDF"):
            raise InputError(f"{path}: is an HDF5 file such as a Gram's, expected a job file") from None
        raise InputError(f"{path}: expected a job file, TOML: {reason_of(error)}") from error
    except (OSError, ValueError, RecursionError) as error:  # ValueError: also of a number with thousands of digits
        raise InputError(f"{path}: not a readable TOML file: {reason_of(error)}") from error
    # Every key is checked as it stands in the file, before anything is laid over it.
    _check_names(found, Job, str(path))
    try:
        found = _resolved(found, path.parent)
    except (OSError, RuntimeError) as error:  # a name that is too long, ~ of an unknown user
        raise InputError(f"{path}: a path in it cannot be used: {reason_of(error)}") from error
    return make_job(merged(found, overrides or {}), str(path))


def make_job(found: Mapping[str, Any], where: str = "job") -> Job:
    """Return the job of nested mappings.

    Args:
        found: nested like the file.
        where: what messages call it.

    Raises:
        InputError: as `read_job`.
    """
    job: Job = _built(found, Job, where)
    return job


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return `below` with the values of `above` that are not None laid over it, table by table."""
    result = dict(below)
    for name, value in above.items():
        if isinstance(value, Mapping):
            inner = merged(result[name] if isinstance(result.get(name), Mapping) else {}, value)
            if inner:
                result[name] = inner
        elif value is not None:
            result[name] = value
    return result


def _built(found: Mapping[str, Any], kind: type, where: str) -> Any:
    hints = typing.get_type_hints(kind)
    _check_names(found, kind, where)
    given = {}
    for item in fields(kind):
        place = f"{where}: {item.name}"
        if item.name not in found:
            needed = item.default is MISSING and item.default_factory is MISSING
            if needed and is_dataclass(hints[item.name]):
                given[item.name] = _built({}, typing.cast(type, hints[item.name]), place)
            elif needed:
                raise InputError(f"{place}: is missing")
            continue
        hint, value = hints[item.name], found[item.name]
        hint = next((kind for kind in typing.get_args(hint) if is_dataclass(kind)), hint)
        if is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise InputError(f"{place}: expected a table, got {value!r}")
            given[item.name] = _built(value, typing.cast(type, hint), place)
        else:
            given[item.name] = _checked(value, hint, place)
    try:
        return kind(**given)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _check_names(found: Mapping[str, Any], kind: type, where: str) -> None:
    names = [item.name for item in fields(kind)]
    for name in found:
        if name not in names:
            hint = nearest_name(name, names) or f"expected one of {', '.join(names)}"
            raise InputError(f"{where}: unknown key {name!r}; {hint}")


def _checked(value: Any, hint: Any, where: str) -> Any:
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in allowed:
        if kind == list[str]:
            if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
                return list(value)
        elif kind == tuple[float, float]:
            if isinstance(value, list | tuple):
                return tuple(value)
        elif kind is dict:
            if isinstance(value, Mapping):
                return dict(value)
        elif kind is Path:
            if isinstance(value, str | Path) and str(value) and "\0" not in str(value):
                return Path(value)
        elif kind is float:
            if is_number(value):
                return float(value)
        elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return value
    expected = " or ".join(_WORDS[kind] for kind in allowed if kind is not type(None))
    raise InputError(f"{where}: expected {expected}, got {value!r}")


def _resolved(found: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Take relative paths from the job file's folder; a model path only when such a folder is there."""
    result = copy.deepcopy(found)
    if isinstance(result.get("out"), str):
        result["out"] = folder / Path(result["out"]).expanduser()
    data, model = result.get("data"), result.get("model")
    if isinstance(data, dict):
        data |= {k: folder / Path(data[k]).expanduser() for k in ("train", "eval") if isinstance(data.get(k), str)}
    if isinstance(model, dict) and isinstance(model.get("path"), str):
        local = folder / Path(model["path"]).expanduser()
        if local.exists() or model["path"].startswith((".", "~", "/")):
            model["path"] = str(local)
    return result
