"""What there is of a file that is not complete: the folder `.<name>.parts/` beside it.

lock                      held by the process at work (flock: a killed process holds nothing), with its pid and host
progress.json             how far it is, for `ntkengine info`
rank-0000-of-0001.a, .b   alternating checkpoints of a rank (`store.checkpoints`)
rank-0000-of-0001.tile-…  its finished tiles, when the job has several
sharded/                  shards of the whole file, and the whole once all of them are there (`store.placing`)
damaged.h5                a complete file some tiles of which were damaged and are to be recomputed
*.partial                 being written; removed when another process takes over
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ntkengine.errors import InputError
from ntkengine.textfile import parse_json, reason_of

log = logging.getLogger(__name__)

_MOST = 1e30  # no number of seconds or of flops is larger
_SEEN_S = 30.0  # file systems on a network show a new folder late


class Folder:
    """A Gram file's folder of parts, with this process alone at work in it.

    Args:
        out: the Gram file's name.

    Attributes:
        mark: what the lock holds while this process has it, unlike any other; empty where it could not be written.
    """

    def __init__(self, out: Path) -> None:
        self.out = followed(out)
        self.path = parts_of(out)
        self._lock: int | None = None
        self.mark = ""

    def __enter__(self) -> Folder:
        """Take the lock, and remove what a killed process left half-written.

        Raises:
            InputError: another process is at work.
            OSError: the folder cannot be made.
        """
        while self._lock is None:
            self.path.mkdir(exist_ok=True)
            try:
                handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:  # its owner has just finished and removed the folder
                continue
            try:
                self._take(handle)
            except BaseException:
                os.close(handle)
                raise
            with suppress(FileNotFoundError):
                if os.fstat(handle).st_ino == (self.path / "lock").stat().st_ino:
                    self._lock = handle
                    break
            os.close(handle)  # its owner has just finished and removed it
        text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()})
        with suppress(OSError):  # a full disk: only the message to a second process gets shorter
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, text.encode(), 0)
            self.mark = text
        for stale in self.path.glob("*.partial"):
            stale.unlink()
        self._drop_shards()
        return self

    def __exit__(self, *_: object) -> None:
        """Let go; a folder without work in it is removed."""
        if self._lock is None:
            return
        self._drop_shards()
        kept = [p for p in self.path.iterdir() if p.name not in ("lock", "progress.json")]
        if not kept:
            self.remove()
        else:
            os.close(self._lock)
            self._lock = None

    @property
    def partial(self) -> Path:
        """Name of the whole file until it is complete."""
        return self.path / f"{self.out.name}.partial"

    @property
    def damaged(self) -> Path:
        """Name of a file some tiles of which are to be recomputed."""
        return self.path / "damaged.h5"

    def clear(self) -> None:
        """Remove all work but the lock."""
        for item in self.path.iterdir():
            if item.name != "lock":
                shutil.rmtree(item) if item.is_dir() else item.unlink()

    def remove(self) -> None:
        """Remove the folder: its work is in the complete file."""
        self.clear()
        (self.path / "lock").unlink(missing_ok=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        with suppress(OSError):  # somebody waiting has made a new lock in it
            self.path.rmdir()

    def shows(self, mark: str) -> bool:
        """Return whether the folder of another process, which holds it, is this one; a network may take a while.

        Args:
            mark: that process's.
        """
        until = time.monotonic() + _SEEN_S
        while mark:
            with suppress(OSError):
                if (self.path / "lock").read_text() == mark:
                    break
            if time.monotonic() > until:
                return False
            time.sleep(0.1)
        return True

    def tell(self, progress: dict[str, Any]) -> None:
        """Write how far the job is; a disk that refuses is no reason to stop."""
        told = {"pid": os.getpid(), "host": socket.gethostname(), "at": time.time()} | progress
        with suppress(OSError):
            partial = self.path / "progress.json.partial"
            partial.write_text(json.dumps(told))
            partial.replace(self.path / "progress.json")

    def _busy(self) -> bool:
        """Return whether another process is at work, as far as files tell."""
        found = read_progress(self.out) or {}
        if found.get("running") is None:  # on another host; it speaks up every two seconds while it sums
            return time.time() - float(found.get("at", 0.0)) < _SEEN_S
        return bool(found["running"]) and found.get("pid") != os.getpid()

    def _drop_shards(self) -> None:
        """Remove shards that never became a whole."""
        if not staged(self.out).is_file():
            shutil.rmtree(staged(self.out).parent, ignore_errors=True)

    def _take(self, handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES) and not self._busy():
                log.warning("%s: no locks on this file system (%s): start one job at a time", self.path, error.strerror)
                return
            msg = f"out: {self.out} is being computed by {_owner(self.path)}; wait for it or choose another name"
            raise InputError(msg) from error


def parts_of(out: Path) -> Path:
    """Return the folder of a Gram file's parts."""
    out = followed(out)
    return out.with_name(f".{out.name}.parts")


def followed(out: Path) -> Path:
    """Return the file that a symbolic link stands for, or else the name itself: a file has one folder of parts."""
    if not out.is_symlink():
        return out
    try:
        return out.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise InputError(f"{out}: is a link that leads nowhere ({reason_of(error)})") from error


def staged(out: Path) -> Path:
    """Return where a sharded Gram file is, with its shards beside it, until it has its name."""
    return parts_of(out) / "sharded" / followed(out).name


def going_on(out: str | Path) -> str:
    """Return what a job that was cut short has to go on from, as words."""
    kept = any(parts_of(Path(out)).glob("rank-*"))
    return f"the same command {'goes on from its last checkpoint' if kept else 'starts anew'}"


def read_progress(out: str | Path) -> dict[str, Any] | None:
    """Return what an unfinished job last said of itself, or None when there is none.

    Without any lock. Besides what the job wrote (`done`, `total`: flops; `stage`, `pid`, `host`, `started`, `at`:
    seconds since 1970): `running`, True or False, None when it ran on another machine; `checkpoint`: the time of
    the newest checkpoint, or None; and `damaged`: whether it is a complete file whose damaged tiles are open.
    """
    parts = parts_of(Path(out))
    found = _told(parts / "progress.json")
    if found is None:
        if not parts.is_dir():
            return None
        found = {}
    here = found.get("host", socket.gethostname()) == socket.gethostname()
    found["running"] = isinstance(found.get("pid"), int) and _alive(found["pid"]) if here else None
    times = []
    for item in parts.glob("rank-*"):
        with suppress(OSError):
            times.append(item.stat().st_mtime)
    return found | {"checkpoint": max(times, default=None), "damaged": (parts / "damaged.h5").is_file()}


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _owner(parts: Path) -> str:
    found = _told(parts / "lock")
    return "another process" if not found else f"process {found['pid']} on {found['host']}"


def _told(path: Path) -> dict[str, Any] | None:
    """Return what a process wrote of itself; None where that cannot be read."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"), path, dict, "an object")
    except (OSError, ValueError):
        return None
    fine = all(isinstance(found.get(name, ""), str) for name in ("host", "stage"))
    for name in ("pid", "done", "total", "started", "at", "since"):
        fine &= type(found.get(name, 0)) in (int, float) and abs(found.get(name, 0)) < _MOST
    whole = type(found.get("pid")) is int and 0 < found["pid"] < 1 << 31 and "host" in found
    return found if fine and whole else None
