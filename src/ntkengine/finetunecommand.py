"""`ntkengine finetune`: train for real, and print what happened."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

from ntkengine.console import NOTHING_KEPT, answered, print_json, remark, show, showing_progress
from ntkengine.errors import InputError
from ntkengine.jobcommand import GRAM_ONLY, job_of, takes_job
from ntkengine.jobflags import (
    TRAINING,
    BatchSize,
    Epochs,
    LearningRate,
    Loss,
    Optimizer,
    collect,
    flag,
)


@partial(answered, how=NOTHING_KEPT)
@partial(takes_job, hides=("out",), refuses=(*GRAM_ONLY, "memory_gib"))
def finetune(
    *,
    learning_rate: LearningRate = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    optimizer: Optimizer = None,
    loss: Loss = None,
    proximal: Annotated[
        float | None, flag(TRAINING, "λ of (λ/2)‖θ − θ₀‖², as `forecast` tells it for its ridge (default: 0).")
    ] = None,
    linear: Annotated[bool | None, flag(TRAINING, "Train the linearised model along.", "--linear/--no-linear")] = None,
    history: Annotated[Path | None, flag(TRAINING, "JSON lines to write: the recipe, then every measurement.")] = None,
    save: Annotated[
        Path | None, flag(TRAINING, "New folder: the model, or the adapter, and a fitted head in base/.")
    ] = None,
    **flags: Any,
) -> None:
    """Train the job's model on the job's data."""
    from ntkengine.finetunejob import run_finetune
    from ntkengine.report.training import training_table

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
    with showing_progress("step") as progress:
        run = run_finetune(job_of(path, given), progress, history=history, save=save)
    if as_json:
        print_json(run.to_dict())
        return
    show(training_table(run.to_dict()))
    written = [f"the recipe and every measurement are in {history}"] if history is not None else []
    if save is not None:
        written.append(f"the model is in {save}, for ntk.load_model({str(save)!r})")
    remark(written)
