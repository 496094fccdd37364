"""What there is of MPI: its library, whether mpi4py finds it, and whether the launcher in the path is its own."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys

_GET = "pip install mpi4py mpich"
# Asked in a process of its own: a library that is damaged, or set up for a cluster, may end or stop whoever loads it.
_ASK = (
    "import mpi4py; mpi4py.rc.initialize = False\n"
    "from mpi4py import MPI\n"
    "print(MPI.get_vendor()[0]); print(MPI.Get_library_version().split(chr(10))[0])"
)
_TIMEOUT_S = 60.0
_LAUNCHERS = {"MPICH": "mpiexec.hydra", "Open MPI": "prterun"}
_STARTED = ("PMI_", "PMIX_", "OMPI_", "MV2_", "HYDI_")

Found = tuple[str, str, str, str, str]


def examine_mpi() -> list[Found]:
    """Return (name, state, found, note, fix) of mpi4py with its library, and of the launcher."""
    try:
        version = importlib.metadata.version("mpi4py")
    except importlib.metadata.PackageNotFoundError:
        return [("mpi4py", "missing", "", "runs over several processes", _GET)]
    code, told = _output([sys.executable, "-c", _ASK])
    lines = told.splitlines()
    if code or len(lines) < 2:
        why = lines[-1] if lines else f"exit code {code}"
        return [("mpi4py", "problem", version, f"finds no MPI library: {why}", _GET)]
    vendor = lines[0]
    about = " ".join(lines[1].replace("\t", " ").split()).rstrip(":")
    found: list[Found] = [
        ("mpi4py", "ok", version, f"has loaded {about if vendor in about else f'{vendor}, {about}'}", "")
    ]
    return [*found, _launcher(vendor)]


def _launcher(vendor: str) -> Found:
    path = shutil.which("mpirun")
    if path is None:
        return ("mpirun", "missing", "", "starts the processes of a job", _GET)
    flavour = _flavour(_output([path, "--version"])[1])
    own = _LAUNCHERS.get(vendor, "")
    if not flavour or flavour == vendor or not own:
        return ("mpirun", "ok", path, f"of {flavour or 'unknown flavour'}", "")
    note = f"of {flavour}, but mpi4py has loaded {vendor}: each process would be alone"
    return ("mpirun", "problem", path, note, f"{own} -n 2 python -m mpi4py -m ntkengine gram job.toml")


def _flavour(told: str) -> str:
    low = told.lower()
    if "open mpi" in low or "openmpi" in low or "prte" in low or "open-mpi" in low:
        return "Open MPI"
    return "MPICH" if "hydra" in low or "mpich" in low else ""


def _output(command: list[str]) -> tuple[int, str]:
    """Return a command's exit code and what it printed, as a process that no launcher has started."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(_STARTED)}
    try:
        done = subprocess.run(
            command,
            env=clean,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    return done.returncode, (done.stdout or done.stderr).strip()
