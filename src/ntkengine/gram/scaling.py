"""What a job takes on many ranks: bytes on the wire and seconds, from its plan on one.

Counts are exact where the plan is: every rank's meetings, and the tokens its microbatches have. Seconds take this
machine's rates for each rank, and one bandwidth for every link of the ring.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ntkengine.arguments import number, whole
from ntkengine.cluster.ring import hops
from ntkengine.cluster.shards import Shard, deal
from ntkengine.gram.frame import Frame
from ntkengine.gram.layout import Layout
from ntkengine.gram.panels import Meeting, meetings
from ntkengine.gram.plan import Plan, PlanRow
from ntkengine.gram.strategies import choose
from ntkengine.inputs.batches import Samples
from ntkengine.tangents.grouping import grouped
from ntkengine.tangents.structure import Structure

_COPIED = 64 << 20  # bytes copied to time the host's memory
_KINDS = {"materialise": "outer", "ghost": "outer", "explicit": "dense", "lookup": "lookup", "zero": "zero"}


@dataclass(frozen=True)
class Scaling:
    """A prediction.

    Attributes:
        ranks: R.
        seconds: of the run: the probe, what the busiest rank does, and the checks.
        probe_seconds: of that, in the probe, which every rank runs whole.
        pass_seconds: in passes.
        contract_seconds: in contractions.
        check_seconds: in checks, which are rank 0's alone.
        wait_seconds: in communication that no contraction hides.
        sent_bytes: by rank, on the ring.
        communication_share: of the seconds.
        bandwidth: bytes a second of a link.
    """

    ranks: int
    seconds: float
    probe_seconds: float
    pass_seconds: float
    contract_seconds: float
    check_seconds: float
    wait_seconds: float
    sent_bytes: list[int]
    communication_share: float
    bandwidth: float

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        return asdict(self)


def predict(
    plan: Plan,
    structure: Structure,
    samples: Samples,
    frame: Frame,
    layout: Layout,
    ranks: int,
    *,
    gpus_per_node: int | None = None,
    network: float | None = None,
    device: torch.device,
    entry: float = 1.0,
) -> Scaling:
    """Return what the job takes on many ranks like this process.

    A segment's contractions hide the parcels that come meanwhile; its first window hides behind nothing.

    Args:
        plan: of one process, with its times.
        structure: from the probe.
        samples: the job's.
        frame: the wanted Gram.
        layout: of the ranks.
        ranks: R, at least 2.
        gpus_per_node: ranks on one host; default all.
        network: bytes a second between hosts; without it, and where all are on one, what this host's memory passes from
            process to process.
        device: what the plan was timed on.
        entry: size of a factor's entry as it travels, against the plan's.

    Raises:
        InputError: fewer samples than ranks.
    """
    shards = deal(samples, ranks)
    widths = [_tokens(shard, samples, structure, layout) for shard in shards]
    known = structure.tokens
    bundles = _bundles(plan, ranks, layout)
    sent = np.zeros(ranks)
    passes = plan.pass_seconds * max(s.tokens for s in shards) / plan.tokens
    crosses = gpus_per_node is None or ranks > gpus_per_node
    bandwidth = network if network is not None and crosses else _memory_bandwidth()
    busiest = [[0.0] * len(bundle) for bundle in bundles]
    slowest = [[0.0] * len(bundle) for bundle in bundles]
    first = [[0.0] * len(bundle) for bundle in bundles]
    for rank in range(ranks):
        met = meetings(shards, rank, samples, frame, layout.window)
        right = (rank + 1) % ranks
        for s, segment in enumerate(bundles):
            for b, bundle in enumerate(segment):
                parcels = {
                    hop: entry * _parcel(bundle, widths[hop.source], plan, known, half=hop.half)
                    for hop in hops(rank, ranks)
                }
                sent[right] += sum(parcels.values())
                busiest[s][b] = max(busiest[s][b], sum(_flops(row, m, known) for row in bundle for m in met))
                slowest[s][b] = max(slowest[s][b], sum(parcels.values()) / bandwidth)
                first[s][b] = max(first[s][b], sum(parcels[hop] for hop in met[0].hops) / bandwidth)
    contracting = [[flops / plan.rate for flops in segment] for segment in busiest]
    waiting = 0.0
    for spent, came, ahead in zip(contracting, slowest, first, strict=True):
        following = [*came[1:], 0.0] if came else []
        waiting += (ahead[0] if ahead else 0.0) + sum(max(0.0, t - c) for t, c in zip(following, spent, strict=True))
    crowd = _crowd(min(ranks, gpus_per_node or ranks), device)
    probing, passes, contract = (crowd * x for x in (plan.probe_seconds, passes, sum(map(sum, contracting))))
    seconds = probing + passes + contract + waiting + plan.check_seconds
    return Scaling(
        ranks,
        seconds,
        probing,
        passes,
        contract,
        plan.check_seconds,
        waiting,
        [int(x) for x in sent],
        waiting / seconds,
        float(bandwidth),
    )


def check_ranks(ranks: Any, gpus_per_node: Any, network: Any) -> None:
    """Refuse what cannot be predicted for.

    Raises:
        InputError: naming the argument.
    """
    whole("ranks", ranks, 1)
    if gpus_per_node is not None:
        whole("gpus_per_node", gpus_per_node, 1)
    if network is not None:
        number("network", network, above=0, what="bytes a second")


def _tokens(shard: Shard, samples: Samples, structure: Structure, layout: Layout) -> list[tuple[int, int]]:
    """Return (samples, tokens with the padding of their microbatches) of a shard's halves."""
    local = shard.part(samples, **structure.microbatches(layout.microbatch_tokens))
    widths = np.concatenate([np.full(c.n, local.widths(c.group)[c.rows].max()) for c in local.chunks])
    mine = np.concatenate([shard.positions(g) for g in range(len(samples.sizes))])
    found = []
    for half in (0, 1):
        spans = [s for s in shard.stripes if s.half == half]
        inside = np.zeros(len(mine), dtype=bool)
        for s in spans:
            inside |= (mine >= s.start) & (mine < s.stop)
        found.append((int(inside.sum()), int(widths[inside].sum())))
    return found


