"""How a job is laid out in memory, and what it then takes: what waits where, what is held at once, how many tiles."""

from __future__ import annotations

from dataclasses import dataclass

from ntkengine.inputs.batches import MICROBATCH_TOKENS
from ntkengine.tangents.grouping import grouped
from ntkengine.tangents.sweep import KEEP_BYTES

PROCESS_BYTES = 32 << 20  # kernels made for the shapes a job met, freed tensors that it keeps; twice it where bounded
SPREAD = 0.1  # of a job with a bound: at most as much of it


@dataclass(frozen=True)
class Layout:
    """A job's layout.

    Attributes:
        hidden: where hidden states wait: "device", "host" or "disk".
        factor_bytes: factors held at once; a block over it is run again for each group of its parameters.
        microbatch_tokens: tokens of a microbatch.
        tile: samples swept at once; 0: all of them.
        resident_bytes: streamed weights kept in memory.
        copies: bytes that copies of one parameter's factors may take; the strategies that make them are left, if not.
        gradients: entries of whole gradients that the probe and the check hold at once.
        keeps: activations are kept, up to a limit, rather than recomputed.
        doubles: the float64 copy that measures the noise is made whole, rather than a module at a time.
        window: shards of other ranks that a rank contracts its own with at once; 0: there are none.
        bundle_bytes: factors of a shard that travel at once, more only if one parameter has more.
    """

    hidden: str = "device"
    factor_bytes: float = float("inf")
    microbatch_tokens: int = MICROBATCH_TOKENS
    tile: int = 0
    copies: float = float("inf")
    resident_bytes: int = 512 << 20
    gradients: int = 1 << 26
    keeps: bool = False
    doubles: bool = False
    window: int = 0
    bundle_bytes: float = 0.0

    @property
    def keep_bytes(self) -> int:
        """Activations that a sweep may keep."""
        return KEEP_BYTES if self.keeps else 0

    def share(self, samples: int) -> float:
        """Return the share of the samples that one sweep holds: two tiles."""
        return min(1.0, 2 * self.tile / samples) if self.tile else 1.0

    def tiles(self, samples: int) -> int:
        """Return the number of tiles."""
        return -(-samples // self.tile) if self.tile else 1


@dataclass(frozen=True)
class Needs:
    """What a job takes, in bytes above the loaded model.

    Attributes:
        samples: S.
        tokens: of all samples.
        gram: the accumulators.
        hidden: hidden states of all samples and blocks.
        cotangents: cotangents of all samples.
        factors: by segment, by parameter, factors of all samples.
        feature_tile: the tile of tangent features, for all samples.
        activations: one token's activations in the largest segment, graph and backward.
        weights: streamed weights in use at once; 0 for a loaded model.
        entry: bytes of a gradient entry.
        parameter: entries of the largest parameter.
        segment: entries of the largest segment's parameters.
        kept: activations that a job without a bound keeps rather than recomputes.
        kept_share: share of the samples they belong to: those leave no hidden states.
        copy: a copy of the weights in another dtype.
        double: a float64 copy of them, where one measures the noise.
        copies: of one parameter's factors, in the order that ghost products or token matching read.
        copies_in_pieces: where they are contracted with those of some other ranks at a time.
        met: samples of a contraction for each of the rank's own, where other ranks' are met.
        outputs: C.
        norms: one token's output gradients of the largest segment's norms: summed at once, they are no factors.
        parcel: factors of a shard that travel at once.
        projections: a sketch's random matrices for the largest segment.
    """

    samples: int
    tokens: int
    gram: float
    hidden: float
    cotangents: float
    factors: list[dict[str, float]]
    feature_tile: float
    activations: float
    weights: float
    entry: int
    parameter: int = 0
    segment: int = 0
    kept: float = 0.0
    kept_share: float = 0.0
    copy: float = 0.0
    double: float = 0.0
    projections: float = 0.0
    copies: float = 0.0
    copies_in_pieces: float = 0.0
    met: float = 1.0
    outputs: int = 1
    norms: float = 0.0
    parcel: float = 0.0

    def peak(self, layout: Layout) -> float:
        """Return the bytes a layout needs."""
        share = layout.share(self.samples)
        factors = self._factors(layout)
        passing = self._passing(layout, factors)
        travelling = (2 * layout.window + 2) * self.parcel  # a window in use, the next, and what leaves
        copies = self.copies_in_pieces if layout.window else self.copies
        working = max(passing, share * self.met * (self.feature_tile + copies) + travelling)
        kept = share * (self.cotangents + (self.hidden if layout.hidden == "device" else 0.0))
        resident = min(self.weights, layout.resident_bytes) if self.weights else 0.0
        if layout.keeps and self.kept:  # a block's factors take the place of the activations it no longer needs
            kept = share * self.cotangents + self.kept + (1.0 - self.kept_share) * self.hidden
            factors = max(0.0, factors - self.kept / max(1, len(self.factors)))
        sweep = kept + factors + working
        # Three samples' gradients by plain autograd, and again by the path that is tried.
        probe = 6.0 * self.entry * max(self.parameter, min(self.segment, layout.gradients // 3))
        copies = self.copy + (self.double if layout.doubles else 0.0)
        found = self.gram + resident + copies + max(sweep + self.projections, probe)
        return found + (PROCESS_BYTES if layout.keeps else min(2.0 * PROCESS_BYTES, SPREAD * found))

    def room(self, layout: Layout) -> float:
        """Return the bytes that copies of one parameter's factors may take within `peak`."""
        share = layout.share(self.samples)
        return max(self._passing(layout, self._factors(layout)) - share * self.feature_tile, share * self.copies)

    def _factors(self, layout: Layout) -> float:
        share = layout.share(self.samples)
        limit = layout.factor_bytes / share
        blocks = [share * sum(part[n] for n in names) for part in self.factors for names in grouped(part, limit)]
        return max(blocks, default=0.0)

    def _passing(self, layout: Layout, factors: float) -> float:
        # One output's gradients of a microbatch are there twice while its factors are put together.
        part = min(1.0, layout.microbatch_tokens / (layout.share(self.samples) * self.tokens)) / self.outputs
        fresh = 0.0 if layout.keeps else part * factors
        return (self.activations + self.norms) * layout.microbatch_tokens + fresh
