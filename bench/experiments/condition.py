"""The kernel's condition number at the start against how training goes: `python -m bench.experiments.condition DATA`.

The published criterion, within one module type (W_k, W_q, W_v of subsets of the layers) and across types. MiniLM-L6
with LoRA r = 8 on every layer's query, key, value and intermediate maps; a set-up trains some of them and leaves the
others at their start, where they add nothing. Its kernel is the sum of its modules' Grams, all from one sweep in
float64. 384 examples, T = 32, Adam, 10 epochs; the training loss of an epoch is the mean over its batches, each before
its step. One JSON line a task's sweep in condition-grams.jsonl, one a run in
condition.jsonl, rank correlations in condition-summary.jsonl, and the figure condition.png.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from bench.experiments.parallel import Config, run_missing
from bench.experiments.runs import RECIPE, start
from bench.experiments.setups import SETS, TYPES, Setup
from bench.experiments.tasks import TASKS
from bench.record import RESULTS, latest, record

EVERY = Setup((0, 1, 2, 3, 4, 5), "all", 8)
KINDS = ("k", "q", "v", "mid")
FEW = ((0,), (2,), (5,), (0, 1, 2), (3, 4, 5))
COLOURS = dict(zip(KINDS, ("#0072b2", "#d55e00", "#009e73", "#7a7a7a"), strict=True))


def main() -> int:
    """Run what is missing, then print, record and draw what all runs show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tasks", nargs="+", default=["sst2", "cola"], choices=["sst2", "cola", "amazon"])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--train", type=int, default=384, help="first examples of each subset")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    chosen = [Setup(s, kind, 8) for kind in given.kinds for s in (SETS if kind == "k" else FEW)]
    shared = {"seed": given.seed, "n": given.train}
    sweeps = [{"task": task, **shared} for task in given.tasks]
    grams = run_missing("condition-grams", given.data, sweeps, spectra, min(given.processes, len(sweeps)))
    configs = [
        {"task": task, "setup": setup.name, **shared, **RECIPE, "epochs": given.epochs}
        for setup in chosen
        for task in given.tasks
    ]
    lines = run_missing("condition", given.data, configs, run, given.processes)
    for task, own in joined(grams, lines).items():
        tell(task, own, {**shared, "epochs": given.epochs})
    draw()
    return 0


