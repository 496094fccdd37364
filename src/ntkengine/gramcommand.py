"""`ntkengine plan` and `ntkengine gram`: what a job would do, and doing it, on one process or many."""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from signal import SIGINT
from typing import Annotated, Any

import typer

from ntkengine.cluster.launch import launched, one_voice
from ntkengine.console import answered, print_json, remark, show, showing_progress
from ntkengine.errors import InputError, Stopped
from ntkengine.filecommands import described
from ntkengine.jobcommand import job_of, takes_job
from ntkengine.jobflags import bandwidth, collect
from ntkengine.textfile import made_folder


@answered
@partial(takes_job, hides=("out", "resume", "checkpoint_s", "check"))
def plan(
    *,
    ranks: Annotated[int, typer.Option(help="Also predict the job on so many MPI ranks.")] = 1,
    gpus_per_node: Annotated[int | None, typer.Option(help="Of them on one host.", show_default="all")] = None,
    network: Annotated[
        str | None, typer.Option(help="Between hosts, e.g. 50GB/s or 400Gbit/s.", show_default="this host's memory")
    ] = None,
    **flags: Any,
) -> None:
    """Show what a job would do, before it does it. Takes the arguments of `gram`."""
    from ntkengine.jobchecks import unsimulated
    from ntkengine.jobs import run_plan
    from ntkengine.report.planned import plan_table

    path, given, as_json = collect(**flags)
    job = job_of(path, given)
    speed = None if network is None else bandwidth(network)
    with showing_progress() as progress:
        found = run_plan(job, progress, ranks=ranks, gpus_per_node=gpus_per_node, network=speed)
    if as_json:
        print_json(found.to_dict())
    else:
        show(plan_table(found))
        remark(unsimulated(job, job.gram.per_module))


@answered
@takes_job
def gram(
    *,
    log_dir: Annotated[
        Path | None, typer.Option(help="Folder: each process of an MPI job logs to its own file.", show_default=False)
    ] = None,
    **flags: Any,
) -> None:
    """Compute a Gram matrix and write it to a file: from a job file, flags, or both."""
    began = time.perf_counter()
    if log_dir is not None:
        made_folder(log_dir)
    team = launched()
    with one_voice(team, log_dir):
        _log_to(log_dir, 0 if team is None else team.rank)
        found = _run(team, flags)
        if team is not None and not team.root:
            return
        _tell(found, flags["as_json"], time.perf_counter() - began)


def _run(team: Any, flags: dict[str, Any]) -> Any:
    from ntkengine.jobchecks import unsimulated
    from ntkengine.jobs import run_gram
    from ntkengine.store import going_on

    with nullcontext() if team is None else team.together():
        path, given, as_json = collect(**flags)
        job = job_of(path, given)
        if job.out is None:
            raise InputError("--out: is missing; name the HDF5 file to write")
    if not as_json and (team is None or team.root):
        remark(unsimulated(job, job.gram.per_module))
    try:
        with showing_progress() as progress:
            return run_gram(job, progress, team=team)
    except KeyboardInterrupt as error:  # before the job listened to it, or for the second time
        if team is not None:
            raise
        raise Stopped(SIGINT, going_on(job.out)) from error


def _tell(found: Any, as_json: bool, seconds: float) -> None:
    from ntkengine.report.tables import gram_table, ranks_line
    from ntkengine.report.timing import timing_table

    if as_json:
        print_json(described(found))
        return
    show(gram_table(found, job=False))
    times = timing_table(found)
    if times is None:
        refilled = found.meta.get("refilled", False)
        told = (
            "had damaged tiles, which were computed again" if refilled else "was complete already: nothing was computed"
        )
        print(f"{found.path} {told}")
        return
    show(times)
    if found.meta.get("ranks"):
        print(ranks_line(found, seconds))


def _log_to(folder: Path | None, rank: int) -> None:
    """Log to a file of this rank's own."""
    if folder is None:
        return
    handler = logging.FileHandler(folder / f"rank-{rank}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("ntkengine").addHandler(handler)
    logging.getLogger("ntkengine").setLevel(logging.INFO)
