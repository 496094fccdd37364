"""Forecast every set-up from text the test never sees: `python -m bench.experiments.calibration DATA`.

One JSON line a task, seed and set-up in calibration-forecasts.jsonl, of every predictor; then the comparison with the
real runs (`bench.experiments.runs`) in calibration.jsonl, and its table. Predictors, all from the training examples and
`validation`:

rehearsal        the shipped forecast: adapters trained on kept factors, eval loss
simulation       the recipe simulated on expected LoRA kernels, eval loss
flow             gradient flow on them, at the one time whose mean training loss over the set-ups is the rehearsals'
krr              kernel ridge regression, eval loss at its best ridge
loo, gcv         their least values over ridges
alignment        centred kernel-target alignment, negated
trace            of the expected LoRA kernel
condition        its condition number: the published criterion

and, which is no forecast but shows what the draw of validation examples costs, `drawn`: the rehearsal scored on the
test examples themselves.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.experiments import runs, setups, tasks
from bench.experiments.agreement import compare
from bench.record import lines as recorded
from bench.record import record
from ntkengine.forecast.candidates import layer_of
from ntkengine.forecast.lora import Rehearsal, rehearse
from ntkengine.forecast.outcome import outcome
from ntkengine.forecast.result import Forecast
from ntkengine.forecast.simulate import simulate
from ntkengine.gram.linear import TangentFactors, tangent_factors

PARAMS = "*.layer.*.weight"
REPEATS = 3


def main() -> int:
    """Forecast what is not yet there, then compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tasks", nargs="+", default=list(tasks.TASKS), choices=tasks.TASKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    wanted = {(r["config"]["task"], r["config"]["seed"]) for r in runs.lines()}
    done = {(f["config"]["task"], f["config"]["seed"]) for f in lines()}
    for task, seed in sorted(wanted - done):
        if task in given.tasks and seed in given.seeds:
            for config, values in forecasts(given.data, task, seed):
                record("calibration-forecasts", config, values)
    for task in given.tasks:
        compare(task, runs.lines(), lines())
    return 0


def lines() -> list[dict[str, Any]]:
    """Return the forecasts on record."""
    return recorded("calibration-forecasts")


