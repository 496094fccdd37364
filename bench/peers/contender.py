"""One contender in a process of its own: judged on the first samples, then timed; `python -m …contender JOB`.

JOB is JSON: `module` (under bench.peers), `config` (of the work, with the contender's options), `compiles`, `few`
(samples it is judged on), `reference` (the file of their Gram in float64, or null: this is the reference), `target`
(file for its own Gram), `repeats` and `most_s`. Prints seconds and memory as JSON.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import Any

import numpy as np
import torch

from bench.fresh import Memory
from bench.peers.work import build
from bench.timing import gate, timed

BOUND = 1e-2  # of the relative error: wide, since float32's own error is shown, not judged


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Return what it took, or for the reference nothing."""
    config = job["config"]
    model, inputs = build(config)
    few = {k: v[: job["few"]] for k, v in inputs.items()}
    peer = import_module(f"bench.peers.{job['module']}")
    if job["reference"] is None:
        gram = peer.prepare(model.double(), config)
        np.save(job["target"], gram({k: v.double() if v.is_floating_point() else v for k, v in few.items()}))
        return {}
    gram = peer.prepare(model, config)
    truth = np.load(job["reference"])
    error = float(np.linalg.norm(gram(few) - truth) / np.linalg.norm(truth))
    gate(error, BOUND, f"{job['few']} samples against float64")
    if job["compiles"]:
        gram(inputs)
    with Memory() as memory:
        found = timed(lambda: gram(inputs), warm=False, repeats=job["repeats"], most_s=job["most_s"])
    np.save(job["target"], found.result)
    return {**found.values(), "gib": memory.gib, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
