"""One job on several MPI ranks, one thread each: time against one rank, against the plan, and bytes against the model.

All parameters of a random BERT, trace Gram, short texts: contractions take nearly all of the time. The ranks are
started here; or, on a cluster, `mpirun -n 64 python -m mpi4py -m bench run ranks` measures the ranks it is started on.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.fresh import Memory, fresh
from bench.planned import build
from bench.record import record
from bench.timing import Timed, gate
from ntkengine.cluster.launch import launcher_rank

SHAPE = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
JOB: dict[str, Any] = {"model": "bert", "config": SHAPE, "N": 1536, "T": 8, "C": 1, "params": "all"}
COUNTS = (1, 2, 4)
REPEATS = 3


def main(arguments: list[str]) -> int:
    """Run the job on each number of ranks, print and record a line each."""
    if launcher_rank() is not None:
        return _here(arguments)
    try:
        counts = [int(x) for x in arguments] or COUNTS
    except ValueError:
        print(f"ranks: expected numbers of ranks, got {' '.join(arguments)}", file=sys.stderr)
        return 2
    planned = _run(1, "plan", *map(str, counts))
    one = None
    for ranks in counts:
        found = _run(ranks, "run")
        one = found["seconds"] if ranks == 1 else one
        _tell(ranks, found, planned[str(ranks)], one)
    return 0


def _tell(ranks: int, found: dict[str, Any], said: dict[str, Any], one: float | None) -> None:
    """Record and print one line."""
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
    names = ("seconds", "planned_seconds", "seconds_ratio", "speedup", "communication_share", "bytes_ratio", "gib")
    print(ranks, json.dumps({k: round(values[k], 3) for k in names if k in values}), flush=True)


def _here(arguments: list[str]) -> int:
    """Run the job on the ranks a launcher started; rank 0 tells."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    if arguments:
        if comm.rank == 0:
            print("ranks: the launcher says how many; no arguments are expected", file=sys.stderr)
        return 2
    planned = job(MPI.COMM_SELF, ["plan", str(comm.size)])
    found = job(comm, ["run"])
    if comm.rank == 0:
        _tell(comm.size, found, planned[str(comm.size)], None)
    return 0


def _run(ranks: int, *what: str) -> dict[str, Any]:
    """Return what rank 0 prints."""
    launcher = Path(sys.prefix) / "bin" / "mpiexec.hydra"
    starting = [str(launcher) if launcher.exists() else "mpirun", "-n", str(ranks)]
    one_thread = {"OMP_NUM_THREADS": "1"}
    return fresh("bench.ranks", *what, launcher=starting, options=["-m", "mpi4py"], environment=one_thread)


def job(comm: Any, what: list[str]) -> dict[str, Any]:
    """Plan the job for some numbers of ranks, or run it on these; in this process."""
    import ntkengine as ntk

    torch.set_num_threads(1)
    model, inputs = build(JOB)
    options: dict[str, Any] = {"params": JOB["params"], "check": False}
    few = {k: v[:32] for k, v in inputs.items()}
    small = ntk.compute_gram(model, few, comm=comm, **options)  # warm-up, and judged below
    if what[0] == "plan":
        found = {}
        for ranks in map(int, what[1:]):
            plan = ntk.plan_gram(model, inputs, ranks=ranks, **options)
            found[str(ranks)] = plan.scaling or {"seconds": plan.seconds, "sent_bytes": [0]}
            found[str(ranks)]["gib"] = plan.peak_bytes / 2**30
        return found
    if comm.rank == 0:
        alone = np.asarray(ntk.compute_gram(model, few, params=JOB["params"]).values)  # checked against autograd
        gate(float(np.linalg.norm(small.values - alone) / np.linalg.norm(alone)), 1e-5, f"{comm.size} ranks")
    times = []
    with Memory() as memory:
        for _ in range(REPEATS):
            comm.Barrier()
            start = time.perf_counter()
            gram = ntk.compute_gram(model, inputs, comm=comm, **options)
            comm.Barrier()
            times.append(time.perf_counter() - start)
    told = gram.meta.get("ranks", {})
    return {
        **Timed(times).values(),
        "gib": max(comm.allgather(memory.gib)),
        "sent_bytes": told.get("sent_bytes", [0]),
        "communication_share": told.get("communication_share", 0.0),
        "sweep_seconds": told.get("sweep_seconds"),
        "sweep_waited_seconds": told.get("sweep_waited_seconds"),
        "pass_seconds": gram.meta["pass_seconds"],
        "contract_seconds": gram.meta["contract_seconds"],
    }


if __name__ == "__main__":
    from mpi4py import MPI

    answer = job(MPI.COMM_WORLD, sys.argv[1:])
    if MPI.COMM_WORLD.rank == 0:
        print(json.dumps(answer))