def forecasts(data: Path, task: str, seed: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return every set-up's predictors for one training subset."""
    import ntkengine as ntk

    at = runs.start(data, task, seed, None)
    inputs, held = (runs.joined_inputs([at[p][0]]) for p in ("train", "validation"))
    y, y_held = at["train"][1], at["validation"][1]
    measured = [p for p in ("test", "shifted") if p in at]
    parts = ["validation", *measured]
    every = {p: len(at[p][1]) for p in parts}, np.concatenate([at[p][1] for p in parts])
    clock = time.perf_counter()
    factors = tangent_factors(at["model"], inputs, runs.joined_inputs([at[p][0] for p in parts]), params=PARAMS)
    shared = time.perf_counter() - clock
    clock = time.perf_counter()
    gram = ntk.compute_gram(
        at["model"], inputs, eval_inputs=held, eval_targets=y_held, params=PARAMS, per_module=True, check=False
    )
    gram.noise = 0.0  # not estimated here: nothing below depends on it
    of_gram = time.perf_counter() - clock
    found = []
    for setup in setups.calibration():
        modules = members(factors, setup)
        values = {"factors_seconds": shared, "gram_seconds": of_gram}
        values |= _of_rehearsal(factors, y, every, setup, seed)
        values |= _of_kernels(gram, y, y_held, setup, modules, seed)
        found.append(({"task": task, "seed": seed, "setup": setup.name, "repeats": REPEATS}, values))
    # One time for all: where the flows' mean training loss meets the rehearsals'.
    flows: list[Forecast] = [values.pop("flow") for _, values in found]
    aim = float(np.mean([values["train_loss"] for _, values in found]))
    times = np.geomspace(1, 1e6, 400)
    means = [
        np.mean([flow.at(float(np.clip(t, flow.times[0], flow.times[-1])))["train_loss"] for flow in flows])
        for t in times
    ]
    t = float(times[int(np.argmin(np.abs(np.array(means) - aim)))])
    for (_, values), flow in zip(found, flows, strict=True):
        values["flow"] = flow.at(float(np.clip(t, flow.times[0], flow.times[-1])))["eval_loss"]
        values["flow_time"] = t
    return found


def members(factors: TangentFactors, setup: setups.Setup) -> list[str]:
    """Return the maps a set-up adapts."""
    ends = tuple(f".{end}" for end in setups.TYPES[setup.kind])
    return [n for n in factors.maps if int(layer_of(n)) in setup.layers and n.endswith(ends)]


def rehearsed(factors: TangentFactors, y: np.ndarray, y_held: np.ndarray, setup: setups.Setup, seed: int) -> Rehearsal:
    """Return the forecast of a set-up on a training subset, with seeds that no real run has."""
    seed = 1000 * (seed + 1)
    return rehearse(
        factors, y, runs.RECIPE | {"seed": seed}, members(factors, setup), rank=setup.rank, eval_targets=y_held,
        repeats=REPEATS, seed=seed,
    )  # fmt: skip


def _of_rehearsal(
    factors: TangentFactors,
    y: np.ndarray,
    every: tuple[dict[str, int], np.ndarray],
    setup: setups.Setup,
    seed: int,
) -> dict[str, Any]:
    sizes, targets = every
    run = rehearsed(factors, y, targets, setup, seed)
    assert run.eval_losses is not None
    assert run.eval_correct is not None
    seen, first, drawn = sizes["validation"], 0, {}
    for part, size in sizes.items():
        if part != "validation":
            drawn[f"{part}_drawn"] = float(run.eval_losses[:, first : first + size].mean())
            drawn[f"{part}_drawn_accuracy"] = float(run.eval_correct[:, first : first + size].mean())
        first += size
    o = outcome(run.train_losses, run.eval_losses[:, :seen], run.eval_correct[:, :seen], run.movement)
    assert o.eval_loss is not None
    assert o.eval_accuracy is not None
    return drawn | {
        "parameters": run.parameters,
        "rehearsal": o.eval_loss[0],
        "train_loss": o.train_loss,
        "accuracy": o.eval_accuracy[0],
        "sampling": o.sampling,
        "chance": o.chance,
        "movement": run.movement,
        "displacement": float(run.displacement.mean()),
        "rehearsal_seconds": run.seconds,
    }


def _of_kernels(
    gram: Any, y: np.ndarray, y_held: np.ndarray, setup: setups.Setup, modules: list[str], seed: int
) -> dict[str, Any]:
    from ntkengine.forecast import forecast
    from ntkengine.gram.result import Gram

    shapes = {row.module: (row.rows, row.columns) for row in gram.plan.parameters}
    factor = {m: 4.0 * setup.rank / (3.0 * shapes[m][1]) for m in modules}
    grams = [factor[m] * np.asarray(gram.modules[m]) for m in modules]
    crosses = [factor[m] * np.asarray(gram.cross_modules[m]) for m in modules]
    run = simulate(
        grams,
        y,
        runs.RECIPE | {"seed": 1000 * (seed + 1)},
        offset=gram.outputs,
        sizes=[setup.rank * shapes[m][0] for m in modules],
        crosses=crosses,
        eval_targets=y_held,
        eval_offset=gram.eval_outputs,
    )
    assert run.eval_losses is not None
    K = Gram(np.add.reduce(grams), gram.outputs, "trace", "sgd", 0.0, cross=np.add.reduce(crosses))
    K.eval_outputs = gram.eval_outputs
    flow = forecast(K, y, eval_targets=y_held)
    assert flow.eval_mse is not None
    return {
        "simulation": float(run.eval_losses.mean()),
        "simulated_train_loss": float(run.train_losses.mean()),
        "krr": 0.5 * float(flow.eval_mse.min()),
        "loo": 0.5 * float(flow.loo_mse.min()),
        "gcv": 0.5 * float(flow.gcv.min()),
        "alignment": -float(flow.alignment or 0.0),
        "trace": flow.trace,
        "condition": float(flow.eigenvalues[0] / max(flow.eigenvalues[-1], flow.noise)),
        "flow": flow,
    }


if __name__ == "__main__":
    raise SystemExit(main())
