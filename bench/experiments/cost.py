"""What forecasting costs, as a share of the training it is for: `python -m bench.experiments.cost DATA`.

In one process, one after another: the factors of the training and validation examples, then every fifth set-up of the
calibration forecast (three repeats) and really trained, nothing measured in between. The factors are shared by all 45
set-ups; forecasts and runs are scaled from the set-ups timed to all of them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from bench.experiments import runs, setups, tasks
from bench.experiments.calibration import PARAMS, REPEATS, rehearsed
from bench.record import record
from ntkengine.finetune import fine_tune
from ntkengine.gram.linear import tangent_factors

EVERY = 5


def main() -> int:
    """Time forecasts and runs of each task; print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tasks", nargs="+", default=list(tasks.TASKS), choices=tasks.TASKS)
    given = parser.parse_args()
    for task in given.tasks:
        at = runs.start(given.data, task, 0, None)
        inputs, held = (runs.joined_inputs([at[p][0]]) for p in ("train", "validation"))
        y, y_held = at["train"][1], at["validation"][1]
        clock = time.perf_counter()
        factors = tangent_factors(at["model"], inputs, held, params=PARAMS)
        shared = time.perf_counter() - clock
        every = setups.calibration()
        forecasting = training = 0.0
        for setup in every[::EVERY]:
            forecast = rehearsed(factors, y, y_held, setup, 0)
            real = runs.start(given.data, task, 0, setup.peft())
            run = fine_tune(real["model"], *real["train"], runs.RECIPE, measure_every=48)
            forecasting, training = forecasting + forecast.seconds, training + run.seconds
        timed = len(every[::EVERY])
        whole = len(every) / timed
        values = {
            "share": (shared + whole * forecasting) / (whole * training),
            "factors_seconds": shared,
            "forecast_seconds": forecasting / timed,
            "training_seconds": training / timed,
        }
        record("forecast-cost", {"task": task, "setups": len(every), "timed": timed, "repeats": REPEATS}, values)
        print(
            f"{task}: {values['share']:.1%} of the training: factors {shared:.1f} s once, a set-up "
            f"{values['forecast_seconds']:.2f} s against {values['training_seconds']:.1f} s"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
