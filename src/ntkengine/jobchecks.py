"""What of a job is refused before anything long begins."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ntkengine.arguments import SEEDS, number, whole
from ntkengine.errors import InputError
from ntkengine.jobparts import Job
from ntkengine.jobsources import marks
from ntkengine.prompts import check_prompts

log = logging.getLogger(__name__)

_ADDED = ("head.fitted", "classes")  # what a run adds to its settings


# Settings on which no value depends once model and examples are the same to the last bit.
_PLACES = ("model.path", "data.train", "data.eval")
_ANYWHERE = ("model.device", "model.stream")
_SOURCES = "sources"  # marks of the files


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
    for table, seed in (("model", model.seed), ("head", head.seed)):
        whole(f"{table}.seed", seed, 0, SEEDS)
    if not isinstance(job.forecast.ridge, str):
        number("forecast.ridge", job.forecast.ridge, above=0, what="'loo', 'gcv' or a number")
    elif job.forecast.ridge not in ("loo", "gcv"):
        raise InputError(f"forecast.ridge: expected 'loo', 'gcv' or a number > 0, got {job.forecast.ridge!r}")
    check_model(1 if model.num_labels is None else model.num_labels, model.dtype, model.device)
    check_source(model.path, model.allow_pickle)
    check_fit(head.ridge, head.folds, "head.")
    if job.out is not None:
        writable(job.out)


def check_file(job: Job) -> None:
    """Refuse an `out` that another job has written or begun, naming the first setting that differs.

    Raises:
        InputError: it is another job's, or the adapter, whose library takes seconds to load, is none.
    """
    from ntkengine.inputs.adapters import peft_config

    if job.model.peft is not None:
        peft_config(job.model.peft)
    check_stored(job)


def check_stored(job: Job, *, places: bool = False) -> None:
    """Refuse an `out` that another job has written or begun, naming the first setting that differs.

    Args:
        job: the job.
        places: whether files of other names count, and those that were changed since are warned of: where nobody will
            look at what is in them.

    Raises:
        InputError: it is another job's.
    """
    from ntkengine.report.tables import flat
    from ntkengine.store import parts_of

    stored = _stored(job)
    if stored is None or (places and "model" not in stored):  # of no job, but of a call in Python
        return
    there, here = dict(flat(stored)), dict(flat(job.settings()))
    for name in [*here, *(n for n in there if n not in (*here, *_ADDED))]:
        if name in _ANYWHERE or name.startswith(f"{_SOURCES}.") or (name in _PLACES and not places):
            continue
        found, wanted = there.get(name), here.get(name)
        if name in _PLACES and found and wanted:
            found, wanted = Path(found).name, Path(wanted).name
        if found != wanted:
            found, wanted = (repr(s[name]) if name in s else "not set" for s in (there, here))
            assert job.out is not None
            unfinished = f"{parts_of(job.out)} holds an unfinished run of another job"
            where = f"{job.out} holds another job" if job.out.exists() else unfinished
            raise InputError(f"out: {where}: {name} is {found} there, {wanted} here; name another file, or remove it")
    if places and (told := stored.get(_SOURCES)):
        now = marks(job)
        for name, mark in told.items():
            if name in now and now[name] != mark:
                log.warning(
                    "%s: what is there is not byte for byte what %s was begun with, whose figures these are; "
                    "`ntkengine gram` tells whether it is still the same job",
                    name,
                    job.out,
                )


def unsimulated(job: Job, modules: bool) -> list[str]:
    """Return a note where a forecast leaves out a job's training, for want of modules in its Gram; else nothing."""
    if job.finetune is None or job.finetune.optimizer != "adam" or modules:
        return []
    return [
        "forecast does not simulate the training of [finetune]: Adam scales each module's gradient by itself, which "
        "takes per_module = true in [gram]"
    ]


def told_settings(job: Job, *, read: bool = True) -> dict[str, Any]:
    """Return a job's settings, and marks of its files; what tells where it was worked on as its file or parts have it.

    A job goes on, and its file opens, in another folder: what defines values there is hashed to the last bit.

    Args:
        job: the job.
        read: whether its files of examples are what is read.
    """
    stored, found = _stored(job), job.settings()
    if stored is None:
        return found | ({_SOURCES: marks(job)} if read else {})
    if _SOURCES in stored:
        found[_SOURCES] = stored[_SOURCES]
    for name in (*_PLACES, *_ANYWHERE):
        part, key = name.split(".")
        if isinstance(stored.get(part), dict) and key in stored[part]:
            found[part][key] = stored[part][key]
    return found


def _stored(job: Job) -> dict[str, Any] | None:
    """Return the settings that a job's file or its parts were made by; None where there is neither."""
    from ntkengine.store import read_job, saved_states

    if job.out is None:
        return None
    if job.out.exists():
        stored = read_job(job.out)
    else:
        stored = next((state["job"] for state in saved_states(job.out)), {})
        if not stored:
            return None
    return stored.get("settings") or {}
