"""How far fine-tuning goes under a proximal term, the published table: `python -m bench.experiments.deviation DATA`.

MiniLM-L6 with LoRA on query and value (r = 8, all layers), 384 examples, T = 32, Adam, 4 epochs, and the exact
linearised model on the same batches. One JSON line a run in deviation.jsonl, a summary in deviation-summary.jsonl, and
the figure deviation.png.

λ here multiplies ½‖θ − θ_0‖² beside the *mean* of ½‖f − y‖². The paper's theory has the *sum* of ‖f − y‖² there: for
the same trade-off its λ is 2n = 768 times ours. The numbers 50 … 0 are the paper's, taken as they are.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np

from bench.experiments.parallel import Config, run_missing
from bench.experiments.runs import RECIPE, start
from bench.experiments.setups import Setup
from bench.record import RESULTS, latest, record

LAMBDAS = (50.0, 10.0, 5.0, 2.0, 1.0, 0.5, 0.1, 0.0)
PENALTIES = ("plain", "selective")
SETUP = Setup((0, 1, 2, 3, 4, 5), "qv", 8)
SHOWN = ("displacement", "gap", "relative_gap", "divergence", "train_loss", "test_loss", "test_accuracy")


def main() -> int:
    """Run what is missing, then print and record what all runs show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tasks", nargs="+", default=["sst2", "cola"], choices=["sst2", "cola", "amazon"])
    parser.add_argument("--penalties", nargs="+", default=list(PENALTIES), choices=PENALTIES)
    parser.add_argument("--lambdas", nargs="+", type=float, default=list(LAMBDAS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--train", type=int, default=384, help="first examples of each subset")
    parser.add_argument("--test", type=int, default=None, help="first test examples (default: all)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    configs = [
        {
            "task": task,
            "seed": seed,
            "penalty": penalty,
            "proximal": proximal,
            "setup": SETUP.name,
            "n": given.train,
            "test": given.test,
            **RECIPE,
        }
        for seed in given.seeds
        for penalty in given.penalties
        for proximal in given.lambdas
        for task in given.tasks
    ]
    lines = run_missing("deviation", given.data, configs, run, given.processes)
    for task in given.tasks:
        for penalty in given.penalties:
            own = [x for x in lines if (x["config"]["task"], x["config"]["penalty"]) == (task, penalty)]
            tell(task, penalty, own)
    draw()
    return 0


def run(job: tuple[Path, Config]) -> dict[str, Any]:
    """Fine-tune once, with the linearised model beside it."""
    from ntkengine.finetune import fine_tune

    data, config = job
    at = start(data, config["task"], config["seed"], SETUP.peft())
    (inputs, y), (held, y_held) = at["train"], at["test"]
    n, m = config["n"], config["test"] or len(y_held)
    ran = fine_tune(
        at["model"],
        {k: v[:n] for k, v in inputs.items()},
        y[:n],
        RECIPE
        | {"seed": config["seed"], "proximal": config["proximal"], "selective": config["penalty"] == "selective"},
        eval_inputs={k: v[:m] for k, v in held.items()},
        eval_targets=y_held[:m],
        linear=True,
        measure_every=10**6,
    )
    last = ran.history[-1]
    names = ("displacement", "linear_displacement", "gap", "relative_gap", "divergence", "train_loss", "train_accuracy")
    values = {name: getattr(last, name) for name in names}
    for name in ("gap", "relative_gap", "divergence"):
        values[f"test_{name}"] = getattr(last, f"eval_{name}")
    for name in ("loss", "accuracy"):
        values[f"start_test_{name}"] = getattr(ran.history[0], f"eval_{name}")
        values[f"test_{name}"] = getattr(last, f"eval_{name}")
        for part, of in (("train", "train"), ("test", "eval")):
            values[f"linear_{part}_{name}"] = getattr(last, f"linear_{of}_{name}")
    return values | {"seconds": ran.seconds, "measuring_seconds": ran.measuring_seconds}


def tell(task: str, penalty: str, lines: list[dict[str, Any]]) -> None:
    """Print one table, and record in how many neighbouring pairs each column falls as λ grows."""
    lambdas = sorted({x["config"]["proximal"] for x in lines}, reverse=True)
    means = {
        name: [float(np.mean([x[name] for x in lines if x["config"]["proximal"] == value])) for value in lambdas]
        for name in SHOWN
    }
    print(f"\n{task}, {penalty} penalty, {len(lines) // len(lambdas)} seed(s)")
    print("  ".join(f"{name:>13}" for name in ("lambda", *SHOWN)))
    for i, value in enumerate(lambdas):
        print("  ".join([f"{value:13g}", *(f"{means[name][i]:13.4g}" for name in SHOWN)]))
    found: dict[str, Any] = {}
    for name in SHOWN:
        seeds = sorted({x["config"]["seed"] for x in lines})
        at = {(x["config"]["seed"], x["config"]["proximal"]): x[name] for x in lines}
        falls = [at[s, a] < at[s, b] for s in seeds for a, b in zip(lambdas, lambdas[1:], strict=False)]
        found[f"{name}_falls"] = float(np.mean(falls)) if falls else None
    record(
        "deviation-summary", {"task": task, "penalty": penalty, "lambdas": lambdas, "n": lines[0]["config"]["n"]}, found
    )
    print("share of neighbouring pairs in which it falls as lambda grows:")
    print("  ".join([" " * 13, *(f"{found[f'{name}_falls']:13.2f}" for name in SHOWN)]))


def draw() -> bool:
    """Draw deviation, gap and accuracy against λ, a line a task and penalty; False: there are no lines."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    lines = latest("deviation")
    if not lines:
        return False
    labels = {
        "displacement": "‖θ − θ₀‖",
        "gap": "‖f − f̄‖, training examples",
        "divergence": "KL, training examples",
        "test_accuracy": "test accuracy",
    }
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.4), constrained_layout=True)
    groups = sorted({(x["config"]["task"], x["config"]["penalty"]) for x in lines})
    for axis, (name, label) in zip(axes, labels.items(), strict=True):
        for task, penalty in groups:
            own = [x for x in lines if (x["config"]["task"], x["config"]["penalty"]) == (task, penalty)]
            lambdas = sorted({x["config"]["proximal"] for x in own})
            y = [np.mean([x[name] for x in own if x["config"]["proximal"] == v]) for v in lambdas]
            axis.plot(lambdas, y, "o-" if penalty == "plain" else "s--", ms=4, label=f"{task}, {penalty}")
        axis.set_xscale("symlog", linthresh=0.1)
        if name != "test_accuracy":
            axis.set_yscale("log")
        axis.set_xlabel("λ")
        axis.set_title(label, fontsize=10)
        axis.grid(visible=True, alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(RESULTS / "deviation.png", dpi=110)
    return True


if __name__ == "__main__":
    raise SystemExit(main())
