"""The memory that a process can still take, on the host or on a GPU."""

from __future__ import annotations

from pathlib import Path

import torch

from ntkengine.cluster.comm import Team

_MEMINFO, _SELF, _GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_CACHED = ("active_file", "inactive_file", "total_active_file", "total_inactive_file")  # given up when memory is short


def free_bytes(device: torch.device, team: Team | None = None) -> float:
    """Return the bytes that a process can still take where a job runs; infinity where the system does not tell.

    Args:
        device: where the job runs.
        team: the ranks that share the job: those of one host, or of one of its GPUs, get equal shares.
    """
    sharing = 1 if team is None else team.near
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(free) / -(-sharing // max(1, torch.cuda.device_count()))
    return min(_available(), _left_to_group()) / sharing if device.type == "cpu" else float("inf")


def _available() -> float:
    """Return what the system says is available."""
    try:
        return 1024 * _fields(_MEMINFO)["MemAvailable:"]
    except (OSError, ValueError, KeyError):
        return float("inf")


def _left_to_group() -> float:
    """Return what is left to the process's control groups: a container's, or a scheduler's for its job."""
    left = float("inf")
    try:
        lines = _SELF.read_text(encoding="ascii").splitlines()
    except OSError:
        return left
    for line in lines:
        _, controllers, where = line.split(":", 2)
        if not controllers:
            root, limit, used = _GROUPS, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, used = _GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = root / where.strip("/")
        for folder in (group, *group.parents):
            left = min(left, _left(folder, limit, used))
            if folder == root:
                break
    return left


def _left(folder: Path, limit: str, used: str) -> float:
    """Return what one group may still take; infinity where it has no limit, or cannot be seen."""
    try:
        bound = float((folder / limit).read_text(encoding="ascii").replace("max", "inf"))
        taken = float((folder / used).read_text(encoding="ascii"))
        stat = _fields(folder / "memory.stat")
    except (OSError, ValueError):
        return float("inf")
    sums = [sum(stat.get(name, 0.0) for name in names) for names in (_CACHED[:2], _CACHED[2:])]
    return max(0.0, bound - taken + max(sums))  # version 1 tells both of the group alone and of all below it


def _fields(path: Path) -> dict[str, float]:
    """Return a file's numbers by the word before them."""
    return {words[0]: float(words[1]) for words in map(str.split, path.read_text(encoding="ascii").splitlines())}
