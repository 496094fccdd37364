"""`ntkengine finetune`: train for real, and print what happened."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ntkengine.console import answered, print_json, show
from ntkengine.errors import InputError
from ntkengine.jobflags import collect, job_of, takes_job

_PANEL = "Training"
_COLUMNS = {
    "step": "step",
    "epoch": "epoch",
    "train_loss": "train loss",
    "train_accuracy": "accuracy",
    "eval_loss": "eval loss",
    "eval_accuracy": "accuracy",
    "displacement": "‖θ − θ₀‖",
    "linear_train_loss": "linear: train loss",
    "linear_eval_loss": "eval loss",
    "gap": "‖f − f̄‖",
    "relative_gap": "of ‖f − f₀‖",
    "divergence": "KL",
}


def _flag(help_text: str, *names: str) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=_PANEL, show_default=False)


@answered
@takes_job
def finetune(
    *,
    learning_rate: Annotated[float | None, _flag("Of the first step.")] = None,
    epochs: Annotated[int | None, _flag("Passes over the examples (default: 1).")] = None,
    batch_size: Annotated[int | None, _flag("Examples a step; 0: all (default: 32).")] = None,
    optimizer: Annotated[str | None, _flag("adam or sgd (default: adam).")] = None,
    loss: Annotated[str | None, _flag("squared or cross-entropy (default: squared).")] = None,
    proximal: Annotated[float | None, _flag("λ of (λ/2)‖θ − θ₀‖² (default: 0).")] = None,
    linear: Annotated[bool | None, _flag("Train the linearised model along.", "--linear/--no-linear")] = None,
    history: Annotated[Path | None, _flag("JSON lines to write: the recipe, then every measurement.")] = None,
    save: Annotated[Path | None, _flag("New folder for the adapter, or the model.")] = None,
    **flags: Any,
) -> None:
    """Train the job's model on the job's data."""
    from ntkengine.finetunejob import run_finetune
    from ntkengine.report.tables import Table
    from ntkengine.report.text import show_progress

    path, given, as_json = collect(**flags)
    if given["out"] is not None:
        raise InputError("--out: is for a Gram; name the file of the measurements with --history")
    given["finetune"] = {
        "learning_rate": learning_rate,
        "epochs": epochs,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "loss": loss,
        "proximal": proximal,
        "linear": linear,
        "seed": flags["seed"],
    }
    with show_progress() as progress:
        run = run_finetune(job_of(path, given), progress, history=history, save=save)
    if as_json:
        print_json(run.to_dict())
        return
    rows = run.table()
    kept = [i for i, name in enumerate(rows[0]) if name in _COLUMNS]
    told = [tuple(row[i] for i in kept) for row in rows[1:]]
    note = f"{run.seconds:.1f} s of training, {run.measuring_seconds:.1f} s of measuring"
    show(Table("Fine-tuning", tuple(_COLUMNS[rows[0][i]] for i in kept), told, note))
