"""The processes of a job and their agreement; mpi4py is imported when a communicator is asked for.

Nothing here may differ between ranks but by its return value: every rank makes the same calls in the same order, and
what fails on one rank is raised on all of them at the next call that they make together.
"""

from __future__ import annotations

import functools
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from ntkengine.errors import CheckFailed, InputError, NonFinite, RankFailed

_TOLD: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (InputError, NotImplementedError, CheckFailed, NonFinite)
}
_SPIN_S = 2e-4  # a wait looks again and again for so long, then naps: ranks may share cores
_NAP_S = 1e-4

Told = tuple[str, str, str]


class Team:
    """The ranks of one job.

    Args:
        comm: an mpi4py communicator of more than one process; a duplicate of it is used.

    Attributes:
        rank: of this process.
        size: R.
        host: its name.
        local: its number among the processes of this host.
        near: how many these are.
        waited: seconds spent in MPI calls that had to wait.
        sent: bytes sent by `send`.
        agreed: the last error that was raised on all ranks.
    """

    def __init__(self, comm: Any) -> None:
        from mpi4py import MPI

        self._mpi, self._comm = MPI, comm.Dup()
        self.rank, self.size = int(comm.Get_rank()), int(comm.Get_size())
        self.host = socket.gethostname()
        near = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.local, self.near = int(near.Get_rank()), int(near.Get_size())
        near.Free()
        self.waited, self.sent = 0.0, 0
        self.agreed: BaseException | None = None

    @property
    def root(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """This rank's GPU, by its number on its host; several ranks share one where there are fewer."""
        count = torch.cuda.device_count()
        return torch.device("cuda", self.local % count) if count else torch.device("cpu")

    def agree(self, error: BaseException | None = None, value: Any = None) -> list[Any]:
        """Return every rank's value; what failed on any rank is raised on all.

        Every call that ranks make together begins with this one, so that a rank that fails is heard wherever the
        others are.

        Args:
            error: what went wrong on this rank since they last agreed, or None.
            value: for the others, plain Python.

        Raises:
            Exception: this rank's own error where all ranks have the same; else one of its kind (`RankFailed` for what
                is not this package's) that names the first rank that failed, its host, and the reason.
        """
        start = time.perf_counter()
        request = self._comm.Ibarrier()  # a collective call would hold a core while it waits
        while not request.Test():
            if time.perf_counter() - start > _SPIN_S:
                time.sleep(_NAP_S)
        found = self._comm.allgather((None if error is None else (*_told(error), self.host), value))
        self.waited += time.perf_counter() - start
        told = [t for t, _ in found]
        if all(t is None for t in told):
            return [v for _, v in found]
        if error is not None and len({t and t[:2] for t in told}) == 1:
            self.agreed = error
            raise error
        rank, (name, reason, stack, host) = next((r, t) for r, t in enumerate(told) if t is not None)
        if name in _TOLD:
            self.agreed = _TOLD[name](f"rank {rank} ({host}): {reason}")
        else:
            self.agreed = RankFailed(f"rank {rank} ({host}): {name}: {reason}", rank, stack)
        raise self.agreed from error

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within the block each rank works alone; what failed on any of them is raised on all at its end."""
        try:
            yield
        except Exception as error:
            if error is self.agreed:  # every rank has heard of it
                raise
            self.agree(error)
        else:
            self.agree()

    def exchange(self, value: Any) -> list[Any]:
        """Return every rank's value, plain Python."""
        return self.agree(None, value)

    def broadcast(self, value: Any = None) -> Any:
        """Return rank 0's value, plain Python."""
        return self.agree(None, value if self.root else None)[0]

    def total(self, array: np.ndarray) -> np.ndarray:
        """Return the sum over ranks, on every rank."""
        self.agree()
        start = time.perf_counter()
        given, found = np.ascontiguousarray(array), np.empty_like(array, order="C")
        self._comm.Allreduce(given, found)
        self.waited += time.perf_counter() - start
        return found

    def same(self, told: Mapping[str, Any], advice: str, kind: type[Exception] = InputError) -> None:
        """Refuse what is not the same on all ranks.

        Args:
            told: plain Python by name, compared by equality.
            advice: what should be done.
            kind: of the error.

        Raises:
            Exception: of that kind, naming the first rank and item that differ from rank 0's.
        """
        found = self.exchange(dict(told))
        for rank, theirs in enumerate(found):
            for name, value in found[0].items():
                if theirs.get(name) != value:
                    self.agreed = kind(f"{name}: rank {rank} has another than rank 0; {advice}")
                    raise self.agreed

    def send(self, buffer: torch.Tensor, to: int, tag: int) -> Any:
        """Start sending a flat uint8 tensor and return the request; the buffer stays as it is until that is done."""
        self.sent += buffer.numel()
        return self._comm.Isend(self._spec(buffer), to, tag)

    def receive(self, buffer: torch.Tensor, source: int, tag: int) -> Any:
        """Start receiving into a flat uint8 tensor and return the request."""
        return self._comm.Irecv(self._spec(buffer), source, tag)

    def done(self, request: Any) -> bool:
        """Return whether a request is complete; lets MPI go on with all others."""
        return bool(request.Test())

    def wait(self, ready: Callable[[], bool]) -> None:
        """Call `ready()` until it is true; the time counts as waiting."""
        start = time.perf_counter()
        while not ready():
            if time.perf_counter() - start > _SPIN_S:
                time.sleep(_NAP_S)
        self.waited += time.perf_counter() - start

    def abort(self, error: BaseException, speak: Callable[[str], None] | None = None) -> None:
        """End all ranks: what failed here cannot be told at a place where they meet.

        Args:
            error: what failed.
            speak: prints a line; default to standard error.
        """
        say = speak or (lambda line: print(line, file=sys.stderr, flush=True))
        say(f"error: rank {self.rank} ({self.host}): {type(error).__name__}: {error}")
        self._comm.Abort(1)

    def broken(self, error: BaseException) -> bool:
        """Return whether it is MPI that failed."""
        return isinstance(error, self._mpi.Exception)

    def free(self) -> None:
        """Give the duplicate back."""
        self._comm.Free()

    def leave(self) -> None:
        """Wait for all ranks and shut MPI down: an exit code other than 0 then ends no rank before it has spoken."""
        self._comm.Barrier()
        self._mpi.Finalize()

    def _spec(self, buffer: torch.Tensor) -> list[Any]:
        kind = self._mpi.BYTE
        if buffer.numel() % 8 == 0:  # counts may end at 2³¹
            buffer, kind = buffer.view(torch.int64), self._mpi.INT64_T
        return [buffer.numpy() if buffer.device.type == "cpu" else buffer, kind]


def together(team: Team | None) -> AbstractContextManager[None]:
    """Return `team.together()`, or for a process alone a context that does nothing."""
    return nullcontext() if team is None else team.together()


def team_of(comm: Any) -> Team | None:
    """Return the team of a communicator, None for none or one of a single process.

    Raises:
        InputError: not a communicator.
    """
    if comm is None or isinstance(comm, Team):
        return comm
    if not hasattr(comm, "Get_size") or not hasattr(comm, "Dup"):
        msg = f"comm: expected an mpi4py communicator or None, got {type(comm).__name__}"
        raise InputError(msg)
    if comm.Get_size() == 1:
        return None
    key = _key()
    found: Team | None = comm.Get_attr(key)
    if found is None:  # a communicator's team lives as long as it: MPI has a limited number of them
        found = Team(comm)
        comm.Set_attr(key, found)
    return found


@functools.cache
def _key() -> int:
    """Return the attribute under which a communicator keeps its team."""
    from mpi4py import MPI

    return int(MPI.Comm.Create_keyval(delete_fn=lambda _comm, _key, team: team.free()))


def _told(error: BaseException) -> Told:
    lines = traceback.format_exception(error)
    return type(error).__name__, str(error) or "no reason given", "".join(lines)
