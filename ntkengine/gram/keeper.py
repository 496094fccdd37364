"""Who is told of a sweep's sums as they grow."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ntkengine.gram.run import Sums


class Keeper:
    """Nobody: these sums are not written down. `gram.checkpoint` has those that are."""

    def start(self, sums: Sums) -> None:
        """Put what was summed before into empty sums: the parameters in `sums.done` are not contracted again."""

    def passing(self, sums: Sums) -> None:
        """Note that a microbatch has passed.

        Raises:
            Stopped: the job was asked to stop; the sums are written down.
        """

    def step(self, sums: Sums) -> None:
        """Note that a parameter has been added.

        Raises:
            Stopped: as `passing`.
        """

    def finish(self, sums: Sums) -> None:
        """Note that all parameters are in."""

    def waits(self) -> AbstractContextManager[None]:
        """Return what the sweep runs in: a signal to stop waits for `passing` or `step`."""
        return nullcontext()
