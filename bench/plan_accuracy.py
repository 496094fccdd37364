"""What the plan says a job takes, in time and memory, against what it takes: eight jobs, each in a fresh process."""

from __future__ import annotations

from typing import Any

from bench.planned import measured
from bench.record import record

JOBS: dict[str, dict[str, Any]] = {
    "bert all": {"model": "bert", "N": 64, "T": 32, "params": "all"},
    "bert lora": {"model": "bert", "N": 512, "T": 32, "lora": True},
    "bert all, bounded": {"model": "bert", "N": 192, "T": 32, "params": "all", "memory_gib": 0.5},
    "bert lora, bounded": {"model": "bert", "N": 1024, "T": 32, "lora": True, "memory_gib": 0.25},
    "bert all, 8 outputs": {"model": "bert", "N": 64, "T": 32, "C": 8, "params": "all"},
    "bert all, 8 outputs, bounded": {"model": "bert", "N": 64, "T": 32, "C": 8, "params": "all", "memory_gib": 0.6},
    "llama all, full": {"model": "llama", "N": 48, "T": 48, "params": "all", "contraction": "full"},
    "llama fast": {"model": "llama", "N": 128, "T": 64, "params": "all", "precision": "fast"},
}


def main() -> int:
    """Run every job, print the table, and record a line each."""
    print(f"{'job':28} {'planned s':>10} {'took s':>8} {'ratio':>6} {'planned GiB':>12} {'took GiB':>9} {'ratio':>6}")
    for name, job in JOBS.items():
        found = measured(job)
        print(
            f"{name:28} {found['planned_seconds']:10.2f} {found['seconds']:8.2f} {found['seconds_ratio']:6.2f} "
            f"{found['planned_gib']:12.3f} {found['gib']:9.3f} {found['gib_ratio']:6.2f}"
        )
        record("plan-accuracy", {"job": name, **job}, found)
    return 0
