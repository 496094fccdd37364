"""A rank's part of a sweep over all ranks: its samples' factors travel half a ring, each rank keeps its part of K."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ntkengine.cluster.comm import Team
from ntkengine.cluster.packing import Label, join
from ntkengine.cluster.parcels import Parcels
from ntkengine.cluster.ring import Queue
from ntkengine.cluster.shards import Piece, Shard
from ntkengine.cluster.wire import Wire
from ntkengine.errors import CheckFailed, NonFinite
from ntkengine.gram.blocks import TOTAL
from ntkengine.gram.frame import Frame
from ntkengine.gram.panels import Meeting, Panels, meetings
from ntkengine.gram.run import root_of
from ntkengine.gram.spread import Spread, Work
from ntkengine.gram.strategies import choose, contract, kind_of
from ntkengine.gram.teamwork import SpreadKeeper
from ntkengine.gram.tiles import Accumulator, Workspace
from ntkengine.inputs.batches import Samples
from ntkengine.products import unrouted
from ntkengine.tangents.factors import ParameterFactors
from ntkengine.tangents.grouping import grouped
from ntkengine.tangents.structure import Structure
from ntkengine.tangents.sweep import Sweep


class Spreading:
    """The sweep of one rank.

    Args:
        team: the ranks.
        structure: from the probe, the same on all ranks.
        samples: the job's.
        local: this rank's own.
        shards: of all ranks.
        frame: the wanted Gram.
        device: where the model is.
        window: hops that are contracted at once.
        bundle_bytes: factors of a shard that travel at once, more only if one parameter has more.
        factor_bytes: by parameter, of an average shard.
        group: parameter name -> the part it is kept under; None keeps no parts.
        tick: called with flops done and the segment's name.
        roots: by parameter, the square root of a diagonal preconditioner.
        kernels: contract in Triton kernels.
        keeper: writes checkpoints; None: there are none.
    """

    def __init__(
        self,
        team: Team,
        structure: Structure,
        samples: Samples,
        local: Samples,
        shards: Sequence[Shard],
        frame: Frame,
        device: torch.device,
        *,
        window: int,
        bundle_bytes: float,
        factor_bytes: Mapping[str, float],
        group: Callable[[str], str] | None,
        tick: Callable[[float, str], None],
        roots: Mapping[str, Tensor] | None,
        kernels: bool,
        keeper: SpreadKeeper | None = None,
    ) -> None:
        self.keeper, self.skip, self.before_s = keeper, frozenset[str](), 0.0
        self.team, self.structure, self.samples, self.local = team, structure, samples, local
        self.shards, self.frame, self.device = shards, frame, device
        self.window, self.bundle_bytes, self.factor_bytes = window, bundle_bytes, factor_bytes
        self.group, self.tick, self.roots, self.kernels = group, tick, roots, kernels
        self.wire = Wire(team, device)
        self.met = meetings(shards, team.rank, samples, frame, window)
        self.parcels = Parcels(team.rank, shards, samples, local, device)
        self.workspace = Workspace()
        self.sums = Spread(team, frame, self._panels(TOTAL))
        self._start, self._contracted_s = (time.perf_counter(), team.waited), 0.0

    def _panels(self, part: str) -> Panels:
        return Panels(part, self.met, self.device, self.workspace, kernels=self.kernels)

    def panels(self, part: str) -> Panels:
        """Return where a part's products are added, empty the first time."""
        if part not in (TOTAL, *self.sums.parts):
            self.sums.parts[part] = self._panels(part)
        return self.sums.panels(part)

    def _part(self, name: str) -> str:
        """Return the part that a parameter is kept under."""
        return TOTAL if self.group is None else self.group(name)

    @property
    def pass_seconds(self) -> float:
        """Time so far outside contractions and waiting, of this run and those it goes on from."""
        seconds, waited = time.perf_counter() - self._start[0], self.team.waited - self._start[1]
        return self.before_s + seconds - waited - self._contracted_s

    def run(self, sweep: Sweep) -> Spread:
        """Return the sums of all ranks.

        Args:
            sweep: over this rank's own samples, but for parameters in `skip`.

        Raises:
            Exception: on every rank, what failed on any (`Team.agree`).
        """
        team, sent = self.team, self.team.sent
        steps = sweep.segments()
        failed: Exception | None = None
        while True:
            segment: str | None = None
            bundles: list[list[ParameterFactors]] = []
            labels: list[list[Label]] = []
            try:
                if failed is not None:
                    raise failed
                segment, found = next(steps, (None, []))
                bundles = self._bundles(found)
                labels = [self.parcels.labels(bundle) for bundle in bundles]
                found.clear()
            except Exception as error:  # noqa: BLE001  (every rank has to hear of it)
                team.agree(error)
            told = team.agree(None, (segment, [[f.name for f in b] for b in bundles], labels))
            if any(t[:2] != told[0][:2] for t in told):
                msg = "the ranks' sweeps take different ways through the model: are their versions the same?"
                raise CheckFailed(msg)
            if segment is None:
                break
            try:
                failed = self._segment(segment, bundles, [t[2] for t in told])
            except Exception as error:  # noqa: BLE001  (the others wait for parcels)
                team.abort(error)
            if self.keeper is not None and any(t[1] for t in told) and not any(team.exchange(failed is not None)):
                self.keeper.step(self)
        if self.keeper is not None:
            self.keeper.finish(self)
        return self._finished(sweep, team.sent - sent)

    def _bundles(self, found: Sequence[ParameterFactors]) -> list[list[ParameterFactors]]:
        """Return parameters that travel together: as large as one may be, so that small ones are not many messages."""
        by_name = {f.name: f for f in found}
        sizes = {name: self.factor_bytes.get(name, 0.0) for name in by_name}
        return [[by_name[name] for name in names] for names in grouped(sizes, self.bundle_bytes) if names]

    def _segment(
        self, segment: str, bundles: list[list[ParameterFactors]], labels: Sequence[Sequence[Sequence[Label]]]
    ) -> Exception | None:
        """Contract a segment; return what failed, once all parcels have been passed on.

        Args:
            segment: its name.
            bundles: this rank's factors.
            labels: by rank, bundle and piece.
        """
        sizes = [[self.parcels.sizes(rank, found[b]) for rank, found in enumerate(labels)] for b in range(len(bundles))]
        queue = Queue(self.team, self.wire, sizes, lambda b: self.parcels.packed(bundles[b]), self.window)
        failed: Exception | None = None
        for own in (f for bundle in bundles for f in bundle):
            self.panels(self._part(own.name))  # on a rank without rectangles too
        for b, bundle in enumerate(bundles):
            for w, meeting in enumerate(self.met):
                there: dict[Piece, list[ParameterFactors]] = {}
                for hop, parcel in queue.take(b, w):
                    there |= self.parcels.unpacked(hop, labels[hop.source][b], parcel, bundle)
                if failed is None:
                    try:
                        self._contract(segment, bundle, there, w, meeting, queue.poll)
                    except Exception as error:  # noqa: BLE001  (told to all at the segment's end)
                        if self.team.broken(error):
                            raise
                        failed = error
            bundle.clear()
        queue.finish()
        return failed

    def _contract(
        self,
        segment: str,
        bundle: Sequence[ParameterFactors],
        there: Mapping[Piece, Sequence[ParameterFactors]],
        w: int,
        meeting: Meeting,
        poll: Callable[[], None],
    ) -> None:
        if not meeting.frames:
            return
        for i, own in enumerate(bundle):
            began = time.perf_counter()
            joined = join([there[p][i] if p in there else self.parcels.own(own, p) for p in meeting.axis])
            kind = kind_of(own.name, joined.kind, self.frame, self.structure.negligible)
            strategy, flops = choose(kind, joined.shape, joined.tokens, meeting.size, *meeting.frames)
            panels = self.panels(self._part(own.name))
            totals = panels.totals[w]
            before = panels.trace()
            with torch.cuda.device(self.device) if self.device.type == "cuda" else unrouted():
                root = root_of(own.name, self.roots, self.structure)
                contract(joined, strategy, totals[0], root, *totals[1:], poll=poll)
            after = panels.trace() if self.frame.square else sum(float(total.K.sum()) for total in totals)
            if not np.isfinite(after):
                raise NonFinite(self._where(own.name, meeting, totals))
            if w == 0 and self.frame.square:
                self.sums.traces[own.name] = after - before
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            _, tokens, earlier, seconds = self.sums.done.get(own.name, (strategy, 0, 0.0, 0.0))
            spent = time.perf_counter() - began
            seconds += spent
            self._contracted_s += spent
            self.sums.done[own.name] = strategy, max(tokens, joined.tokens), flops + earlier, seconds
            self.tick(flops, segment)

    def _where(self, name: str, meeting: Meeting, totals: Sequence[Accumulator]) -> str:
        positions = meeting.positions
        for total in totals:
            bad = (~torch.isfinite(total.K)).any(0)
            rows = (bad[:, : total.c1 - total.c0].diagonal() if total.frame.square else bad.any(1)).nonzero()
            if not len(rows):
                continue
            position = int(positions[total.frame.rows[0] + int(rows[0]) // self.frame.width])
            return f"{name}: the gradient is not finite for example {self.samples.example_at(position)}"
        return f"{name}: the gradient is not finite"

    def _finished(self, sweep: Sweep, sent: int) -> Spread:
        sums, team, passing = self.sums, self.team, self.pass_seconds
        seconds, waited = time.perf_counter() - self._start[0], team.waited - self._start[1]
        for panels in sums.parts.values():
            panels.finish()
            sums.total.add(panels)
        if self.group is None:
            sums.total.finish()
        self.workspace.clear()
        outputs = np.zeros((self.samples.total, self.structure.outputs))
        mine = np.concatenate([self.shards[team.rank].positions(g) for g in range(len(self.samples.sizes))])
        outputs[mine] = sweep.outputs
        sums.outputs = team.total(outputs)
        told = team.exchange((sums.traces, sums.done, passing, sent, waited))
        names = list(dict.fromkeys(name for t in told for name in t[1]))
        sums.done = {name: _together([t[1][name] for t in told if name in t[1]], team.size) for name in names}
        sums.traces = {n: sum(t[0].get(n, 0.0) for t in told) for n in names} if self.frame.square else {}
        sums.pass_seconds, sums.waited = (sum(t[k] for t in told) / team.size for k in (2, 4))
        sums.seconds = seconds
        sums.sent_bytes = [t[3] for t in told]
        return sums


def _together(found: Sequence[Work], ranks: int) -> Work:
    most = max(found, key=lambda work: work[2])
    return most[0], max(w[1] for w in found), sum(w[2] for w in found), sum(w[3] for w in found) / ranks
