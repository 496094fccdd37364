"""Time and memory against examples, tokens, parameters, outputs and ranks, with the plan's own prediction.

Each point is a job in a fresh process: all parameters of a random BERT, trace Gram; T = 32 and C = 1 where not varied.
Those of ranks are `ranks`' lines. `python -m bench plot` draws scaling.png from the lines on record.
"""

from __future__ import annotations

import json
from typing import Any

from bench.planned import measured
from bench.record import RESULTS, latest, record

SMALL = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 1024}
COMMON = {"model": "bert", "T": 32, "C": 1, "params": "all"}
STUDIES: dict[str, list[dict[str, Any]]] = {
    "examples": [{**COMMON, "config": SMALL, "N": N} for N in (64, 128, 256, 512, 1024, 2048, 4096)],
    "tokens": [{**COMMON, "config": SMALL, "N": 256, "T": T} for T in (8, 16, 32, 64, 128, 256)],
    "parameters": [
        {**COMMON, "config": SMALL | {"hidden_size": d, "intermediate_size": 4 * d}, "N": 256}
        for d in (64, 128, 256, 512, 768, 1024)
    ],
    "outputs": [{**COMMON, "config": SMALL, "N": 256, "C": C} for C in (1, 2, 4, 8, 16)],
}
AXES = {
    "examples": "examples N",
    "tokens": "tokens T",
    "parameters": "parameters P",
    "outputs": "outputs C",
    "ranks": "ranks, one thread each",
}
UNITS = {"seconds": "seconds", "gib": "GiB above the model"}


def main() -> int:
    """Run every point, and record a line each."""
    for study, jobs in STUDIES.items():
        for job in jobs:
            line = record("scaling", {"study": study, **job}, measured(job))
            shown = {k: round(line[k], 3) for k in ("seconds", "planned_seconds", "gib", "planned_gib")}
            print(study, _x(study, line), json.dumps(shown), flush=True)
    return 0


def draw() -> bool:
    """Draw measured points and the plan's curve, time above and memory below; False: there are no lines."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    found = _studies()
    if not found:
        return False
    figure, axes = plt.subplots(2, len(found), figsize=(3.6 * len(found), 6), squeeze=False, layout="constrained")
    for column, (study, lines) in enumerate(found.items()):
        lines.sort(key=lambda line: _x(study, line))
        axes[0][column].set_title(_fixed(study, lines[0]["config"]), fontsize=9)
        for row, (unit, label) in enumerate(UNITS.items()):
            _panel(axes[row][column], study, unit, [line for line in lines if unit in line])
            axes[row][0].set_ylabel(label)
    axes[0][0].legend()
    figure.suptitle(f"All-parameter trace Gram, {lines[0]['device'].partition(',')[0]}")
    figure.savefig(RESULTS / "scaling.png", dpi=100)
    return True


def _panel(axis: Any, study: str, unit: str, lines: list[dict[str, Any]]) -> None:
    if not lines:
        axis.set_axis_off()
        return
    x, y = [_x(study, line) for line in lines], [line[unit] for line in lines]
    bars = [[abs(line.get(f"{unit}_{p}", line[unit]) - line[unit]) for line in lines] for p in ("p20", "p80")]
    axis.errorbar(x, y, bars, fmt="o", capsize=3, label="measured")
    axis.plot(x, [line[f"planned_{unit}"] for line in lines], "-", label="plan")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.minorticks_off()
    if study != "parameters":
        axis.set_xticks(x, x)
    axis.set_xlabel(AXES[study])
    axis.grid(visible=True, alpha=0.3)


def _studies() -> dict[str, list[dict[str, Any]]]:
    found = {study: [x for x in latest("scaling") if x["config"]["study"] == study] for study in STUDIES}
    return {study: lines for study, lines in (found | {"ranks": latest("ranks")}).items() if lines}


def _x(study: str, line: dict[str, Any]) -> int:
    names = {"examples": "N", "tokens": "T", "outputs": "C", "ranks": "ranks"}
    return int(line["parameters"] if study == "parameters" else line["config"][names[study]])


def _fixed(study: str, config: dict[str, Any]) -> str:
    varied = {"examples": "N", "tokens": "T", "outputs": "C"}.get(study)
    sizes = [f"{name} = {config[name]:,}" for name in ("N", "T", "C") if name != varied]
    wide = "" if study == "parameters" else f" of {config['config']['hidden_size']}"
    return ", ".join([*sizes, f"{config['config']['num_hidden_layers']} layers{wide}"])
