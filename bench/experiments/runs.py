"""Fine-tune every set-up of the calibration on every task, for real: `python -m bench.experiments.runs DATA`.

One JSON line a run in calibration-runs.jsonl; runs that have a line already are left out, so it can be stopped.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np

from bench.experiments import parallel, setups, tasks
from bench.record import lines as recorded
from bench.record import record

RECIPE = {"learning_rate": 1e-3, "epochs": 4, "batch_size": 32, "optimizer": "adam", "loss": "squared"}
LENGTH = 32


def main() -> int:
    """Run what is not yet there, on as many processes as asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tasks", nargs="+", default=list(tasks.TASKS), choices=tasks.TASKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    done = {(line["config"]["task"], line["config"]["seed"], line["config"]["setup"]) for line in lines()}
    wanted = [
        (given.data, task, seed, setup)
        for seed in given.seeds
        for setup in setups.calibration()
        for task in given.tasks
        if (task, seed, setup.name) not in done
    ]
    with multiprocessing.get_context("spawn").Pool(given.processes, parallel.alone) as pool:
        for i, (config, values) in enumerate(pool.imap_unordered(_run, wanted), 1):
            record("calibration-runs", config, values)
            print(f"{i}/{len(wanted)} {config['task']} {config['seed']} {config['setup']}", flush=True)
    return 0


def lines() -> list[dict[str, Any]]:
    """Return the runs on record."""
    return recorded("calibration-runs")


def start(data: Path, task: str, seed: int, peft: dict[str, Any] | None) -> dict[str, Any]:
    """Return the model with its head fitted on the training labels, and every part's inputs and targets."""
    import ntkengine as ntk
    from ntkengine import assets

    chosen = tasks.load(task, data, seed)
    model = ntk.load_model(assets.fetch_demo().model_dir, num_labels=1, peft=peft, seed=seed)
    found: dict[str, Any] = {"model": model, "task": chosen}
    for part in ("train", "validation", "test", "shifted"):
        examples = getattr(chosen, part)
        if examples is not None:
            inputs = ntk.tokenize(examples, model, max_length=LENGTH, truncate=True)
            found[part] = inputs, 2.0 * examples.labels[:, None] - 1
    # The head is a ridge regression with penalty 1 on the encoder's output.
    found["head"] = ntk.fit_head(model, *found["train"], ridge=1.0, seed=seed)
    return found


def joined_inputs(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the token tensors of several parts as one, padded to a common width."""
    import torch

    width = max(x["input_ids"].shape[1] for x in parts)
    keys = [k for k, v in parts[0].items() if v.ndim == 2]
    return {k: torch.cat([torch.nn.functional.pad(x[k], (0, width - x[k].shape[1])) for x in parts]) for k in keys}


def _run(job: tuple[Path, str, int, setups.Setup]) -> tuple[dict[str, Any], dict[str, Any]]:
    from ntkengine.finetune import fine_tune

    data, task, seed, setup = job
    at = start(data, task, seed, setup.peft())
    measured = {part: at[part] for part in ("test", "shifted") if part in at}
    joined = joined_inputs([x for x, _ in measured.values()])
    run = fine_tune(
        at["model"],
        *at["train"],
        RECIPE | {"seed": seed},
        eval_inputs=joined,
        eval_targets=np.concatenate([y for _, y in measured.values()]),
        measure_every=48,
    )
    values: dict[str, Any] = {
        "train_loss": [m.train_loss for m in run.history],
        "train_accuracy": [m.train_accuracy for m in run.history],
        "displacement": [m.displacement for m in run.history],
        "batch_losses": [round(x, 5) for x in run.batch_losses.tolist()],
        "seconds": run.seconds,
        "measuring_seconds": run.measuring_seconds,
    }
    assert run.eval_outputs is not None
    first = 0
    for part, (_, y) in measured.items():
        f = run.eval_outputs[first : first + len(y)]
        first += len(y)
        values[f"{part}_loss"] = float(0.5 * ((f - y) ** 2).mean())
        values[f"{part}_accuracy"] = float(((f > 0) == (y > 0)).mean())
    count = sum(p.numel() for p in at["model"].parameters() if p.requires_grad)
    config = {"task": task, "seed": seed, "setup": setup.name, "parameters": count, **RECIPE}
    return config, values


if __name__ == "__main__":
    raise SystemExit(main())
