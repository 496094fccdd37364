"""What the probe finds out about a model: its blocks, and the path of every parameter in every segment."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ntkengine.tangents.blocks import Stack
from ntkengine.tangents.verify import Owners


@dataclass(frozen=True)
class Path:
    """How one parameter's gradient is taken in one segment.

    Attributes:
        parameter: the parameter's name.
        segment: the segment that uses it.
        owners: (module, the parameter's own name there, path kind) for every module whose calls are used; empty for
            plain autograd of the segment.
    """

    parameter: str
    segment: int
    owners: Owners

    @property
    def kind(self) -> str:
        """The path's name in a plan."""
        return "+".join(sorted({k for _, _, k in self.owners})) or "block"


@dataclass
class Structure:
    """What the sweep needs to know about a model.

    Attributes:
        stack: its blocks.
        paths: by segment.
        shapes: by parameter: (R, I) of its gradient's matrix.
        unused: selected parameters that f does not depend on (their gradient is zero).
        negligible: those whose gradient is zero but for rounding on every probed sample.
        transposed: by parameter: whether its gradient's matrix is the parameter's transpose.
        one_by_one: microbatches must hold one sample.
        trim: padding columns may be cut.
        outputs: C.
        expand: modules of which an output with one row stands for all samples (`capture.Recorder`).
        foreign: kernels of other libraries run, which need the digits they ask for.
        tokens: by parameter: token axis of its factors on the probed samples.
        per_call: by parameter: how often one call of its module uses it, where that may be several times.
        held: by segment: bytes of one token's activations in its graph.
    """

    stack: Stack
    paths: dict[int, list[Path]] = field(default_factory=lambda: defaultdict(list))
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    negligible: list[str] = field(default_factory=list)
    transposed: dict[str, bool] = field(default_factory=dict)
    one_by_one: bool = False
    trim: bool = True
    outputs: int = 0
    expand: frozenset[str] = frozenset()
    tokens: dict[str, int] = field(default_factory=dict)
    foreign: bool = False
    per_call: dict[str, int] = field(default_factory=dict)
    held: list[float] = field(default_factory=list)

    def told(self) -> dict[str, Any]:
        """Return what decides the way through the model, as plain Python by name."""
        found: dict[str, Any] = {
            f"the way of {path.parameter} in segment {segment}": path.owners
            for segment, paths in sorted(self.paths.items())
            for path in paths
        }
        plain = ("shapes", "unused", "negligible", "transposed", "one_by_one", "trim", "outputs", "tokens")
        sets = {"blocks": self.stack.names, "expand": sorted(self.expand)}
        return found | sets | {name: getattr(self, name) for name in plain}

    @property
    def swept(self) -> int:
        """How many segments a sweep runs, from the head down to the last with selected parameters."""
        return self.stack.head - min(self.paths, default=0) + 1

    def microbatches(self, tokens: int) -> dict[str, Any]:
        """Return how `Samples` makes the microbatches of a sweep, of at most so many tokens."""
        return {"microbatch_tokens": tokens, "microbatch": 1 if self.one_by_one else None, "trim": self.trim}

    def kinds(self, parameter: str) -> set[str]:
        """Return the path kinds of a parameter in all segments."""
        paths = (path for found in self.paths.values() for path in found if path.parameter == parameter)
        return {kind for path in paths for kind in path.kind.split("+")}

    def factor_kind(self, parameter: str) -> str:
        """Return what a parameter's uses are: "outer", "lookup", "dense", or "mixed"."""
        kinds = self.kinds(parameter)
        if kinds <= {"outer", "outer-transposed"}:
            return "outer"
        if kinds == {"lookup"}:
            return "lookup"
        return "mixed" if kinds & {"outer", "outer-transposed", "lookup"} else "dense"

    def tokens_of(self, parameter: str, mean: int) -> int:
        """Return the token axis of a parameter's factors, 0 for a dense kind.

        Args:
            parameter: its name.
            mean: tokens of a sample.
        """
        return 0 if self.factor_kind(parameter) == "dense" else min(mean, self.tokens.get(parameter, mean))

    def on(self, model: nn.Module) -> Structure:
        """Return the same structure for a copy of the model."""
        blocks = tuple(model.get_submodule(name) for name in self.stack.names)
        return replace(self, stack=replace(self.stack, blocks=blocks))
