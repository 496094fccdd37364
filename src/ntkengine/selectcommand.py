"""`ntkengine select`: which modules to adapt, before any training."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

from ntkengine.console import NOTHING_KEPT, answered, print_json, remark, show, showing_progress
from ntkengine.errors import InputError
from ntkengine.jobcommand import GRAM_ONLY, job_of, takes_job
from ntkengine.jobflags import (
    BatchSize,
    Epochs,
    LearningRate,
    Loss,
    Optimizer,
    choice,
    collect,
    flag,
)
from ntkengine.textfile import check_apart, check_folder, json_text, write_text

_PANEL = "Selection"


@partial(answered, how=NOTHING_KEPT)
@partial(takes_job, hides=("out",), refuses=GRAM_ONLY)
def select(
    *,
    subsets: Annotated[
        str, choice(_PANEL, "single, layers, types, greedy or all (default: types).", "--subsets")
    ] = "types",
    learning_rate: LearningRate = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    optimizer: Optimizer = None,
    loss: Loss = None,
    repeats: Annotated[int, flag(_PANEL, "Rehearsals of each subset (default: 3).")] = 3,
    size: Annotated[int | None, flag(_PANEL, "At most so many groups in a greedy subset.")] = None,
    kernels: Annotated[bool, flag(_PANEL, "Condition numbers too (default: yes).", "--kernels/--no-kernels")] = True,
    emit: Annotated[Path | None, flag(_PANEL, "Write the best as a peft.LoraConfig, JSON.")] = None,
    save: Annotated[Path | None, flag(_PANEL, "Write the ranking, JSON, for a report.")] = None,
    **flags: Any,
) -> None:
    """Rank modules for LoRA by what training them is forecast to reach."""
    from ntkengine.report.tables import Table
    from ntkengine.selectjob import run_select

    path, given, as_json = collect(**flags)
    if given["out"] is not None:
        raise InputError("--out: is for a Gram; name the file of the best configuration with --emit")
    check_apart(emit=emit, save=save)
    for target, mark in ((emit, '"peft_type"'), (save, '"choices"')):
        if target is not None:
            check_folder(target, mark)
    given["model"]["peft"] = {"peft_type": "LORA", **given["model"]["peft"]} if given["model"]["peft"] else {}
    given["finetune"] = {
        "learning_rate": learning_rate,
        "epochs": epochs,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "loss": loss,
        "seed": flags["seed"],
    }
    with showing_progress() as progress:
        found = run_select(job_of(path, given), progress, subsets=subsets, repeats=repeats, size=size, kernels=kernels)
    for target, content in ((emit, found.peft()), (save, found.to_dict())):
        if target is not None:
            write_text(target, json_text(content, indent=2) + "\n")
    if as_json:
        print_json(found.to_dict())
        return
    rows = found.table()
    show(Table("Modules by forecast eval loss", rows[0], rows[1:], found.table_note))
    remark(found.assumptions)
