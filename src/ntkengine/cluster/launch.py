"""What an MPI launcher says of the processes it started, and how they behave: rank 0 speaks, one error ends all."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ntkengine.errors import InputError, Stopped

if TYPE_CHECKING:
    from ntkengine.cluster.comm import Team

# Hydra's and Slurm's PMI, Open MPI, PMIx, MVAPICH.
_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "MV2_COMM_WORLD_RANK")
_SLURM = "SLURM_STEP_NUM_TASKS"
_SPEAK_S = 5.0  # rank 0 has spoken by then: ranks start within that of each other


def launcher_rank() -> int | None:
    """Return the rank a launcher gave this process, None without one."""
    names = (*_RANKS, "SLURM_PROCID") if _number(_SLURM) > 1 else _RANKS
    return next((_number(name) for name in names if os.environ.get(name, "").isdigit()), None)


def launched() -> Team | None:
    """Return the team of the processes that an MPI launcher started; None where this is the only one.

    Raises:
        InputError: a launcher started several, but mpi4py is missing, or has loaded the library of another launcher.
    """
    if "mpi4py.MPI" not in sys.modules and launcher_rank() is None:
        return None
    from ntkengine.cluster.comm import team_of
    from ntkengine.cluster.library import world

    count = max(_number(name) for name in (*_SIZES, _SLURM))
    try:
        comm, name = world()
    except (ImportError, RuntimeError) as error:
        if count == 1:
            return None
        msg = f"started by an MPI launcher, but mpi4py cannot be used ({str(error).splitlines()[0]}); "
        raise InputError(msg + "pip install mpi4py mpich") from error
    except InputError as error:
        _after_rank_0(error)
        raise
    if count > comm.Get_size():
        msg = (
            f"the launcher started {count} processes, but {name}, which mpi4py has loaded, sees {comm.Get_size()}: use "
            f"{name}'s own mpirun, or name the launcher's library in MPI4PY_LIBMPI"
        )
        raise InputError(msg)
    return team_of(comm)


@contextmanager
def one_voice(team: Team | None, log_dir: Path | None) -> Iterator[None]:
    """Within the block only rank 0 prints, and an error ends all ranks.

    What all ranks have heard of is raised on all, after MPI was shut down in order, so that the launcher has nothing to
    add; anything else ends them at once with one line.

    Args:
        team: the ranks; None: nothing is done.
        log_dir: where each other rank's output goes, to `rank-<n>.log`; None: nowhere.
    """
    if team is None:
        yield
        return
    spoken = os.dup(2)  # the line of a rank that ends all comes through
    if not team.root:
        _redirect(os.devnull if log_dir is None else log_dir / f"rank-{team.rank}.log")
    try:
        yield
    except (Exception, Stopped) as error:
        # A stop is told once more where its checkpoints are left.
        if not any(e is team.agreed for e in _chain(error)):
            team.abort(error, lambda line: _line(spoken, line))
        team.leave()
        raise
    except KeyboardInterrupt:
        os._exit(130)  # the launcher has told all of them
    finally:
        os.close(spoken)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, and what it was raised from: a job within a job tells a stop once more each."""
    while error is not None:
        yield error
        error = error.__cause__


def _redirect(where: str | Path) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    handle = os.open(where, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


def _line(handle: int, line: str) -> None:
    os.write(handle, f"{line}\n".encode())


def _after_rank_0(error: InputError) -> None:
    """Let rank 0 speak: prterun ends all ranks when the first exits. Where it does not come to that, speak here."""
    if launcher_rank():
        time.sleep(_SPEAK_S)
        print(f"error: {error}", file=sys.stderr, flush=True)


def _number(name: str) -> int:
    found = os.environ.get(name, "")
    return int(found) if found.isdigit() else 0