def joined(grams: list[dict[str, Any]], lines: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return by task every run's line with its set-up's condition number, and its type."""
    return {
        gram["config"]["task"]: [
            {**gram["setups"][x["config"]["setup"]], **x, "kind": x["config"]["setup"].split("-")[1]}
            for x in lines
            if x["config"]["task"] == gram["config"]["task"]
        ]
        for gram in grams
    }


def spectra(job: tuple[Path, Config]) -> dict[str, Any]:
    """Return the condition number of every set-up's kernel, from one sweep."""
    import ntkengine as ntk

    data, config = job
    at = _started(data, config)
    gram = ntk.compute_gram(at["model"], at["inputs"], per_module=True, precision="exact")
    found = {}
    for kind in KINDS:
        for layers in SETS:
            setup = Setup(layers, kind, 8)
            ends = _ends(setup)
            own = [np.asarray(K) for name, K in gram.modules.items() if any(end in f"{name}." for end in ends)]
            if len(own) != len(layers):
                raise RuntimeError(f"{setup.name}: expected {len(layers)} modules, found {len(own)}")
            K = sum(own)
            condition = ntk.condition_number(K)
            found[setup.name] = {
                "condition": condition.lambda_max / condition.lambda_min if condition.resolved else condition.lower,
                "resolved": condition.resolved,
                "lambda_max": condition.lambda_max,
                "lambda_min": condition.lambda_min,
                "trace": float(np.trace(K)),
            }
    return {"setups": found}


def run(job: tuple[Path, Config]) -> dict[str, Any]:
    """Fine-tune one set-up."""
    from ntkengine.finetune import fine_tune

    data, config = job
    at = _started(data, config)
    layers, kind, _ = config["setup"].split("-")
    ends = _ends(Setup(tuple(map(int, layers)), kind, 8))
    held, y_held = at["test"]
    ran = fine_tune(
        at["model"],
        at["inputs"],
        at["y"],
        RECIPE | {"seed": config["seed"], "epochs": config["epochs"]},
        params=[f"*{end}lora_*" for end in ends],
        eval_inputs=held,
        eval_targets=y_held,
        measure_every=10**6,
    )
    first, last = ran.history[0], ran.history[-1]
    return {
        "epoch_train_loss": ran.batch_losses.reshape(config["epochs"], -1).mean(1).tolist(),
        "train_loss": last.train_loss,
        "train_accuracy": last.train_accuracy,
        "start_test_loss": first.eval_loss,
        "start_test_accuracy": first.eval_accuracy,
        "test_loss": last.eval_loss,
        "test_accuracy": last.eval_accuracy,
        "displacement": last.displacement,
        "seconds": ran.seconds,
        "measuring_seconds": ran.measuring_seconds,
    }


def _started(data: Path, config: Config) -> dict[str, Any]:
    peft = EVERY.peft() | {"target_modules": [name for kind in KINDS for name in TYPES[kind]]}
    at = start(data, config["task"], config["seed"], peft)
    (inputs, y), n = at["train"], config["n"]
    return at | {"inputs": {k: v[:n] for k, v in inputs.items()}, "y": y[:n]}


def _ends(setup: Setup) -> list[str]:
    """Return what names of the set-up's modules contain."""
    (name,) = TYPES[setup.kind]
    inner = name if name == "intermediate.dense" else f"attention.self.{name}"
    return [f".layer.{i}.{inner}." for i in setup.layers]


def tell(task: str, points: list[dict[str, Any]], config: dict[str, Any]) -> None:
    """Print and record rank correlations of log κ: with the training loss after each epoch, and the test accuracy."""
    groups = {kind: [p for p in points if p["kind"] == kind] for kind in KINDS}
    groups["all"] = points
    print(f"\n{task}: Spearman correlation of the condition number with")
    print(f"{'type':>5} {'set-ups':>8} {'resolved':>9}  training loss by epoch … test accuracy")
    for kind, own in groups.items():
        if len(own) < 3:
            continue
        kappa = [p["condition"] for p in own]
        by_epoch = [
            float(spearmanr(kappa, [p["epoch_train_loss"][e] for p in own])[0])
            for e in range(len(own[0]["epoch_train_loss"]))
        ]
        accuracy = float(spearmanr(kappa, [p["test_accuracy"] for p in own])[0])
        resolved = float(np.mean([p["resolved"] for p in own]))
        print(f"{kind:>5} {len(own):8d} {resolved:9.2f}  {' '.join(f'{r:5.2f}' for r in by_epoch)}  … {accuracy:5.2f}")
        record(
            "condition-summary",
            {"task": task, "kind": kind, "setups": len(own), **config},
            {"spearman_train_loss_by_epoch": by_epoch, "spearman_test_accuracy": accuracy, "resolved": resolved},
        )


def draw() -> bool:
    """Draw training loss after 1, 3 and the last epoch, and accuracy after the last, against κ; a row a task.

    Returns:
        False: there are no lines.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    order = list(TASKS)
    grams = sorted(latest("condition-grams"), key=lambda line: order.index(line["config"]["task"]))
    points = joined(grams, latest("condition"))
    if not any(points.values()):
        return False
    figure, grid = plt.subplots(len(points), 4, figsize=(14, 3.4 * len(points)), constrained_layout=True, squeeze=False)
    for axes, (task, own) in zip(grid, points.items(), strict=True):
        last = len(own[0]["epoch_train_loss"])
        columns = [(f"training loss, epoch {e}", e) for e in (1, min(3, last), last)]
        for axis, (title, epoch) in zip(axes, [*columns, (f"test accuracy, epoch {last}", None)], strict=True):
            for kind in KINDS:
                of = [p for p in own if p["kind"] == kind]
                y = [p["test_accuracy"] if epoch is None else p["epoch_train_loss"][epoch - 1] for p in of]
                axis.plot([p["condition"] for p in of], y, "o", ms=5, color=COLOURS[kind], label=f"W_{kind}")
            axis.set_xscale("log")
            axis.set_xlabel("condition number at the start")
            axis.set_title(f"{task}: {title}", fontsize=9)
            axis.grid(visible=True, alpha=0.3)
    grid[0][0].legend(fontsize=7)
    figure.savefig(RESULTS / "condition.png", dpi=110)
    return True


if __name__ == "__main__":
    raise SystemExit(main())
