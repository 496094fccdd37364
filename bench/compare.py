"""Lines of two commits, files or folders against each other: what got slower, or larger, beyond the noise.

Lines are of the same work if name, configuration and device agree. The noise of a figure runs from the least 20th to
the greatest 80th percentile of its lines; a figure that was measured once has none. It has regressed where B's whole
interval lies above A's by more than the tolerance.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cases import CASES
from bench.record import RESULTS

Line = dict[str, Any]
Key = tuple[str, str, str]
NEEDED = {"name", "commit", "config_hash", "device"}


@dataclass(frozen=True)
class Change:
    """One figure of one work in A and in B: (low, middle, high) each."""

    name: str
    config: str
    figure: str
    a: tuple[float, float, float]
    b: tuple[float, float, float]

    def verdict(self, tolerance: float) -> str:
        """Return "regressed", "improved" or "same"."""
        if self.b[0] > self.a[2] * (1 + tolerance):
            return "regressed"
        return "improved" if self.b[2] * (1 + tolerance) < self.a[0] else "same"


def main(a: str, b: str, tolerance: float = 0.05) -> int:
    """Print every figure's change; return 1 if one has regressed, 2 if nothing can be compared."""
    try:
        found = changes(gather(a), gather(b))
    except ValueError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    if not found:
        print(f"compare: no line of {a} and {b} has the same name, configuration and device", file=sys.stderr)
        return 2
    for change in found:
        (low, middle, high), (low2, middle2, high2) = change.a, change.b
        print(
            f"{change.verdict(tolerance):10}{change.name} {change.config} {change.figure}: "
            f"{middle:.4g} [{low:.4g}, {high:.4g}] -> {middle2:.4g} [{low2:.4g}, {high2:.4g}], "
            f"x {middle2 / middle:.3f}"
        )
    bad = sum(change.verdict(tolerance) == "regressed" for change in found)
    print(f"{len(found)} figures, {bad} regressed")
    return 1 if bad else 0


def gather(where: str) -> list[Line]:
    """Return the lines of a file, of a folder's files, or of a commit (in the folder of results).

    Raises:
        ValueError: it is none of these, or has no lines; or a line is not JSON.
    """
    path = Path(where)
    if path.exists():
        found = _read([path] if path.is_file() else sorted(path.glob("*.jsonl")))
    else:
        dirty = where.endswith("+")  # of a working tree with changes
        asked = ["git", "rev-parse", "--verify", "--quiet", f"{where.removesuffix('+')}^{{commit}}"]
        commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
        if not commit:
            msg = f"{where}: expected a file of lines, a folder or a commit"
            raise ValueError(msg)
        every = _read(sorted(RESULTS.glob("*.jsonl")))
        found = [
            x for x in every if commit.startswith(x["commit"].removesuffix("+")) and x["commit"].endswith("+") == dirty
        ]
    if not found:
        msg = f"{where}: no lines; those of a working tree with changes have a + after the commit"
        raise ValueError(msg)
    return found


def changes(a: list[Line], b: list[Line]) -> list[Change]:
    """Return the watched figures that both have."""
    left, right = _grouped(a), _grouped(b)
    found = []
    for key in sorted(left.keys() & right.keys()):
        name, config, _ = key
        for figure in CASES[name].watched:
            sides = [_interval(lines, figure) for lines in (left[key], right[key])]
            if sides[0] and sides[1]:
                found.append(Change(name, config, figure, sides[0], sides[1]))
    return found


def _grouped(lines: list[Line]) -> dict[Key, list[Line]]:
    found: dict[Key, list[Line]] = defaultdict(list)
    for line in lines:
        if line["name"] in CASES:
            found[line["name"], line["config_hash"], line["device"]].append(line)
    return found


def _interval(lines: list[Line], figure: str) -> tuple[float, float, float] | None:
    having = [x for x in lines if x.get(figure) is not None]
    if not having:
        return None
    middle = sorted(x[figure] for x in having)[len(having) // 2]
    low = min(x.get(f"{figure}_p20", x[figure]) for x in having)
    high = max(x.get(f"{figure}_p80", x[figure]) for x in having)
    return low, middle, high


def _read(paths: list[Path]) -> list[Line]:
    found = []
    for path in paths:
        for number, text in enumerate(path.read_text().splitlines(), 1):
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                line = None
            if not isinstance(line, dict) or not line.keys() >= NEEDED:
                msg = f"{path}, line {number}: expected a JSON object with {', '.join(sorted(NEEDED))}"
                raise ValueError(msg)
            found.append(line)
    return found
