"""How a job is laid out in memory: what waits where, what is held at once, in how many tiles."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from itertools import product

import torch

from ntkengine.errors import InputError
from ntkengine.inputs.batches import MICROBATCH_TOKENS
from ntkengine.tangents.grouping import grouped
from ntkengine.tangents.sweep import KEEP_BYTES

log = logging.getLogger(__name__)

_GPU_TOKENS = 16_384  # a GPU's: 2,048 rows of a layer are less work than launching it, or than sending its weights
_USUAL_TOKENS = 512  # smaller microbatches lose more time than a block run twice
_LEAST_TOKENS = 128
_PROCESS_BYTES = 32 << 20  # kernels made for the shapes a job met, freed tensors that it keeps; twice it where bounded
_SPREAD = 0.1  # of a job with a bound: at most as much of it
_SHARE = 0.8  # of a GPU's free memory: what allocating leaves between pieces is the rest
_TRIES = 30  # to find the least budget
NEAR = 0.75  # of what a bounded job may take: from there on freed memory is given back
GIB = 2.0**30


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
        return found + (_PROCESS_BYTES if layout.keeps else min(2.0 * _PROCESS_BYTES, _SPREAD * found))

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


def fit(
    needs: Needs, memory_gib: float | None, *, spill: str, base: Layout | None = None, room: float = float("inf")
) -> Layout:
    """Return the fastest layout within a budget: smaller microbatches, spilled hidden states, split blocks, tiles.

    Args:
        needs: the job's.
        memory_gib: the budget; None: no bound but the room there is.
        spill: where hidden states go when they do not fit: "host" or "disk".
        base: what the budget alone decides (`bounds`), and how samples of other ranks are met.
        room: bytes that are free; a job without a budget that needs more is laid out within them, if it can be.

    Raises:
        InputError: nothing fits the budget; says the least that would.
    """
    base = base or bounds(memory_gib, needs.entry)
    if memory_gib is None:
        if needs.peak(base) > room:
            return _within(needs, room, spill, base)
        return base if base.keeps else _filled(base, needs, _SHARE * room)  # a host's system keeps files in memory
    layout, least = _search(needs, memory_gib * GIB, spill, base)
    if layout is not None:
        return layout
    told = least
    for _ in range(_TRIES):  # a larger budget holds more at once, and so needs more
        again = bounds(told / GIB, needs.entry, turn=base.resident_bytes)
        again = replace(base, resident_bytes=again.resident_bytes, gradients=again.gradients)
        layout, least = _search(needs, told, spill, again)
        if layout is not None:
            break
        told = least
    where, other = (" on every rank", "more ranks") if base.window else ("", "fewer examples")
    told *= 1.005 / GIB  # three digits of it are never below the least
    msg = (
        f"memory_gib={memory_gib}: this job needs at least {told:.3g} GiB above the model{where}; give that, or {other}"
    )
    raise InputError(msg)


def _within(needs: Needs, room: float, spill: str, base: Layout) -> Layout:
    """Return a layout within the room there is; the given one, with a warning, where none is."""
    wanted, free = needs.peak(base) / GIB, room / GIB
    budget = float(f"{0.995 * free:.3g}")
    given = {name: getattr(base, name) for name in ("window", "bundle_bytes", "microbatch_tokens")}
    bounded = replace(bounds(budget, needs.entry, turn=base.resident_bytes), **given)
    try:
        layout = fit(needs, budget, spill=spill, base=bounded)
    except InputError:
        log.warning("memory: this job wants %.3g GiB and %.3g are free: it may not end", wanted, free)
        return base
    log.warning(
        "memory: this job would take %.3g GiB and %.3g are free: laid out as with memory_gib=%.3g",
        wanted,
        free,
        budget,
    )
    return layout


def _search(needs: Needs, budget: float, spill: str, base: Layout) -> tuple[Layout | None, float]:
    """Return the fastest layout within a budget in bytes, or None; and the least that one of them needs."""
    least = float("inf")
    for layout in _layouts(base, needs):
        for hidden, held in product(("device", spill), dict.fromkeys((base.resident_bytes, int(budget / 4)))):
            candidate = replace(layout, hidden=hidden, resident_bytes=held)
            peak = needs.peak(candidate)
            if peak <= budget:
                if not candidate.window:
                    candidate = replace(candidate, copies=needs.room(candidate))
                return _filled(candidate, needs, budget), peak
            least = min(least, peak)
    return None, least


def _filled(layout: Layout, needs: Needs, room: float) -> Layout:
    """Return a layout in which streamed weights take what room is left."""
    spare = (room - needs.peak(layout) - 2.0 * _PROCESS_BYTES) / (1.0 + _SPREAD)
    if not needs.weights or spare <= 0:
        return layout
    return replace(layout, resident_bytes=int(min(needs.weights, layout.resident_bytes + spare)))


def heap_limit(memory_gib: float | None) -> float:
    """Return what `Heap.begin` is told before there is a plan."""
    return float("inf") if memory_gib is None else NEAR * memory_gib * GIB


def bounds(memory_gib: float | None, entry: int, device: torch.device | None = None, turn: int = 0) -> Layout:
    """Return a layout in which only what the budget and the device decide is set.

    Args:
        memory_gib: the budget; None: no bound.
        entry: bytes of a gradient entry.
        device: where the job runs; None: on the CPU.
        turn: bytes of the streamed weights that are used over and over, a block's or two.
    """
    # A GPU recomputes fast, and one of its microbatches would be kept whole: gigabytes.
    gpu = device is not None and device.type == "cuda"
    tokens = _GPU_TOKENS if gpu else MICROBATCH_TOKENS
    if memory_gib is None:
        resident = max(Layout.resident_bytes, turn)
        return Layout(keeps=not gpu, doubles=True, microbatch_tokens=tokens, resident_bytes=resident)
    budget = memory_gib * GIB
    gradients = max(1 << 20, int(budget / 16 / entry))
    resident = int(max(budget / 4, min(turn, budget / 2)))
    return Layout(resident_bytes=resident, gradients=gradients, microbatch_tokens=tokens)


def _layouts(base: Layout, needs: Needs) -> list[Layout]:
    """Return layouts from the fastest to the smallest."""
    found = []
    tokens = base.microbatch_tokens
    while tokens >= _USUAL_TOKENS:
        found.append(replace(base, microbatch_tokens=tokens))
        tokens //= 2
    usual = found[-1]
    largest = max((max(part.values()) for part in needs.factors if part), default=0.0)
    whole = max((sum(part.values()) for part in needs.factors), default=0.0)
    limit = whole / 2
    while limit > largest:
        found.append(replace(usual, factor_bytes=limit))
        limit /= 2
    found.append(replace(usual, factor_bytes=largest))
    small = replace(usual, factor_bytes=largest, microbatch_tokens=_LEAST_TOKENS)
    found.append(small)
    tile = 0 if base.window else needs.samples // 2  # ranks do not sweep twice
    while tile >= 1:
        found.append(replace(small, factor_bytes=largest * tile * 2 / needs.samples, tile=tile))
        tile //= 2
    return found
