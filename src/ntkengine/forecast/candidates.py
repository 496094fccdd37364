"""Candidate subsets of a model's linear maps, by layer and by type."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

from ntkengine.errors import InputError

SUBSETS = ("single", "layers", "types", "greedy", "all")  # by name
_LARGEST = 4096  # subsets an exhaustive search may have


def layer_of(name: str) -> str:
    """Return the number of a module's layer, "outside" without one."""
    found = re.search(r"\.(\d+)\.", f".{name}.")
    return found.group(1) if found else "outside"


def kind_of(name: str) -> str:
    """Return a module's name within its layer."""
    return re.split(r"\.\d+\.", f".{name}.", maxsplit=1)[-1].strip(".")


def grouped(names: list[str], key: Callable[[str], str]) -> dict[str, tuple[str, ...]]:
    """Return the names by key, in order."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return {k: tuple(v) for k, v in groups.items()}


def named_subsets(subsets: str | Mapping[str, Iterable[str]], names: list[str]) -> dict[str, tuple[str, ...]]:
    """Return the subsets asked for, by name.

    Args:
        subsets: "single", "layers", "types", "all", or named lists of names or globs.
        names: of the maps there are.

    Raises:
        InputError: a name or glob that matches nothing, or too many subsets.
    """
    if isinstance(subsets, Mapping):
        found = {}
        for label, patterns in subsets.items():
            globs = [patterns] if isinstance(patterns, str) or not isinstance(patterns, Iterable) else list(patterns)
            if not all(isinstance(g, str) for g in globs):
                raise InputError(f"subsets {label!r}: expected names or globs, got {patterns!r}")
            chosen = tuple(n for n in names if any(fnmatchcase(n, g) for g in globs))
            lost = [g for g in globs if not any(fnmatchcase(n, g) for n in names)]
            if lost or not chosen:
                raise InputError(f"subsets {label!r}: {lost or globs} matches no linear map; they are {names[:3]}, …")
            found[str(label)] = chosen
        if not found:
            raise InputError("subsets: expected at least one, got none")
        return found
    layers, kinds = grouped(names, layer_of), grouped(names, kind_of)
    if subsets == "single":
        return {n: (n,) for n in names}
    if subsets == "layers":
        return {f"layer {k}": v for k, v in layers.items()}
    if subsets == "types":
        return kinds
    if subsets == "all":
        count = (2 ** len(layers) - 1) * (2 ** len(kinds) - 1)
        if count > _LARGEST:
            raise InputError(f"subsets 'all': expected at most {_LARGEST}, these are {count}; use 'greedy'")
        found = {}
        for some in _unions(list(layers)):
            for kind in _unions(list(kinds)):
                chosen = tuple(n for n in names if layer_of(n) in some and kind_of(n) in kind)
                if chosen:
                    found[f"{'+'.join(kind)} of {'+'.join(some)}"] = chosen
        return found
    raise InputError(f"subsets: expected {', '.join(SUBSETS)} or a mapping, got {subsets!r}")


def _unions(items: list[str]) -> list[tuple[str, ...]]:
    return [tuple(x for i, x in enumerate(items) if mask >> i & 1) for mask in range(1, 2 ** len(items))]
