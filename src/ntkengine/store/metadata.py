"""What a Gram file says of how it was computed, checked kind by kind: tables and reports take it as it is."""

from __future__ import annotations

from dataclasses import MISSING, fields
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import h5py

from ntkengine.errors import InputError
from ntkengine.gram.plan import Plan, PlanRow
from ntkengine.store.schema import read_json

_NUMBER = (int, float)
_META: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("precision", "backend", "readout", "device", "date"), (str,)),
    **dict.fromkeys(("parameters", "blocks", "resumed", "repeated", "eval_seen"), (int,)),
    **dict.fromkeys(("unused_parameters", "negligible_parameters"), (list,)),
    **dict.fromkeys(("seconds", "pass_seconds", "contract_seconds", "noise_relative", "outputs_error"), _NUMBER),
    **dict.fromkeys(("checked", "one_by_one", "head_fitted", "trained_on"), (bool,)),
    **dict.fromkeys(("versions", "settings", "sketch", "module_trace", "ranks"), (dict,)),
}
_SKETCH: dict[str, tuple[type, ...]] = {"features": (int,), "parameters": (int,), "relative_error": _NUMBER}
_LATER = ("negligible", "frozen")  # older files lack these
_LARGEST = 1 << 63


def read_meta(file: h5py.File) -> dict[str, Any]:
    """Return /json/meta.

    Raises:
        InputError: a value of another kind than the one that is written, named.
    """
    meta: dict[str, Any] = read_json(file, "meta")
    where = f"{file.filename}: /json/meta"
    for name, kinds in _META.items():
        if meta.get(name) is not None:
            _check(meta[name], kinds, f"{where}: {name}")
    for name, value in (meta.get("module_trace") or {}).items():
        _check(value, _NUMBER, f"{where}: module_trace: {name}")
    for name, kinds in _SKETCH.items() if meta.get("sketch") else ():
        _check(meta["sketch"].get(name), kinds, f"{where}: sketch: {name}")
    head = (meta.get("settings") or {}).get("head")
    if head is not None:
        _check(head, (dict,), f"{where}: settings: head")
    return meta


def read_plan(file: h5py.File) -> Plan | None:
    """Return /json/plan, or None where there is none.

    Raises:
        InputError: as `read_meta`.
    """
    found = read_json(file, "plan", (dict, type(None)))
    if found is None:
        return None
    where = f"{file.filename}: /json/plan"
    _check_fields(found, Plan, where)
    for row in found["parameters"]:
        _check(row, (dict,), f"{where}: parameters")
        _check_fields(row, PlanRow, f"{where}: parameters")
    return Plan.from_dict(found)


def _check_fields(found: dict[str, Any], kind: type, where: str) -> None:
    hints = get_type_hints(kind)
    for item in fields(kind):
        hint = hints[item.name]
        if item.name in found:
            kinds = get_args(hint) if isinstance(hint, UnionType) else (get_origin(hint) or hint,)
            _check(found[item.name], kinds, f"{where}: {item.name}")
        elif item.default is MISSING and item.default_factory is MISSING and item.name not in _LATER:
            raise InputError(f"{where}: {item.name} is missing")


def _check(value: object, kinds: tuple[type, ...], where: str) -> None:
    good = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        good = True
    if not good or (isinstance(value, int) and abs(value) >= _LARGEST):
        raise InputError(f"{where}: expected {' or '.join(k.__name__ for k in kinds)}, got {str(value)[:60]!r}")
