"""What `[finetune]` of a job does: the job's model really trained on the job's data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntkengine.errors import CheckFailed, InputError
from ntkengine.textfile import check_apart, check_folder, json_text, write_text

if TYPE_CHECKING:
    from ntkengine.finetune import FineTuning
    from ntkengine.jobparts import Job
    from ntkengine.prepared import Prepared

Progress = Callable[[float, float, str], None]

# Relative to the largest output, what one may differ by in a model saved and loaded: other batches round otherwise.
_NEAR = {"torch.float64": 1e-5, "torch.float32": 1e-4}


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
        CheckFailed: as `fine_tune`, or the saved model is not the one that was trained; no folder is written.
        NonFinite: training diverged; nothing is written.

    Cost: that of loading the model, of training, and with `save` of loading it again.
    """
    from ntkengine.finetune import fine_tune
    from ntkengine.finetune.train import check_trainable
    from ntkengine.inputs.parameters import select_parameters
    from ntkengine.jobchecks import check_early
    from ntkengine.prepared import Prepared, quiet
    from ntkengine.saving import check_savable, needs_base, save_model

    part = job.finetune
    if part is None:
        raise InputError("finetune: is missing; give the job a [finetune] table, or --learning-rate")
    if save is not None and save.exists():
        raise InputError(f"{save}: is there already; name a new folder for the model")
    check_apart(history=history, save=save)
    for path, mark in ((history, '{"recipe"'), (save, "")):
        if path is not None:
            check_folder(path, mark)
    tell = progress or quiet
    job = replace(job, out=None)
    check_early(job)
    prepared = Prepared(job, tell, None)
    targets = prepared.targets(prepared.train)
    if targets is None:
        raise InputError("finetune: expected labelled examples and readout 'logits' or 'margin'")
    check_trainable(select_parameters(prepared.model, job.gram.params))
    new = bool(getattr(prepared.model, "ntk_head_new", False)) or prepared.fits
    below = save is not None and (new or needs_base(prepared.model, job.gram.params))
    if save is not None:
        check_savable(prepared.model, below)
    prepared.fit_head(tell)
    run = fine_tune(
        prepared.model,
        prepared.inputs,
        targets,
        part.recipe(),
        params=job.gram.params,
        readout=prepared.readout,
        eval_inputs=prepared.eval_inputs,
        eval_targets=prepared.targets(prepared.eval),
        linear=part.linear,
        measure_every=part.measure_every,
        progress=progress,
    )
    if history is not None:
        _write_history(run, history)
    if save is not None:
        model = prepared.model
        del prepared.model  # two at a time may not fit
        save_model(model, save, below, lambda folder: _check_saved(job, folder, prepared, run))
    return run


def _write_history(run: FineTuning, path: Path) -> None:
    found = run.to_dict()
    first = {name: found[name] for name in ("recipe", "seconds", "measuring_seconds", "batch_losses")}
    write_text(path, "".join(json_text(line) + "\n" for line in (first, *found["history"])))


def _check_saved(job: Job, folder: Path, prepared: Prepared, run: FineTuning) -> None:
    """Load what was saved, and compare its outputs of some examples with those that training ended with.

    Raises:
        CheckFailed: it is another model.
    """
    import torch

    from ntkengine.inputs.batches import Samples
    from ntkengine.inputs.models import load_model
    from ntkengine.inputs.readout import resolve_readout
    from ntkengine.inputs.running import call_model, coarsest, evaluation
    from ntkengine.prompts import TASKS

    readout, n = resolve_readout(prepared.readout, "full"), len(run.outputs)
    rows = sorted({i * (n - 1) // 7 for i in range(8)})
    few = Samples([{k: v[rows] for k, v in prepared.inputs.items()}], microbatch=1, trim=False)
    part = job.model
    known: dict[str, Any] = {
        "trust_remote_code": part.trust_remote_code,
        "allow_pickle": part.allow_pickle,
        "stream": part.stream,
        "task": part.task or TASKS[0],
    }
    try:
        model = load_model(folder, prepared.num_labels, None, part.dtype, part.device, **known)
    except InputError as error:
        raise CheckFailed(f"save: what was saved cannot be loaded again ({error}): nothing is written") from error
    like = next(iter(model.parameters()))
    with evaluation(model), torch.no_grad():
        for chunk in few.chunks:
            row, inputs = rows[int(chunk.rows[0])], few.inputs(chunk, like.device, like.dtype)
            f = readout(call_model(model, inputs), inputs)
            truth = torch.from_numpy(run.outputs[row]).to(f.device)
            off = float((f[0].double() - truth).norm())
            if not off <= _NEAR.get(str(coarsest(model, f)), 5e-2) * float(abs(run.outputs).max()):
                raise CheckFailed(
                    f"save: what was saved, loaded again, gives another output of example {row} than training ended "
                    f"with, by {off:.1e}: nothing is written"
                )
