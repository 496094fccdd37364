"""How often 90 % intervals hold, over many draws of held-out text: `python -m bench.experiments.coverage DATA`.

All runs of the calibration are measured on one draw of test examples, which says little about an interval's part for
that draw. Here validation and test examples are put together, every fifth set-up is forecast and really trained, and
the examples are split at random into those a forecast sees and those the run is measured on, DRAWS times.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from bench.experiments import parallel, runs, setups, tasks
from bench.experiments.calibration import PARAMS, rehearsed
from bench.record import record
from ntkengine.finetune import fine_tune
from ntkengine.forecast.outcome import outcome
from ntkengine.gram.linear import tangent_factors

EVERY, DRAWS = 5, 200


def main() -> int:
    """Forecast and train what is not yet on record; print and record the share of intervals that hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tasks", nargs="+", default=["sst2", "cola"], choices=tasks.TASKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args()
    configs = [{"task": task, "seed": seed, "draws": DRAWS} for task in given.tasks for seed in given.seeds]
    lines = parallel.run_missing("coverage", given.data, configs, covered, given.processes)
    for task in given.tasks:
        of_task = [line for line in lines if line["config"]["task"] == task]
        values = {
            what: float(np.mean([list(line[what].values()) for line in of_task]))
            for what in ("loss", "accuracy", "half_width", "deviation")
        }
        record("coverage-summary", {"task": task, "seeds": given.seeds, "draws": DRAWS}, values)
        print(
            f"{task}: loss {values['loss']:.1%}, accuracy {values['accuracy']:.1%}; half an interval of the loss is "
            f"{values['half_width']:.4f}, the deviation {values['deviation']:.4f} in the root mean square"
        )
    return 0


def covered(job: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    """Return, by set-up, the share of draws whose interval holds what the run measured."""
    data, config = job
    seed = config["seed"]
    at = runs.start(data, config["task"], seed, None)
    inputs = runs.joined_inputs([at["train"][0]])
    held = runs.joined_inputs([at[part][0] for part in ("validation", "test")])
    y, y_held = at["train"][1], np.concatenate([at[part][1] for part in ("validation", "test")])
    factors = tangent_factors(at["model"], inputs, held, params=PARAMS)
    found: dict[str, Any] = {"loss": {}, "accuracy": {}, "half_width": {}, "deviation": {}}
    for setup in setups.calibration()[::EVERY]:
        run = rehearsed(factors, y, y_held, setup, seed)
        real = runs.start(data, config["task"], seed, setup.peft())
        tuned = fine_tune(
            real["model"], *real["train"], runs.RECIPE | {"seed": seed}, eval_inputs=held, eval_targets=y_held,
            measure_every=48,
        )  # fmt: skip
        assert run.eval_losses is not None
        assert run.eval_correct is not None
        assert tuned.eval_outputs is not None
        losses = 0.5 * np.square(tuned.eval_outputs - y_held).sum(1)
        hits = ((tuned.eval_outputs > 0) == (y_held > 0))[:, 0]
        generator = np.random.default_rng(seed)
        rows = []
        for _ in range(config["draws"]):
            order = generator.permutation(len(y_held))
            seen, later = order[: tasks.VALIDATION], order[tasks.VALIDATION :]
            o = outcome(run.train_losses, run.eval_losses[:, seen], run.eval_correct[:, seen], run.movement)
            assert o.eval_loss is not None
            assert o.eval_accuracy is not None
            loss, share = float(losses[later].mean()), float(hits[later].mean())
            (value, low, high), (_, least, most) = o.eval_loss, o.eval_accuracy
            rows.append((low <= loss <= high, least <= share <= most, (high - low) / 2, value - loss))
        table = np.array(rows, dtype=np.float64)
        found["loss"][setup.name], found["accuracy"][setup.name], found["half_width"][setup.name] = table[:, :3].mean(0)
        found["deviation"][setup.name] = float(np.sqrt(np.mean(table[:, 3] ** 2)))
    return found


if __name__ == "__main__":
    raise SystemExit(main())
