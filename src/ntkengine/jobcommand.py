"""A command that takes a job: the flags of all jobs beside its own, and the job that they and a file make."""

from __future__ import annotations

import copy
import functools
import inspect
import typing
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any

from ntkengine.errors import InputError
from ntkengine.jobfile import make_job, merged, read_job
from ntkengine.jobflags import collect
from ntkengine.jobparts import Job

# Of a Gram's way and file alone: commands that make none have no use for them, whatever a job file says.
GRAM_ONLY = (
    "contraction",
    "transform",
    "per_module",
    "precision",
    "backend",
    "sketch",
    "check",
    "resume",
    "checkpoint_s",
)


def takes_job(
    command: Callable[..., None], *, hides: Collection[str] = (), refuses: Collection[str] = ()
) -> Callable[..., None]:
    """Give a command `collect`'s flags besides its own keyword-only ones; it gets them as keywords.

    Args:
        command: which takes them.
        hides: flags that its help leaves out.
        refuses: flags that it has no use for, hidden as well.
    """
    own = inspect.signature(command, eval_str=True).parameters.values()
    shared = [
        _hidden(p) if p.name in (*hides, *refuses) else p
        for p in inspect.signature(collect, eval_str=True).parameters.values()
    ]
    every = [*shared, *(p.replace(kind=p.POSITIONAL_OR_KEYWORD) for p in own if p.kind is p.KEYWORD_ONLY)]

    @functools.wraps(command)
    def run(**flags: Any) -> None:
        for name in refuses:
            if flags[name] is not None:
                raise InputError(f"--{name.replace('_', '-')}: is of a Gram, {command.__name__} has no use for it")
        command(**flags)

    del run.__wrapped__
    run.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in every}
    return run


def _hidden(parameter: inspect.Parameter) -> inspect.Parameter:
    kind, option = typing.get_args(parameter.annotation)
    option = copy.copy(option)
    option.hidden = True
    return parameter.replace(annotation=Annotated[kind, option])


def job_of(path: Path | None, flags: dict[str, Any]) -> Job:
    """Return the job of a job file and flags, or of flags alone.

    Raises:
        InputError: a missing or wrong value; the flag that would give it is named.
    """
    if path is not None:
        job = read_job(path, flags)
    else:
        for part, key, flag in (("model", "path", "--model"), ("data", "train", "--data")):
            if flags[part][key] is None:
                raise InputError(f"{flag}: is missing; give it, or a job file")
        job = make_job(merged({}, flags), "flags")
    if job.model.peft is not None and "peft_type" not in job.model.peft:
        raise InputError(
            f"--peft: is missing, but the adapter's {', '.join(job.model.peft)} is given; e.g. --peft lora"
        )
    return job
