"""`ntkengine spectrum | ridge | forecast | report`: what is read off a Gram file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ntkengine.arguments import choice, whole
from ntkengine.choices import completing, word_or_number
from ntkengine.console import answered, print_json, remark, show
from ntkengine.errors import InputError
from ntkengine.filecommands import GramFile, Json

RidgeChoice = Annotated[
    str | None,
    typer.Option(
        help="loo, gcv, or a number in the unit of K/C, C outputs.",
        show_default="loo",
        autocompletion=completing("--ridge"),
    ),
]


@answered
def spectrum(
    path: GramFile,
    k: Annotated[int, typer.Option("-k", "--count", help="Eigenvalues to print.")] = 20,
    which: Annotated[
        str, typer.Option(help="LA largest, SA smallest, BE both ends.", autocompletion=completing("--which"))
    ] = "LA",
    as_json: Json = False,
) -> None:
    """Print extreme eigenvalues with their errors, and the condition number."""
    from ntkengine.report.findings import spectrum_table
    from ntkengine.report.tables import sketch_note
    from ntkengine.spectrum import condition_number, effective_rank, eigsh
    from ntkengine.store import open_gram

    k, which = whole("--count", k, 1), choice("--which", which, ("LA", "SA", "BE"))
    gram = open_gram(path)
    there = gram.shape[-1]
    ritz, condition = eigsh(gram, k=min(k, there), which=which), condition_number(gram)
    if as_json:
        found: dict[str, Any] = {name: getattr(ritz, name).tolist() for name in ("values", "residuals", "bounds")}
        told = {name: getattr(condition, name) for name in ("lambda_max", "lambda_min", "lower", "resolved")}
        told |= {"noise": condition.noise, "upper": condition.upper if condition.resolved else None}
        rank = effective_rank(gram)
        found |= {"certified": ritz.certified, "condition": told}
        print_json(
            {"path": str(path), **found, "effective_rank": rank, "effective_rank_error": rank.error, **_sketch(gram)}
        )
        return
    fewer = f"these are all {there} eigenvalues" if k > there else ""
    k = len(ritz.values)
    high = {"LA": k, "SA": 0, "BE": k - k // 2}[which]
    numbers = [*range(1, high + 1), *range(there - (k - high) + 1, there + 1)]
    show(spectrum_table(ritz, condition, sketch_note(gram), fewer, numbers))


@answered
def ridge(path: GramFile, ridge: RidgeChoice = None, as_json: Json = False) -> None:
    """Kernel ridge regression along the ridge path: train, leave-one-out, GCV and eval errors."""
    from ntkengine.gramfiles import forecast_file
    from ntkengine.report.findings import ridge_table
    from ntkengine.report.tables import sketch_note
    from ntkengine.store import open_gram

    chosen = _ridge(ridge)
    gram = open_gram(path)
    found = forecast_file(gram, chosen)
    if not as_json:
        show(ridge_table(found, sketch_note(gram)))
        return
    names = ("ridge", "ridge_loo", "ridge_gcv", "ridges", "train_mse", "loo_mse", "loo_accuracy", "gcv", "eval_mse")
    plain = found.to_dict()
    dimensions = [found.effective_dimension_at(r) for r in found.ridges]
    told = {name: plain[name] for name in (*names, "eval_accuracy")}
    told |= {"effective_dimension": dimensions, "effective_dimension_error": [d.error for d in dimensions]}
    print_json({"path": str(path), **told, **_sketch(gram)})


@answered
def forecast(
    path: Annotated[Path, typer.Argument(help="Gram file, or the job file that wrote it.", metavar="K.H5|JOB.TOML")],
    ridge: RidgeChoice = None,
    as_json: Json = False,
) -> None:
    """Forecast what fine-tuning will reach; of a job file, also what its own training will."""
    from ntkengine.gramfiles import forecast_file
    from ntkengine.jobchecks import check_stored, unsimulated
    from ntkengine.jobfile import read_job
    from ntkengine.report.findings import forecast_table
    from ntkengine.store import open_gram, read_progress

    chosen, recipe, job = _ridge(ridge), None, None
    if path.suffix == ".toml":
        job = read_job(path)
        recipe = None if job.finetune is None else job.finetune.recipe()
        if job.out is None:
            raise InputError(f"{path}: out: is missing, so there is no Gram file to read")
        check_stored(job, places=True)
        if not job.out.exists() and read_progress(job.out) is None:
            raise InputError(f"{job.out}: no such file; `ntkengine gram {path}` writes it")
        path, chosen = job.out, job.forecast.ridge if ridge is None else chosen
    gram = open_gram(path)
    notes = [] if job is None else unsimulated(job, bool(gram.modules))
    found = forecast_file(gram, chosen, None if notes else recipe)
    found.assumptions.extend(notes)
    if as_json:
        print_json({"path": str(path), **found.to_dict()})
        return
    show(forecast_table(found))
    remark(found.assumptions)


@answered
def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="Gram files, and what `select --save` (.json) and `finetune --history` (.jsonl) wrote.",
            metavar="K.H5|JSON|JSONL...",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML file to write.")] = Path("report.html"),
    ridge: RidgeChoice = None,
) -> None:
    """Write one self-contained HTML page over Gram files, rankings and fine-tunings."""
    from ntkengine.gramfiles import report_files
    from ntkengine.report import write_report
    from ntkengine.report.html import PAGE
    from ntkengine.textfile import check_folder

    check_folder(out, PAGE)
    print(write_report(out, report_files(paths, _ridge(ridge))))


def _ridge(given: str | None) -> str | float:
    return word_or_number("--ridge", given) or "loo"


def _sketch(gram: Any) -> dict[str, Any]:
    return {"sketch": gram.meta["sketch"]} if gram.meta.get("sketch") else {}
