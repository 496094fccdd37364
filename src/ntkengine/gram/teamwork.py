"""Checkpoints of a job over ranks: each writes its own rectangles down, any number of ranks goes on from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ntkengine import store
from ntkengine.cluster.comm import Team
from ntkengine.errors import InputError, Stopped
from ntkengine.gram.checkpoint import Checkpoints, new_run
from ntkengine.gram.frame import Frame
from ntkengine.gram.keeper import Writer, names_of, work_of

if TYPE_CHECKING:
    from ntkengine.gram.spreading import Spreading


@contextmanager
def checkpointing(
    out: Path,
    job: Mapping[str, Any],
    team: Team | None,
    *,
    resume: bool,
    every_s: float,
    versions: Mapping[str, str] | None = None,
    arrays: Mapping[str, np.ndarray] | None = None,
) -> Iterator[Checkpoints]:
    """Hold a job's checkpoints for the time of the block; of several ranks rank 0 comes first and holds the folder.

    Args:
        out: the Gram file.
        job: what defines its values.
        team: the ranks; None: this process alone.
        resume: go on from what there is.
        every_s: seconds between checkpoints.
        versions: of the libraries that take part.
        arrays: as `Checkpoints`.

    A signal to stop waits for the end of a block of the model, where all ranks hear of it.

    Raises:
        InputError: as `Checkpoints`; on all ranks.
    """
    if team is None:
        with Checkpoints(out, job, resume=resume, every_s=every_s, versions=versions, arrays=arrays) as alone:
            yield alone
        return
    ranks: dict[str, Any] = {"rank": team.rank, "ranks": team.size, "agree": lambda yes: any(team.exchange(yes))}
    ranks |= {"run": team.broadcast(new_run()), "versions": versions, "arrays": arrays}
    mine, mark = Checkpoints(out, job, resume=resume, every_s=every_s, **ranks), ""
    with ExitStack() as entered:
        for first in (True, False):
            with team.together():
                if team.root is first:
                    if not first and not mine.folder.shows(mark):
                        msg = f"out: {mine.folder.path} is not rank 0's here: all ranks need one folder that they share"
                        raise InputError(msg)
                    entered.enter_context(mine)
                    if first and not mine.repairs:
                        store.refuse_shards(out, team.size)
            mark = team.broadcast(mine.folder.mark)
        team.same({"out": mine.start}, f"do all ranks see the same files in {mine.folder.path}?")
        with mine.stop.waits():  # a signal to one rank alone would leave the others waiting
            yield mine


class SpreadKeeper(Writer):
    """The checkpoints of one rank's sweep, written by all ranks after the same block.

    Args:
        owner: of the rank.
        team: the ranks.
        frame: of the whole Gram.
    """

    def __init__(self, owner: Checkpoints, team: Team, frame: Frame) -> None:
        super().__init__(owner, (*frame.rows, *frame.columns), 0, symmetric=frame.symmetric)
        self.team = team

    def take(self, found: list[store.Saved], spreading: Spreading) -> None:
        """Put this rank's rectangles together from a checkpoint of any number of ranks.

        Raises:
            InputError: it lacks entries.
        """
        names = names_of(found)
        with ExitStack() as filled:
            blocks = [block for name in names for block in filled.enter_context(spreading.panels(name).filling())]
            store.overlay(found, [store.Part(block.part, block.rows, block.columns, block.values) for block in blocks])
        done, traces = work_of(found)
        spreading.skip = frozenset(done)
        if self.team.root:  # they are summed over ranks in the end
            spreading.sums.done, spreading.sums.traces = done, traces
        spreading.before_s = sum(saved.state["pass_seconds"] for saved in found) / len(found)
        self.owner.resumed += len(done)

    def _work(self, spreading: Spreading) -> dict[str, Any]:
        sums = spreading.sums
        return {"done": sums.done, "traces": sums.traces, "pass_seconds": spreading.pass_seconds}

    def _pieces(self, spreading: Spreading) -> Iterator[store.Part]:
        sums = spreading.sums
        for panels in sums.parts.values() or [sums.total]:
            for block in panels.blocks(mirrored=True):
                yield store.Part(block.part, block.rows, block.columns, block.values, symmetric=self.symmetric)

    def _stop(self, spreading: Spreading) -> None:
        try:
            super()._stop(spreading)
        except Stopped as stop:
            self.team.agreed = stop
            raise
