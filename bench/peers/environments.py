"""An environment for a peer whose packages the main one has not: `.venv-peers/NAME`, which sees the main one's too."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from bench.fresh import ROOT, FailedError
from bench.peers import Peer

LIMIT_S = 900.0


def interpreter(peer: Peer, folder: Path = ROOT / ".venv-peers") -> Path:
    """Return the interpreter to run a peer with; its environment is made where it is not there yet.

    Packages are installed without their dependencies: the requirements name all that the main environment has not.

    Raises:
        FailedError: they cannot be installed.
    """
    if not peer.package or find_spec(peer.package) is not None:
        return Path(sys.executable)
    wanted = (Path(__file__).parent / peer.requirements).read_text()
    where = folder / peer.package
    python, stamp = where / "bin" / "python", where / "installed.txt"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    _run([sys.executable, "-m", "venv", "--clear", str(where)])
    shared = sysconfig.get_path("purelib", vars={"base": str(where)})
    (Path(shared) / "main.pth").write_text(sysconfig.get_path("purelib") + "\n")
    files = ["-r", str(Path(__file__).parent / peer.requirements)]
    _run([str(python), "-m", "pip", "install", "--quiet", "--no-deps", *files])
    stamp.write_text(wanted)
    return python


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        msg = f"not installed after {LIMIT_S:g} s"
        raise FailedError(msg) from None
    if done.returncode:
        errors = [x for x in (done.stderr + done.stdout).splitlines() if x.startswith("ERROR")]
        msg = f"not installed: {errors[-1] if errors else f'exit status {done.returncode}'}"
        raise FailedError(msg, done.stderr)
