"""Columns of a few landmarks (N × k) against the whole Gram (N × N): is their cost their share?"""

from __future__ import annotations

import json

from bench.planned import build
from bench.record import record
from bench.timing import gate, timed

JOB = {"model": "bert", "N": 512, "T": 32, "C": 2, "params": "all"}
LANDMARKS = (8, 32, 128)


def main() -> int:
    """Time the whole Gram and each set of columns, print, and record a line each."""
    import numpy as np

    import ntkengine as ntk

    model, inputs = build(JOB)
    ntk.compute_gram(model, {k: v[:8] for k, v in inputs.items()}, params="all")  # warm-up, and judged: checked
    all_ = timed(lambda: ntk.compute_gram(model, inputs, params="all", check=False), warm=False, repeats=3)
    whole = all_.result

    def off(few: ntk.Gram) -> float:
        error = np.linalg.norm(few.values - whole.values[:, : few.values.shape[1]]) / np.linalg.norm(few.values)
        return gate(float(error), 1e-5, "columns against the whole")

    for k in LANDMARKS:
        columns = {n: v[:k] for n, v in inputs.items()}
        found = timed(
            lambda c=columns: ntk.compute_gram(model, inputs, c, params="all", check=False), judge=off, repeats=3
        )
        few = found.result
        values = {
            **found.values(),
            **all_.values("whole_seconds"),
            "ratio": found.seconds / all_.seconds,
            "contract_ratio": few.meta["contract_seconds"] / whole.meta["contract_seconds"],
            "passes_ratio": few.meta["pass_seconds"] / whole.meta["pass_seconds"],
            "flops_ratio": few.plan.flops / whole.plan.flops,
            "relative_difference": off(few),
        }
        print(json.dumps(record("landmarks", {**JOB, "k": k}, values)))
    return 0
