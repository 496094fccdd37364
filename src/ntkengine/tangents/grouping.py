"""Parts that are held at once, under a limit."""

from __future__ import annotations

from collections.abc import Mapping


def grouped(sizes: Mapping[str, float], limit: float) -> list[list[str]]:
    """Return the names in order, in groups whose sizes sum to at most the limit; at least one name each.

    Args:
        sizes: by name.
        limit: in their unit.
    """
    groups: list[list[str]] = []
    held = 0.0
    for name, size in sizes.items():
        if not groups or held + size > limit:
            groups.append([])
            held = 0.0
        groups[-1].append(name)
        held += size
    return groups
