"""Fresh processes, so that peak memory is a job's own, and what was taken above what was there before."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class FailedError(Exception):
    """A process gave no result; the message says why in one line, `output` holds what it printed."""

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output


def fresh(
    module: str,
    *arguments: str,
    python: str | Path = sys.executable,
    launcher: Sequence[str] = (),
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    limit_s: float | None = None,
) -> dict[str, Any]:
    """Run `python -m module arguments`; return the JSON object on the last line it prints.

    Args:
        module: one with a `__main__` part.
        arguments: its own.
        python: interpreter.
        launcher: before the interpreter: an MPI launcher.
        options: of the interpreter.
        environment: variables over this process's own.
        limit_s: seconds; then it is killed.

    Raises:
        FailedError: it ended otherwise, or was killed.
    """
    command = [*launcher, str(python), *options, "-m", module, *arguments]
    folders = (str(ROOT / folder) for folder in (".", "src", "kernels"))
    path = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "PYTHONPATH": path, **(environment or {})}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables, timeout=limit_s)
    except subprocess.TimeoutExpired:
        msg = f"not done after {limit_s:g} s"
        raise FailedError(msg) from None
    if done.returncode < 0:
        msg = f"killed by signal {-done.returncode}" + (", most likely for memory" if done.returncode == -9 else "")
        raise FailedError(msg, done.stderr)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise FailedError(said[-1].strip() if said else f"exit status {done.returncode}", done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


class Memory:
    """`with Memory() as memory: ...`; then `memory.gib` is the peak above what this process held before, in GiB."""

    gib = float("nan")

    def __enter__(self) -> Memory:
        """Give back what is free, and let the peak count from here."""
        ctypes.CDLL(None).malloc_trim(0)
        self._before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return self

    def __exit__(self, *_: object) -> None:
        """Read the peak."""
        self.gib = status("VmHWM") - self._before


def status(key: str) -> float:
    """Return a figure of this process's memory (VmRSS, VmHWM) in GiB."""
    line = next(x for x in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if x.startswith(key))
    return int(line.split()[1]) / 2**20


if __name__ == "__main__":
    print(json.dumps({"peak_gib": status("VmHWM")}))  # of a process that does nothing
