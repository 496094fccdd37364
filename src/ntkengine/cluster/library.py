"""The MPI library that mpi4py has loaded: how it is started, and whether it takes GPU memory."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

from ntkengine.errors import InputError

_QUERIES = ("MPIX_Query_cuda_support",)  # Open MPI, MPICH
_PROMISES = ("MPICH_GPU_SUPPORT_ENABLED",)  # Cray MPICH


def world() -> tuple[Any, str]:
    """Return MPI's communicator of all processes, and the name of the library.

    Raises:
        InputError: started over PMIx, which an MPICH built without it answers by ending the process.
        ImportError, RuntimeError: no mpi4py, or no library for it.
    """
    if "mpi4py.MPI" not in sys.modules and "PMIX_RANK" in os.environ and "PMI_RANK" not in os.environ:
        _start_over_pmix()
    from mpi4py import MPI

    return MPI.COMM_WORLD, str(MPI.get_vendor()[0])


def _start_over_pmix() -> None:
    import mpi4py

    mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
    from mpi4py import MPI

    if MPI.get_vendor()[0] == "MPICH" and "pmix" not in MPI.Get_library_version().lower():
        msg = (
            "started over PMIx, as by Open MPI's mpirun, but mpi4py has loaded an MPICH that was built without it: use "
            "MPICH's own mpiexec.hydra (on Slurm srun --mpi=pmi2), or name the launcher's library in MPI4PY_LIBMPI"
        )
        raise InputError(msg)
    MPI.Init_thread()


def says_device() -> bool:
    """Return whether the MPI library says that it reads and writes GPU memory."""
    if any(os.environ.get(name) == "1" for name in _PROMISES):
        return True
    from mpi4py import MPI

    for library in (MPI.__file__, None):
        try:
            handle = ctypes.CDLL(library)
        except OSError:
            continue
        for name in _QUERIES:
            if hasattr(handle, name):
                return bool(getattr(handle, name)())
    return False
