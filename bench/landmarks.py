"""Columns of a few landmarks (N × k) against the whole Gram (N × N): is their cost their share?"""

from __future__ import annotations

import json
import time

from bench.planned import build
from bench.record import record

JOB = {"model": "bert", "N": 512, "T": 32, "C": 2, "params": "all"}
LANDMARKS = (8, 32, 128)


def main() -> int:
    """Time the whole Gram and each set of columns, print, and record a line each."""
    import numpy as np

    import ntkengine as ntk

    model, inputs = build(JOB)
    ntk.compute_gram(model, {k: v[:8] for k, v in inputs.items()}, params="all", check=False)  # warm-up
    start = time.perf_counter()
    whole = ntk.compute_gram(model, inputs, params="all", check=False)
    seconds = time.perf_counter() - start
    for k in LANDMARKS:
        start = time.perf_counter()
        few = ntk.compute_gram(model, inputs, {n: v[:k] for n, v in inputs.items()}, params="all", check=False)
        took = time.perf_counter() - start
        error = float(np.linalg.norm(few.values - whole.values[:, :k]) / np.linalg.norm(few.values))
        values = {
            "seconds": took,
            "whole_seconds": seconds,
            "ratio": took / seconds,
            "contract_ratio": few.meta["contract_seconds"] / whole.meta["contract_seconds"],
            "passes_ratio": few.meta["pass_seconds"] / whole.meta["pass_seconds"],
            "flops_ratio": few.plan.flops / whole.plan.flops,
            "relative_difference": error,
        }
        print(json.dumps(record("landmarks", {**JOB, "k": k}, values)))
    return 0
