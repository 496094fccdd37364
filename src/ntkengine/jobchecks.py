"""What of a job is refused before anything long begins."""

from __future__ import annotations

from ntkengine.errors import InputError
from ntkengine.jobparts import Job
from ntkengine.prompts import check_prompts

_ADDED = ("head.fitted", "classes")  # what a run adds to its settings


def check_early(job: Job) -> None:
    """Refuse what can be refused without reading anything large.

    Raises:
        InputError: a wrong value, or a place that takes no file.
    """
    from ntkengine.gram.checkpoint import check_seconds
    from ntkengine.gram.identity import writable
    from ntkengine.gram.task import check_settings, refuse
    from ntkengine.inputs.heads import check_fit
    from ntkengine.inputs.hub import check_source
    from ntkengine.inputs.models import check_model
    from ntkengine.inputs.readout import resolve_readout

    part, model, head = job.gram, job.model, job.head
    refuse(part.transform, part.precision, part.backend, part.contraction, None, None, part.sketch, part.check)
    resolve_readout(part.readout, part.contraction)
    check_prompts(job)
    check_seconds(part.checkpoint_s)
    check_settings(part.memory_gib, part.seed)
    check_model(1 if model.num_labels is None else model.num_labels, model.dtype, model.device)
    check_source(model.path, model.allow_pickle)
    check_fit(head.ridge, head.folds)
    if job.out is not None:
        writable(job.out)


def check_file(job: Job) -> None:
    """Refuse an `out` that another job has written or begun, naming the first setting that differs.

    Raises:
        InputError: it is another job's, or the adapter, whose library takes seconds to load, is none.
    """
    from ntkengine.inputs.adapters import peft_config
    from ntkengine.report.tables import flat
    from ntkengine.store import parts_of, saved_states
    from ntkengine.store import read_job as stored_job

    if job.model.peft is not None:
        peft_config(job.model.peft)
    if job.out is None:
        return
    if job.out.exists():
        stored, where = stored_job(job.out), f"{job.out} holds another job"
    else:
        stored = next((state["job"] for state in saved_states(job.out)), {})
        where = f"{parts_of(job.out)} holds an unfinished run of another job"
        if not stored:
            return
    there, here = dict(flat(stored.get("settings") or {})), dict(flat(job.settings()))
    for name in [*here, *(n for n in there if n not in (*here, *_ADDED))]:
        if there.get(name) != here.get(name):
            found, wanted = (repr(s[name]) if name in s else "not set" for s in (there, here))
            raise InputError(f"out: {where}: {name} is {found} there, {wanted} here")
