"""Many runs on a few processes, a JSON line each; runs that have a line already are left out."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.record import lines, record

Config = dict[str, Any]
Run = Callable[[tuple[Path, Config]], dict[str, Any]]


def run_missing(name: str, data: Path, configs: Sequence[Config], run: Run, processes: int) -> list[dict[str, Any]]:
    """Run what is not on record yet, one thread each; return the lines of all configs, in their order.

    Args:
        name: of the file of lines.
        data: folder of the tasks.
        configs: what to run.
        run: (data, config) -> values; a function of a module, since other processes import it.
        processes: at once.
    """
    known = lines(name)
    wanted = [config for config in configs if not any(line["config"] == config for line in known)]
    with multiprocessing.get_context("spawn").Pool(processes, alone) as pool:
        jobs = [(run, data, config) for config in wanted]
        for i, (config, values) in enumerate(pool.imap_unordered(_called, jobs), 1):
            known.append(record(name, config, values))
            print(f"{i}/{len(wanted)} {' '.join(str(v) for v in list(config.values())[:5])}", flush=True)
    return [next(line for line in reversed(known) if line["config"] == config) for config in configs]


def _called(job: tuple[Run, Path, Config]) -> tuple[Config, dict[str, Any]]:
    run, data, config = job
    return config, run((data, config))


def alone() -> None:
    """Keep a process to one thread: several share the machine."""
    import torch

    torch.set_num_threads(1)
