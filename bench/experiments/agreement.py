"""How forecasts of set-ups agree with real runs of them."""

from __future__ import annotations

from itertools import combinations, permutations
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr

from bench.experiments.tasks import VALIDATION
from bench.record import record
from ntkengine.forecast.outcome import MODEL_ACCURACY, MODEL_LOSS, half_width

PREDICTORS = ("rehearsal", "simulation", "flow", "krr", "loo", "gcv", "alignment", "trace", "condition")


def compare(task: str, runs: list[dict[str, Any]], forecasts: list[dict[str, Any]], test: str = "test") -> None:
    """Print and record, for one task, correlations, coverage, regret and cost.

    Args:
        task: its name.
        runs: lines of real runs.
        forecasts: lines of forecasts.
        test: what was measured on: "test" or "shifted".
    """
    real = {_key(r): r for r in runs if r["config"]["task"] == task and f"{test}_loss" in r}
    told = {_key(f): f for f in forecasts if f["config"]["task"] == task}
    seeds = sorted({seed for seed, _ in real.keys() & told.keys()})
    names = sorted(n for n in {name for _, name in told} if all((s, n) in real and (s, n) in told for s in seeds))
    if len(names) < 3:
        return
    loss, accuracy = (_table(real, f"{test}_{what}", seeds, names) for what in ("loss", "accuracy"))
    train = np.array([[real[s, n]["train_loss"][-1] for n in names] for s in seeds])
    values: dict[str, Any] = {"seeds": len(seeds), "setups": len(names)}
    told = {key: {**line, "drawn": line[f"{test}_drawn"]} for key, line in told.items()}
    for p in (*PREDICTORS, "drawn"):
        found = _table(told, p, seeds, names)
        values[p] = {
            "spearman": float(spearmanr(found.mean(0), loss.mean(0))[0]),
            "pearson": float(pearsonr(found.mean(0), loss.mean(0))[0]),
            "spearman_one_seed": float(np.mean([spearmanr(x, loss.mean(0))[0] for x in found])),
            "regret_points": float(
                np.median([100 * (a.max() - a[x.argmin()]) for x, a in zip(found, accuracy, strict=True)])
            ),
            "regret_points_mean": 100 * float(accuracy.mean(0).max() - accuracy.mean(0)[found.mean(0).argmin()]),
        }
    pairs = list(combinations(range(len(seeds)), 2))
    if pairs:
        rho = values["repeatability"] = float(np.mean([spearmanr(loss[i], loss[j])[0] for i, j in pairs]))
        # What the mean of as many further runs would reach (Spearman-Brown).
        values["further_runs_spearman"] = len(seeds) * rho / (1.0 + (len(seeds) - 1) * rho)
        # One run against the mean of the others: what a forecast has to be compared with.
        others = [np.delete(loss, i, 0).mean(0) for i in range(len(seeds))]
        values["one_run_spearman"] = float(np.mean([spearmanr(a, b)[0] for a, b in zip(loss, others, strict=True)]))
        values["one_run_regret_points"] = float(
            np.median(
                [
                    100 * (accuracy[i].max() - accuracy[i][loss[j].argmin()])
                    for i, j in permutations(range(len(seeds)), 2)
                ]
            )
        )
        values["other_runs_regret_points"] = float(
            np.median([100 * (a.max() - a[b.argmin()]) for a, b in zip(accuracy, others, strict=True)])
        )
    values["train_spearman"] = float(spearmanr(_table(told, "train_loss", seeds, names).mean(0), train.mean(0))[0])
    values["train_relative_error"] = float(np.median(np.abs(_table(told, "train_loss", seeds, names) / train - 1.0)))
    values |= _coverage(told, loss, accuracy, seeds, names, test)
    training = sum(real[s, n]["seconds"] for s in seeds for n in names)
    spent = sum(told[s, n]["rehearsal_seconds"] for s in seeds for n in names)
    spent += sum(told[s, names[0]]["factors_seconds"] for s in seeds)
    values["cost_share"] = spent / training
    line = record("calibration", {"task": task, "measured_on": test}, values)
    print(f"\n{task}, measured on {test}: {len(names)} set-ups, {len(seeds)} seeds")
    for p in (*PREDICTORS, "drawn"):
        v = line[p]
        print(
            f"  {p:<11} Spearman {v['spearman']:+.2f} (one seed {v['spearman_one_seed']:+.2f})  "
            f"Pearson {v['pearson']:+.2f}  regret {v['regret_points']:.1f} points"
        )
    for name in (
        "repeatability",
        "further_runs_spearman",
        "one_run_spearman",
        "one_run_regret_points",
        "other_runs_regret_points",
        "train_spearman",
        "train_relative_error",
    ):
        if name in values:
            print(f"  {name} {values[name]:.3f}")
    for name in ("coverage", "coverage_same_text", "accuracy_coverage", "accuracy_coverage_same_text", "cost_share"):
        print(f"  {name} {values[name]:.3f}")
    if test == "test" and any("shifted_loss" in r for r in real.values()):
        compare(task, runs, forecasts, "shifted")


def _key(line: dict[str, Any]) -> tuple[int, str]:
    return line["config"]["seed"], line["config"]["setup"]


def _table(lines: dict[tuple[int, str], dict[str, Any]], name: str, seeds: list[int], names: list[str]) -> np.ndarray:
    return np.array([[lines[s, n][name] for n in names] for s in seeds])


def _coverage(
    told: dict[tuple[int, str], dict[str, Any]],
    loss: np.ndarray,
    accuracy: np.ndarray,
    seeds: list[int],
    names: list[str],
    test: str,
) -> dict[str, float]:
    """Return how often the 90 % intervals hold what single runs measured, and the errors they are made of.

    All runs of a task are measured on one draw of test examples, so the whole intervals' coverage is that of few draws;
    `…_same_text` is the coverage of their other parts, chance and model, with both sides on the test's examples.
    """

    def get(name: str) -> np.ndarray:
        return _table(told, name, seeds, names)

    value, share, moved = get("rehearsal"), get("accuracy"), get("movement")
    sampling, chance = get("sampling"), get("chance")
    repeats = told[seeds[0], names[0]]["config"]["repeats"]
    half = half_width(sampling, chance, MODEL_LOSS * moved, repeats, VALIDATION)
    binomial = np.sqrt(share * (1 - share) / VALIDATION)  # standard error of a share
    wide = half_width(binomial, 0.0, MODEL_ACCURACY * moved)
    drawn, drawn_share = get(f"{test}_drawn"), get(f"{test}_drawn_accuracy")
    own = half_width(0.0, chance, MODEL_LOSS * moved, repeats)
    own_share = half_width(0.0, chance, MODEL_ACCURACY * moved)
    return {
        "coverage_same_text": float((np.abs(drawn - loss) <= own).mean()),
        "accuracy_coverage_same_text": float((np.abs(drawn_share - accuracy) <= own_share).mean()),
        "coverage": float((np.abs(value - loss) <= half).mean()),
        "accuracy_coverage": float((np.abs(share - accuracy) <= wide).mean()),
        "mean_half_width": float(half.mean()),
        "bias": float((value - loss).mean()),
        "rms_error": float(np.sqrt(np.mean((value - loss) ** 2))),
        "rms_known": float(np.sqrt(np.mean(2 * sampling**2 + chance**2))),
        "rms_movement": float(np.sqrt(np.mean(moved**2))),
    }
