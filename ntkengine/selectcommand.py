"""`ntkengine select`: which modules to adapt, before any training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ntkengine.console import answered, print_json, show
from ntkengine.errors import InputError
from ntkengine.jobflags import collect, job_of, takes_job

_PANEL = "Selection"


def _flag(help_text: str, *names: str) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=_PANEL, show_default=False)


@answered
@takes_job
def select(
    *,
    subsets: Annotated[str, _flag("single, layers, types, greedy or all (default: types).")] = "types",
    learning_rate: Annotated[float | None, _flag("Of the training that will be done.")] = None,
    epochs: Annotated[int | None, _flag("Passes over the examples (default: 1).")] = None,
    batch_size: Annotated[int | None, _flag("Examples a step; 0: all (default: 32).")] = None,
    optimizer: Annotated[str | None, _flag("adam or sgd (default: adam).")] = None,
    loss: Annotated[str | None, _flag("squared or cross-entropy (default: squared).")] = None,
    repeats: Annotated[int, _flag("Rehearsals of each subset (default: 3).")] = 3,
    size: Annotated[int | None, _flag("At most so many groups in a greedy subset.")] = None,
    kernels: Annotated[bool, _flag("Condition numbers too (default: yes).", "--kernels/--no-kernels")] = True,
    emit: Annotated[Path | None, _flag("Write the best as a peft.LoraConfig, JSON.")] = None,
    save: Annotated[Path | None, _flag("Write the ranking, JSON, for a report.")] = None,
    **flags: Any,
) -> None:
    """Rank modules for LoRA by what training them is forecast to reach."""
    from ntkengine.report.tables import Table
    from ntkengine.report.text import show_progress
    from ntkengine.selectjob import run_select

    path, given, as_json = collect(**flags)
    if given["out"] is not None:
        raise InputError("--out: is for a Gram; name the file of the best configuration with --emit")
    for target in (emit, save):
        if target is not None and not target.absolute().parent.is_dir():
            raise InputError(f"{target}: folder {target.parent} does not exist")
    given["model"]["peft"] = {"peft_type": "LORA", **given["model"]["peft"]} if given["model"]["peft"] else {}
    given["finetune"] = {
        "learning_rate": learning_rate,
        "epochs": epochs,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "loss": loss,
        "seed": flags["seed"],
    }
    with show_progress() as progress:
        found = run_select(job_of(path, given), progress, subsets=subsets, repeats=repeats, size=size, kernels=kernels)
    for target, content in ((emit, found.peft()), (save, found.to_dict())):
        if target is not None:
            partial = target.with_name(f".{target.name}.partial")
            partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            partial.replace(target)
    if as_json:
        print_json(found.to_dict())
        return
    rows = found.table()
    r = found.recipe
    note = f"LoRA of rank {found.rank}, {r.optimizer}, learning rate {r.learning_rate:g}, epochs {r.epochs}"
    show(Table("Modules by forecast eval loss", rows[0], rows[1:], note))
    for line in found.assumptions:
        print(f"- {line}")
