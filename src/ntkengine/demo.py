"""The whole job on a real model and real text: MiniLM-L6 on movie review snippets, twice."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ntkengine.digits import above, below
from ntkengine.errors import InputError
from ntkengine.jobparts import DataPart, GramPart, Job, ModelPart
from ntkengine.report import Table, write_report
from ntkengine.textfile import made_folder

if TYPE_CHECKING:
    from ntkengine.forecast import Forecast

Progress = Callable[[float, float, str], None]
_LORA = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]}


@dataclass(frozen=True)
class DemoResult:
    """What the demo made.

    Attributes:
        tables: the report's main tables, for the terminal.
        summary: closing lines.
        report: the HTML page.
        grams: the two Gram files.
    """

    tables: list[Table]
    summary: list[str]
    report: Path
    grams: tuple[Path, Path]


def run_demo(
    out: str | Path = "runs/demo",
    train: int = 256,
    evaluate: int = 256,
    seed: int = 0,
    progress: Progress | None = None,
) -> DemoResult:
    """Compute the Grams of rank-8 LoRA on every query and value projection and of all parameters, and report on both.

    The head is a ridge fit; leave-one-out and GCV use heads that have not seen the example they are scored on.

    Args:
        out: folder for `lora.h5`, `full.h5` and `report.html`; made when missing.
        train: training examples, at least 10.
        evaluate: held-out examples, at least 10, with no text in common with the training ones.
        seed: of the drawn examples.
        progress: called with (flops done, flops in all, stage).

    Returns:
        Tables, summary and paths.

    Raises:
        InputError: `out` is a file, no matplotlib, too few examples, or a download that fails.
    Cost: 256 + 256 examples: 23 million parameters, some minutes on two cores; 86 MB are downloaded once.
    """
    from ntkengine.assets import fetch_demo, movie_snippets
    from ntkengine.gramfiles import forecast_file, report_files
    from ntkengine.jobs import run_gram
    from ntkengine.report.drawing import require
    from ntkengine.report.findings import comparison_table, module_table
    from ntkengine.report.tables import gram_table
    from ntkengine.store import open_gram

    for name, count in (("train", train), ("eval", evaluate)):
        if count < 10:
            raise InputError(f"{name}: expected at least 10 examples, got {count}")
    require()
    folder = made_folder(Path(out))
    if progress is not None:
        progress(0.0, 1.0, "fetching MiniLM-L6 and the movie snippets")
    assets = fetch_demo()
    examples = movie_snippets(assets.snippets, train, evaluate, seed)

    def job(name: str, peft: dict | None, part: GramPart) -> Job:
        model = ModelPart(str(assets.model_dir), num_labels=2, peft=peft)
        return Job(model, DataPart(Path(assets.snippets), Path(assets.snippets)), gram=part, out=folder / name)

    jobs = {
        "LoRA r=8, query+value": job("lora.h5", dict(_LORA), GramPart(readout="margin")),
        "all parameters": job("full.h5", None, GramPart(readout="margin", params="all", per_module=True)),
    }
    for what in jobs.values():
        run_gram(what, progress, examples=examples)
    lora, full = folder / "lora.h5", folder / "full.h5"
    report = write_report(
        folder / "report.html", report_files([lora, full]), "Tangent kernel of MiniLM-L6 on movie snippets"
    )

    tables: list[Table] = []
    forecasts: dict[str, Forecast] = {}
    summary = []
    for name, path in zip(jobs, (lora, full), strict=True):
        gram = open_gram(path)
        forecasts[name] = found = forecast_file(gram)
        total = sum(gram.meta["module_trace"].values())
        tables += [gram_table(gram, job=False), module_table(found.modules, total, top=10)]
        summary += _summary(name, found, float(gram.meta["seconds"]))
    tables.append(comparison_table(forecasts))
    summary.append(_verdict(forecasts))
    summary.append(f"Grams: {lora}, {full}; report: {report}")
    return DemoResult(tables, summary, report, (lora, full))


def _verdict(forecasts: dict[str, Forecast]) -> str:
    """Return which of two set-ups is forecast to do better on held-out examples, if the errors let that be said."""
    (one, few), (other, all_) = ((name, f.eval_mse_at_ridge or f.loo) for name, f in forecasts.items())
    gap = few[0] - all_[0]
    if abs(gap) <= math.hypot((few[2] - few[1]) / 2, (all_[2] - all_[1]) / 2):
        return f"So: training {one} is forecast to do as well as {other}, within the errors"
    better, worse = (one, other) if gap < 0 else (other, one)
    return f"So: training {better} is forecast to do better than {worse}, by an mse of {abs(gap):.3f}"


def _summary(name: str, found: Forecast, seconds: float) -> list[str]:
    value, low, high = found.loo
    lines = [
        f"{name}: {found.n} examples in {seconds:.1f} s",
        f"  forecast from the training examples: mse {value:.3f} (95% {below(low, 3)} to {above(high, 3)}), "
        f"GCV {found.gcv_value:.3f}",
    ]
    if found.eval_mse_at_ridge is not None:
        mse, worst, best = found.eval_mse_at_ridge
        # Both are estimates: their difference has the errors of both.
        agrees = abs(mse - value) <= math.hypot(high - value, best - mse)
        lines.append(
            f"  linearised prediction on {found.n_eval} held-out examples: mse {mse:.3f} "
            f"(95% {below(worst, 3)} to {above(best, 3)}), {'within' if agrees else 'beyond'} the errors of both; "
            f"before training {found.start['eval_mse']:.3f}"
        )
    if found.loo_accuracy_at_ridge is not None and found.eval_accuracy_at_ridge is not None:
        share, held = found.loo_accuracy_at_ridge[0], found.eval_accuracy_at_ridge[0]
        lines.append(
            f"  accuracy: leave-one-out {share:.3f}, held-out {held:.3f}, "
            f"before training {found.start['eval_accuracy']:.3f}"
        )
    return lines
