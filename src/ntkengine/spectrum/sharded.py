"""A Gram in row panels over several processes: one of them solves, all of them multiply.

Shapes: N rows, n rows of this rank, k columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from ntkengine.errors import InputError
from ntkengine.spectrum.checks import check_stored
from ntkengine.spectrum.operators import GramOperator

Result = TypeVar("Result")


class ShardedOperator(GramOperator):
    """A symmetric matrix whose rows lie on the ranks of a communicator, one after the other.

    Products are collective: every rank must take part in each. Solvers decide by floating-point comparisons, which
    ranks on unlike machines may not decide alike; so `solve` runs the solver on rank 0 alone, where the others wait for
    vectors to multiply, and gives its result to all.

    Args:
        panel: (n, N) rows of this rank; numpy, a memory map, or anything with `shape`, `@` and slices.
        comm: a communicator with mpi4py's `Get_rank`, `allgather`, `bcast`, `Bcast` and `Allgatherv`.
        noise: of K in the spectral norm; the largest that any rank gives.

    Attributes:
        comm: the communicator.
        start: first row of this rank.

    Raises:
        InputError: on every rank: panels that do not make up a square matrix, entries that are not finite.

    Cost: 2nNk flops a product, one broadcast and one gathering of N·k numbers.
    """

    def __init__(self, panel: Any, comm: Any, noise: float = 0.0) -> None:
        self.panel, self.comm = panel, comm
        shape = tuple(getattr(panel, "shape", ()))
        known = isinstance(noise, int | float) and noise >= 0
        try:  # every rank must reach the gathering
            check_stored("panel", panel)
            bad = not known or not np.isfinite(np.asarray(panel)).all()
        except InputError:
            bad = True
        found = comm.allgather((shape, bad, float(noise) if known else 0.0))
        counts = [s[0] if s else 0 for s, _, _ in found]
        rows = sum(counts)
        for rank, (theirs, wrong, _) in enumerate(found):
            if wrong or len(theirs) != 2 or theirs[1] != rows:
                raise InputError(
                    f"panel: expected finite rows of a {rows} x {rows} matrix and a noise >= 0, rank {rank} has "
                    f"shape {theirs}"
                )
        self._counts = np.array(counts)
        self.start = sum(counts[: comm.Get_rank()])
        super().__init__(rows, max(n for _, _, n in found), block=8)

    def product(self, X: np.ndarray) -> np.ndarray:
        """Return K X on every rank, of the X that rank 0 has."""
        serving = self.comm.bcast(X.shape if self.comm.Get_rank() == 0 else None, root=0)
        return self._multiply(np.ascontiguousarray(X), serving[1])

    def solve(self, solver: Callable[[ShardedOperator], Result]) -> Result:
        """Return `solver(self)`, run on rank 0 and given to every rank; what it raises is raised on every rank.

        Args:
            solver: takes the operator, returns something that can be pickled; only rank 0 calls it.
        """
        if self.comm.Get_rank():
            while (shape := self.comm.bcast(None, root=0)) is not None:
                self._multiply(np.empty(shape), shape[1])
            error, result = self.comm.bcast(None, root=0)
        else:
            error, result = None, None
            try:
                result = solver(self)
            except Exception as caught:  # every rank has to hear of it
                error = caught
            self.comm.bcast(None, root=0)
            self.comm.bcast((error, result), root=0)
        if error is not None:
            raise error
        return result

    def _multiply(self, X: np.ndarray, k: int) -> np.ndarray:
        self.comm.Bcast(X, root=0)
        mine = np.ascontiguousarray(self.panel @ X, dtype=np.float64)
        Y = np.empty((self.shape[0], k))
        self.comm.Allgatherv(mine, [Y, self._counts * k])
        return Y
