"""The fastest layout within a budget of memory, or within what is free."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import product

import torch

from ntkengine.errors import InputError
from ntkengine.gram.layout import PROCESS_BYTES, SPREAD, Layout, Needs
from ntkengine.inputs.batches import MICROBATCH_TOKENS

log = logging.getLogger(__name__)

_GPU_TOKENS = 16_384  # a GPU's: 2,048 rows of a layer are less work than launching it, or than sending its weights
_USUAL_TOKENS = 512  # smaller microbatches lose more time than a block run twice
_LEAST_TOKENS = 128
_SHARE = 0.8  # of a GPU's free memory: what allocating leaves between pieces is the rest
_TRIES = 30  # to find the least budget
NEAR = 0.75  # of what a bounded job may take: from there on freed memory is given back
GIB = 2.0**30


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


def nearest(needs: Needs, room: float, *, spill: str, base: Layout) -> Layout:
    """Return the fastest layout within a number of bytes, or the smallest there is.

    Args:
        needs: the job's.
        room: bytes.
        spill: as in `fit`.
        base: what the room alone decides.
    """
    layout, _ = _search(needs, room, spill, base)
    return layout or replace(_layouts(base, needs)[-1], hidden=spill, resident_bytes=int(room / 4))


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
    spare = (room - needs.peak(layout) - 2.0 * PROCESS_BYTES) / (1.0 + SPREAD)
    if not needs.weights or spare <= 0:
        return layout
    return replace(layout, resident_bytes=int(min(needs.weights, layout.resident_bytes + spare)))


def spill_of(device: torch.device) -> str:
    """Return where hidden states go when they do not fit where a job runs."""
    return "host" if device.type == "cuda" else "disk"


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
    found = [base]
    while found[-1].microbatch_tokens >= 2 * _USUAL_TOKENS:
        found.append(replace(base, microbatch_tokens=found[-1].microbatch_tokens // 2))
    usual = found[-1]
    largest = max((max(part.values()) for part in needs.factors if part), default=0.0)
    whole = max((sum(part.values()) for part in needs.factors), default=0.0)
    limit = whole / 2
    while limit > largest:
        found.append(replace(usual, factor_bytes=limit))
        limit /= 2
    found.append(replace(usual, factor_bytes=largest))
    small = replace(usual, factor_bytes=largest, microbatch_tokens=min(_LEAST_TOKENS, usual.microbatch_tokens))
    found.append(small)
    tile = 0 if base.window else needs.samples // 2  # ranks do not sweep twice
    while tile >= 1:
        found.append(replace(small, factor_bytes=largest * tile * 2 / needs.samples, tile=tile))
        tile //= 2
    return found
