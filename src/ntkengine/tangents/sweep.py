"""The sweep: all samples through the model, one block at a time, yielding each segment's gradient factors.

Forward once under frozen weights, recording what enters each block; then from the head down re-run each block with
gradients only with respect to activations, and read off the factors of its parameters.
Cost: one forward, one recomputed forward, C activation-only backwards. Memory: hidden states N·T·d·L (or in a file),
cotangents N·C·T·d, and the factors of one segment, or of part of one. Microbatches whose activations fit a budget keep
them instead, and are spared the recomputed forward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np
from torch import nn

from ntkengine.errors import CheckFailed
from ntkengine.inputs.batches import Samples
from ntkengine.inputs.heap import HEAP
from ntkengine.inputs.readout import Readout
from ntkengine.tangents.factors import ParameterFactors, merge
from ntkengine.tangents.grouping import grouped
from ntkengine.tangents.passes import Passes
from ntkengine.tangents.projection import Projection
from ntkengine.tangents.sketch import Sketch
from ntkengine.tangents.structure import Path, Structure

KEEP_BYTES = 1 << 30


class Sweep:
    """One pass over all samples.

    Args:
        model: frozen, in eval mode, of one floating dtype.
        selected: parameters by name.
        structure: from `probe`.
        samples: microbatches; of one sample each when the structure says so.
        readout: f.
        tick: called after every microbatch of every segment.
        keep_bytes: activations to keep rather than recompute; none of a streamed model.
        hidden: where hidden states wait (`hidden.PLACES`).
        factor_bytes: by parameter, what its factors take; only needed with a limit.
        limit: bytes of factors held at once: a block over it is run again for each group of its parameters.
        sketches: by parameter, what is kept of its gradient; the others stay exact.
        skip: parameters whose factors nobody wants any more.
    """

    def __init__(
        self,
        model: nn.Module,
        selected: Mapping[str, nn.Parameter],
        structure: Structure,
        samples: Samples,
        readout: Readout,
        tick: Callable[[], None] = lambda: None,
        keep_bytes: int = KEEP_BYTES,
        hidden: str = "device",
        factor_bytes: Mapping[str, float] | None = None,
        limit: float = float("inf"),
        sketches: Mapping[str, Sketch] | None = None,
        skip: Collection[str] = (),
    ) -> None:
        self.structure, self.samples, self.tick = structure, samples, tick
        self._passes = Passes(model, selected, structure, samples, readout, keep_bytes, hidden)
        self.device, self.dtype = self._passes.device, self._passes.dtype
        self._factor_bytes, self._limit = factor_bytes or {}, limit
        self._sketches, self._skip = sketches or {}, skip

    @property
    def outputs(self) -> np.ndarray:
        """(S, C) float64, f in sweep order; complete after the first segment was yielded."""
        return self._passes.outputs

    def segments(self) -> Iterator[tuple[str, list[ParameterFactors]]]:
        """Yield (segment name, factors of the parameters whose last use it was), from the head down to the input."""
        try:
            yield from self._segments()
        finally:
            self._passes.close()

    def _segments(self) -> Iterator[tuple[str, list[ParameterFactors]]]:
        factors: dict[str, ParameterFactors] = {}
        remaining = Counter(path.parameter for paths in self.structure.paths.values() for path in paths)
        stack = self.structure.stack
        for segment in range(stack.head, self._passes.lowest - 1, -1):
            groups = self._groups(segment)
            for k, paths in enumerate(groups):
                self._collect(factors, segment, paths, last=k == len(groups) - 1)
                done = []
                for path in paths:
                    remaining[path.parameter] -= 1
                    if remaining[path.parameter] == 0 and path.parameter not in self._skip:
                        done.append(factors.pop(path.parameter))
                yield stack.segment_name(segment), done
                del done
        if factors:
            msg = f"{next(iter(factors))}: its gradient was collected but never summed"
            raise CheckFailed(msg)

    def _groups(self, segment: int) -> list[list[Path]]:
        """Return the segment's paths in groups whose factors fit the limit, each at least one path."""
        paths = {path.parameter: path for path in self.structure.paths.get(segment, [])}
        limit = float("inf") if segment == self.structure.stack.head else self._limit
        sizes = {name: self._factor_bytes.get(name, 0.0) for name in paths}
        return [[paths[name] for name in names] for names in grouped(sizes, limit)] or [[]]

    def _collect(self, factors: dict[str, ParameterFactors], segment: int, paths: list[Path], *, last: bool) -> None:
        """Add the factors of some of a segment's parameters, on all samples, to those there are."""
        wanted = {path.parameter for path in paths} - set(self._skip)
        projections = {
            name: Projection(self._sketches[name], self.dtype, self.device) for name in wanted & self._sketches.keys()
        }
        sizes = [chunk.n for chunk in self.samples.chunks]
        for i in range(len(sizes)):
            for name, uses in self._passes.run(segment, i, paths, last=last).items():
                if name not in wanted:
                    continue
                if name in projections:
                    uses = projections[name](uses)
                if name not in factors:
                    shape = projections[name].shape if name in projections else self.structure.shapes[name]
                    factors[name] = ParameterFactors(name, shape, sizes, [[] for _ in sizes])
                factors[name].chunks[i] = merge([*factors[name].chunks[i], *uses])
            self.tick()
            HEAP.relieve()
