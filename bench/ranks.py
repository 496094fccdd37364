"""One job on several MPI ranks, one thread each: time against one rank, against the plan, and bytes against the model.

All parameters of a random BERT, trace Gram, short texts: contractions take nearly all of the time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.planned import build
from bench.record import record

SHAPE = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
JOB: dict[str, Any] = {"model": "bert", "config": SHAPE, "N": 1536, "T": 8, "C": 1, "params": "all"}
COUNTS = (1, 2, 4)
REPEATS = 2


def main() -> int:
    """Run the job on each number of ranks, print and record a line each."""
    counts = [int(x) for x in sys.argv[2:]] or COUNTS
    planned = _run(1, "plan", *map(str, counts))
    one = None
    for ranks in counts:
        found = _run(ranks, "run")
        said = planned[str(ranks)]
        one = found["seconds"] if ranks == 1 else one
        values = found | {f"planned_{k}": v for k, v in said.items()}
        values["seconds_ratio"] = said["seconds"] / found["seconds"]
        if ranks > 1:
            values["bytes_ratio"] = sum(said["sent_bytes"]) / sum(found["sent_bytes"])
            values["largest_bytes_error"] = float(
                np.abs(np.array(said["sent_bytes"]) / np.array(found["sent_bytes"]) - 1).max()
            )
        if one is not None:
            values["speedup"] = one / found["seconds"]
        values["cores"] = len(os.sched_getaffinity(0))
        record("ranks", {**JOB, "ranks": ranks}, values)
        names = ("seconds", "planned_seconds", "seconds_ratio", "speedup", "communication_share", "bytes_ratio")
        print(ranks, json.dumps({k: round(values[k], 3) for k in names if k in values}), flush=True)
    return 0


def _run(ranks: int, *what: str) -> dict[str, Any]:
    """Return what rank 0 prints.

    Raises:
        RuntimeError: the job failed; holds what it printed.
    """
    launcher = Path(sys.prefix) / "bin" / "mpiexec.hydra"
    command = [str(launcher) if launcher.exists() else "mpirun", "-n", str(ranks), sys.executable]
    command += ["-m", "mpi4py", "-m", "bench.ranks", *what]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def job(comm: Any, what: list[str]) -> dict[str, Any]:
    """Plan the job for some numbers of ranks, or run it on these; in this process."""
    import ntkengine as ntk

    torch.set_num_threads(1)
    model, inputs = build(JOB)
    options: dict[str, Any] = {"params": JOB["params"], "check": False}
    ntk.compute_gram(model, {k: v[:32] for k, v in inputs.items()}, comm=comm, **options)  # warm-up
    if what[0] == "plan":
        found = {}
        for ranks in map(int, what[1:]):
            plan = ntk.plan_gram(model, inputs, ranks=ranks, **options)
            found[str(ranks)] = plan.scaling or {"seconds": plan.seconds, "sent_bytes": [0]}
        return found
    best: dict[str, Any] = {}
    for _ in range(REPEATS):
        comm.Barrier()
        start = time.perf_counter()
        gram = ntk.compute_gram(model, inputs, comm=comm, **options)
        comm.Barrier()
        seconds = time.perf_counter() - start
        if not best or seconds < best["seconds"]:
            told = gram.meta.get("ranks", {})
            best = {
                "seconds": seconds,
                "sent_bytes": told.get("sent_bytes", [0]),
                "communication_share": told.get("communication_share", 0.0),
                "sweep_seconds": told.get("sweep_seconds"),
                "sweep_waited_seconds": told.get("sweep_waited_seconds"),
                "pass_seconds": gram.meta["pass_seconds"],
                "contract_seconds": gram.meta["contract_seconds"],
            }
    return best


if __name__ == "__main__":
    from mpi4py import MPI

    answer = job(MPI.COMM_WORLD, sys.argv[1:])
    if MPI.COMM_WORLD.rank == 0:
        print(json.dumps(answer))