def _bundles(plan: Plan, ranks: int, layout: Layout) -> list[list[list[PlanRow]]]:
    """Return the parameters that travel together, by segment."""
    segments: dict[str, dict[str, PlanRow]] = {}
    for row in plan.parameters:
        segments.setdefault(row.segment, {})[row.parameter] = row
    return [
        [[rows[n] for n in names] for names in grouped({n: r.bytes / ranks for n, r in rows.items()}, limit)]
        for rows in segments.values()
        for limit in [layout.bundle_bytes]
    ]


def _parcel(
    bundle: Sequence[PlanRow],
    halves: Sequence[tuple[int, int]],
    plan: Plan,
    known: Mapping[str, int],
    *,
    half: bool,
) -> float:
    """Return the bytes of a bundle's factors of a shard, or of its half 0; `known` are token axes by parameter."""
    counted = halves[:1] if half else halves
    samples, tokens = sum(n for n, _ in counted), sum(t for _, t in counted)
    mean = max(1, round(plan.tokens / plan.samples))
    total = 0.0
    for row in bundle:
        each = row.bytes / plan.samples
        if row.tokens > 0 and (row.features is None or row.strategy == "lookup"):
            short = min(row.tokens, known.get(row.parameter, row.tokens))
            total += each / row.tokens * (samples * short if short < mean else tokens)
        else:
            total += each * samples
    return total


def _flops(row: PlanRow, meeting: Meeting, known: Mapping[str, int]) -> float:
    if not meeting.frames:
        return 0.0
    tokens = min(row.tokens, known.get(row.parameter, row.tokens))
    shape = (row.rows, row.columns) if row.features is None else (1, row.features)
    return choose(_KINDS[row.strategy], shape, tokens, meeting.size, *meeting.frames)[1]


def _crowd(ranks: int, device: torch.device) -> float:
    """Return how much longer a rank computes because its host has fewer cores than threads; GPUs are one to a rank."""
    if device.type != "cpu":
        return 1.0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1.0, ranks * torch.get_num_threads() / cores)


def _memory_bandwidth() -> float:
    """Return the bytes a second from process to process of this host: written to shared memory and read from it."""
    source, target = (torch.zeros(_COPIED, dtype=torch.uint8) for _ in range(2))
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return _COPIED / best / 2
