"""Time and memory against the number of examples and of parameters, with the plan's own prediction: lines and a figure.

Each point is a job in a fresh process: all parameters of a random BERT, trace Gram, T = 32, C = 1.
"""

from __future__ import annotations

import json
from typing import Any

from bench.planned import measured
from bench.record import RESULTS, record

SMALL = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 1024}
COMMON = {"model": "bert", "T": 32, "C": 1, "params": "all"}
EXAMPLES = [{**COMMON, "config": SMALL, "N": N} for N in (64, 128, 256, 512, 1024, 2048, 4096)]
PARAMETERS = [
    {**COMMON, "config": SMALL | {"hidden_size": d, "intermediate_size": 4 * d}, "N": 256}
    for d in (64, 128, 256, 512, 768, 1024)
]


def main() -> int:
    """Run every point, record a line each, and draw bench/results/scaling.png from the lines just recorded."""
    found: dict[str, list[dict[str, Any]]] = {"examples": [], "parameters": []}
    for study, jobs in (("examples", EXAMPLES), ("parameters", PARAMETERS)):
        for job in jobs:
            line = record("scaling", {"study": study, **job}, measured(job))
            found[study].append(line)
            shown = {k: round(line[k], 3) for k in ("seconds", "planned_seconds", "gib", "planned_gib")}
            print(study, job["N"], line["parameters"], json.dumps(shown))
    draw(found["examples"], found["parameters"])
    return 0


def draw(examples: list[dict[str, Any]], parameters: list[dict[str, Any]]) -> None:
    """Draw measured points and the plan's curve, time above and memory below."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex="col", constrained_layout=True)
    columns = ((examples, [x["config"]["N"] for x in examples]), (parameters, [x["parameters"] for x in parameters]))
    for column, (lines, x) in enumerate(columns):
        for row, (unit, label) in enumerate((("seconds", "seconds"), ("gib", "GiB above the model"))):
            axis = axes[row][column]
            axis.loglog(x, [line[unit] for line in lines], "o", label="measured")
            axis.loglog(x, [line[f"planned_{unit}"] for line in lines], "-", label="plan")
            axis.set_ylabel(label)
            axis.grid(visible=True, alpha=0.3)
    axes[0][0].legend()
    axes[1][0].set_xlabel(f"examples N ({examples[0]['parameters']:,} parameters)")
    axes[1][1].set_xlabel(f"parameters P (N = {parameters[0]['config']['N']})")
    figure.suptitle(f"All-parameter trace Gram, T = 32, C = 1, {examples[0]['device']}")
    figure.savefig(RESULTS / "scaling.png", dpi=110)
