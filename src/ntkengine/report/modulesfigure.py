"""The figure of each module's share of the trace, by layer and by kind of module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ntkengine.report.drawing import PALETTE, blank, finished

_KINDS = len(PALETTE)  # module kinds with a colour of their own
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def modules_figure(shares: Mapping[str, float]) -> Any:
    """Return each module's share of the trace: one bar a layer, stacked by kind, and one bar a kind.

    Args:
        shares: share by module name; they sum to 1.
    """
    layers, kinds = _grouped(shares)
    names = sorted(kinds, key=lambda kind: -kinds[kind])
    told = names[:_KINDS]
    colours = dict(zip(told, PALETTE, strict=False))
    height = max(2.6, 0.24 * len(layers) + 0.2 * len(told) + 1.6)
    figure, (ax, by_kind) = blank(rows=2, height=height, ratios=(max(len(layers), 2), max(len(told), 2)))
    for i, parts in enumerate(layers.values()):
        left = 0.0
        for kind in sorted(parts, key=lambda kind: -kinds[kind]):
            ax.barh(
                i, 100 * parts[kind], left=100 * left, color=colours.get(kind, "#cccccc"), edgecolor="white", lw=0.4
            )
            left += parts[kind]
    ax.set_yticks(range(len(layers)), list(layers), fontsize=7)
    ax.invert_yaxis()
    figure.suptitle("Share of the trace by layer (top) and by kind of module (bottom)", fontsize=10)
    rest = sum(kinds[kind] for kind in names[_KINDS:])
    rows = [(kind, kinds[kind], colours[kind]) for kind in told]
    if rest > 0:
        rows.append((f"{len(names) - _KINDS} others", rest, "#cccccc"))
    by_kind.barh(range(len(rows)), [100 * r[1] for r in rows], color=[r[2] for r in rows])
    by_kind.set_yticks(range(len(rows)), [_short(r[0]) for r in rows], fontsize=7)
    by_kind.invert_yaxis()
    by_kind.set_xlabel("share of the trace (%)")
    return finished(figure, legend=False)


def _grouped(shares: Mapping[str, float]) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Return shares by layer then kind, and by kind. A layer is the first number in the name."""
    layers: dict[str, dict[str, float]] = {}
    kinds: dict[str, float] = {}
    numbered = [name for name in shares if _LAYER.search(name)]
    outside = sorted(set(shares) - set(numbered))
    for name in [*sorted(numbered, key=lambda n: int(_number(n))), *outside]:
        found = _LAYER.search(name)
        kind = name[found.end() :] or "layer" if found else _own(name)
        layer = f"layer {found[1]}" if found else _own(name).split(".")[0]
        layers.setdefault(layer, {})
        layers[layer][kind] = layers[layer].get(kind, 0.0) + shares[name]
        kinds[kind] = kinds.get(kind, 0.0) + shares[name]
    return layers, kinds


def _number(name: str) -> str:
    found = _LAYER.search(name)
    return found[1] if found else "-1"


def _own(name: str) -> str:
    """Drop the wrapper's and the model's own prefix of a module outside the layers."""
    parts = [part for part in name.split(".") if part not in {"base_model", "model", "transformer"}]
    for i, part in enumerate(parts):
        if part in {"embeddings", "pooler", "classifier", "score"}:
            return ".".join(parts[i:])
    return ".".join(parts) or name


def _short(name: str) -> str:
    return name if len(name) <= 34 else f"…{name[-33:]}"
