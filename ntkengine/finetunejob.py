"""`[finetune]` of a job, and what it does: the job's model really trained on the job's data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntkengine.errors import InputError
from ntkengine.recipe import Recipe
from ntkengine.textfile import check_apart, check_folder, json_text, write_text

if TYPE_CHECKING:
    from torch import nn

    from ntkengine.finetune import FineTuning
    from ntkengine.jobparts import Job

Progress = Callable[[float, float, str], None]


@dataclass(frozen=True)
class FinetunePart(Recipe):
    """[finetune]: the fields of a `Recipe`, and what is measured.

    Attributes:
        linear: train the exact linearised model along.
        measure_every: steps between measurements; default: after every epoch.
    """

    linear: bool = False
    measure_every: int | None = None

    def recipe(self) -> Recipe:
        """Return the recipe alone."""
        return Recipe(**{name: getattr(self, name) for name in Recipe.__dataclass_fields__})


def run_finetune(
    job: Job, progress: Progress | None = None, *, history: Path | None = None, save: Path | None = None
) -> FineTuning:
    """Run a job's fine-tuning: model, data, token ids, head, training.

    Args:
        job: the job; its [gram] says what is trained (params) and which outputs (readout), its `out` is not touched.
        progress: called with (done, in all, stage).
        history: JSON lines to write: the recipe, then every measurement.
        save: a new folder for the model, or for the adapter and, where that is not all that is new, the model below it.

    Returns:
        The run.

    Raises:
        InputError: the job cannot be trained, or `save` is there already.
        NonFinite: training diverged; nothing is written.
    """
    from ntkengine.finetune import fine_tune
    from ntkengine.jobchecks import check_early
    from ntkengine.prepared import Prepared, quiet

    part = job.finetune
    if part is None:
        raise InputError("finetune: is missing; give the job a [finetune] table, or --learning-rate")
    if save is not None and save.exists():
        raise InputError(f"{save}: is there already; name a new folder for the model")
    check_apart(history=history, save=save)
    for path in (history, save):
        if path is not None:
            check_folder(path)
    tell = progress or quiet
    job = replace(job, out=None)
    check_early(job)
    prepared = Prepared(job, tell, None)
    targets = prepared.targets(prepared.train)
    if targets is None:
        raise InputError("finetune: expected labelled examples and readout 'logits' or 'margin'")
    new = bool(getattr(prepared.model, "ntk_head_new", False))
    new |= prepared.fit_head(tell) is not None
    run = fine_tune(
        prepared.model,
        prepared.inputs,
        targets,
        part.recipe(),
        params=job.gram.params,
        readout=job.gram.readout,
        eval_inputs=prepared.eval_inputs,
        eval_targets=prepared.targets(prepared.eval),
        linear=part.linear,
        measure_every=part.measure_every,
        progress=progress,
    )
    if history is not None:
        _write_history(run, history)
    if save is not None:
        _save(prepared.model, save, new or _beside_adapter(prepared.model, job.gram.params))
    return run


def _write_history(run: FineTuning, path: Path) -> None:
    found = run.to_dict()
    first = {name: found[name] for name in ("recipe", "seconds", "measuring_seconds", "batch_losses")}
    write_text(path, "".join(json_text(line) + "\n" for line in (first, *found["history"])))


def _beside_adapter(model: nn.Module, params: Any) -> bool:
    """Whether parameters were trained that are not in an adapter's file."""
    if not hasattr(model, "peft_config"):
        return False
    from peft import get_peft_model_state_dict

    from ntkengine.inputs.parameters import select_parameters

    inside = {t.data_ptr() for t in get_peft_model_state_dict(model, save_embedding_layers=False).values()}
    return any(p.data_ptr() not in inside for p in select_parameters(model, params).values())


def _save(model: nn.Module, folder: Path, below: bool) -> None:
    """Save the model, whole or not at all; of an adapter also the model below it, if that is not what it was loaded as.

    An adapter's file has no head, nor what else was trained beside the adapter.
    """
    partial = folder.absolute().with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tuned: Any = model
    try:
        tuned.save_pretrained(partial)
        if tuned.ntk_tokenizer is not None:
            tuned.ntk_tokenizer.save_pretrained(partial)
        if hasattr(tuned, "peft_config") and below:
            base = tuned.unload() if hasattr(tuned.base_model, "unload") else tuned.get_base_model()
            base.save_pretrained(partial / "base")
            config = partial / "adapter_config.json"
            found = json.loads(config.read_text(encoding="utf-8"))
            found["base_model_name_or_path"] = str(folder.absolute() / "base")
            config.write_text(json.dumps(found, indent=2), encoding="utf-8")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
