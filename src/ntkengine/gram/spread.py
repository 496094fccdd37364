"""A Gram spread over ranks, each holding its part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ntkengine.cluster.comm import Team
from ntkengine.gram.blocks import TOTAL, Block, paste, pick
from ntkengine.gram.frame import Frame
from ntkengine.gram.panels import Panels

Work = tuple[str, int, float, float]  # strategy, tokens, flops, seconds


@dataclass
class Spread:
    """What the ranks added up to, each holding its own part; every method is called by all of them.

    Attributes:
        team: the ranks.
        frame: of the whole Gram.
        total: this rank's rectangles.
        parts: and those of every module's Gram, when asked for.
        outputs: (S, C) float64 in sweep order, of all samples.
        traces: trace over the square by parameter.
        done: by parameter: (strategy, tokens, flops of all ranks, seconds on average).
        pass_seconds: time outside contractions and waiting, on average.
        sent_bytes: that travelled on the ring.
        seconds: of the sweep.
        waited: seconds of waiting for others in it, on average.
    """

    team: Team
    frame: Frame
    total: Panels
    parts: dict[str, Panels] = field(default_factory=dict)
    outputs: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    traces: dict[str, float] = field(default_factory=dict)
    done: dict[str, Work] = field(default_factory=dict)
    pass_seconds: float = 0.0
    sent_bytes: list[int] = field(default_factory=list)
    seconds: float = 0.0
    waited: float = 0.0

    def panels(self, part: str) -> Panels:
        """Return this rank's rectangles of a module's Gram, or of `TOTAL`."""
        return self.total if part == TOTAL else self.parts[part]

    def told(self, seconds: float, waited: float) -> dict[str, Any]:
        """Return how the ranks shared the work, as plain JSON types.

        Args:
            seconds: of the whole job.
            waited: what a rank had waited before it.
        """
        mean = sum(self.team.exchange(self.team.waited - waited)) / self.team.size
        return {
            "count": self.team.size,
            "rank_seconds": seconds * self.team.size,
            "sent_bytes": self.sent_bytes,
            "sweep_seconds": self.seconds,
            "sweep_waited_seconds": self.waited,
            "waited_seconds": mean,
            "communication_share": mean / seconds,
        }

    def pick(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Return entries of the Gram, as `Sums.pick`; called by rank 0 within `asking`, while the others serve."""
        return np.asarray(self._ask(("pick", rows, columns)))

    def diagonal(self) -> np.ndarray:
        """Return the diagonal of the square, as `Sums.diagonal`; likewise."""
        return self._ask(("diagonal",))

    def times(self, x: np.ndarray) -> np.ndarray:
        """Return the symmetric square times a vector for each layer, as `Sums.times`; likewise."""
        return self._ask(("times", x))

    def norm(self, *, square: bool = False) -> float:
        """Return the Frobenius norm, as `Sums.norm`; likewise."""
        return float(np.sqrt(self._ask(("norm", square))[0]))

    @contextmanager
    def asking(self) -> Iterator[None]:
        """On rank 0: within the block `pick` and `norm` ask the other ranks, which are in `serve`."""
        try:
            yield
        finally:
            self.team.broadcast(None)

    def serve(self) -> None:
        """On the other ranks: answer until rank 0 is through."""
        failed: Exception | None = None
        while (question := self.team.broadcast()) is not None:
            try:
                self._answer(question)
            except Exception as error:  # noqa: BLE001  (raised once rank 0 has heard of it)
                failed = error
        if failed is not None:
            raise failed

    def _ask(self, question: tuple[Any, ...]) -> np.ndarray:
        self.team.broadcast(question)
        return self._answer(question)

    def _answer(self, question: tuple[Any, ...]) -> np.ndarray:
        panels = self.total
        found = np.zeros(0)
        with self.team.together():
            if question[0] == "pick":
                found = pick(panels.blocks(), self.frame, question[1], question[2])
            elif question[0] == "diagonal":
                found = panels.diagonal(self.frame)
            elif question[0] == "times":
                found = panels.times(self.frame, question[1])
            else:
                found = np.array([panels.squares(self.frame, square=question[1])])
        return self.team.total(found)

    def whole(self, part: str = TOTAL) -> np.ndarray | None:
        """Return the Gram, or a part of it, (layers, rows, columns), on rank 0 and None elsewhere.

        Memory: on rank 0 the whole Gram and one rectangle of it.
        """
        panels = self.panels(part)
        rows, columns = ((stop - start) * self.frame.width for start, stop in (self.frame.rows, self.frame.columns))
        with self.team.together():
            mine = list(panels.blocks())
            K = np.full((self.frame.layers, rows, columns), np.nan) if self.team.root else None
        places = self.team.exchange([(block.rows, block.columns) for block in mine])
        try:
            self._gather(mine, places, K)
        except Exception as error:  # noqa: BLE001  (the others wait for blocks)
            self.team.abort(error)
        return K

    def _gather(self, mine: list[Block], places: Sequence[Any], K: np.ndarray | None) -> None:
        """Send this rank's blocks to rank 0, or receive all others' there, one at a time."""
        if K is None:
            for block in mine:
                values = torch.from_numpy(np.ascontiguousarray(block.values))
                self._complete(self.team.send(values.view(-1).view(torch.uint8), 0, 0))
            return
        paste(mine, self.frame, K)
        for rank in range(1, self.team.size):
            for rows, columns in places[rank]:
                values = torch.empty(len(K), rows[1] - rows[0], columns[1] - columns[0], dtype=torch.float64)
                self._complete(self.team.receive(values.view(-1).view(torch.uint8), rank, 0))
                paste([Block(TOTAL, rows, columns, values.numpy())], self.frame, K)

    def _complete(self, request: Any) -> None:
        self.team.wait(lambda: self.team.done(request))
