"""Append-only result lines, each with what is needed to read it years later."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers

from ntkengine.cluster.launch import launcher_rank

_HERE = Path(__file__).parent
RESULTS = Path(os.environ.get("OUT") or _HERE / "results")


def record(name: str, config: dict[str, Any], values: dict[str, Any], *, gpu: bool = False) -> dict[str, Any]:
    """Append one line to NAME.jsonl in bench/results, or in the folder $OUT names, and return it.

    Under an MPI launcher only rank 0 writes.

    Args:
        name: the benchmark.
        config: shapes, dtypes, settings: what the numbers are of.
        values: figures; units in their names.
        gpu: they were measured on the GPU.
    """
    commit = _git("rev-parse", "--short", "HEAD")
    dirty = _git("status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)bench/results")
    line = {
        "name": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit + ("+" if dirty else ""),
        "config": config,
        "config_hash": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12],
        "device": torch.cuda.get_device_name() if gpu else f"{_processor()}, {torch.get_num_threads()} threads",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "triton": _version("triton"),
            "cuda": torch.version.cuda,
        },
        **values,
    }
    if launcher_rank():
        return line
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    return line


def lines(name: str) -> list[dict[str, Any]]:
    """Return the lines on record of a benchmark, oldest first."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def latest(name: str) -> list[dict[str, Any]]:
    """Return the latest line of every configuration on record, in the order of their first."""
    return list({line["config_hash"]: line for line in lines(name)}.values())


def _git(*command: str) -> str:
    """Return what git prints; nothing where there is no git, or no repository."""
    try:
        done = subprocess.run(["git", *command], cwd=_HERE, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.processor())
