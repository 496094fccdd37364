"""A job from its description to a Gram, or to its plan."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ntkengine.jobchecks import check_early, told_settings
from ntkengine.jobparts import Job
from ntkengine.prepared import Pair, Prepared, Progress, Whole, quiet

if TYPE_CHECKING:
    from ntkengine.cluster.comm import Team
    from ntkengine.gram.plan import Plan
    from ntkengine.gram.result import Gram


def run_gram(
    job: Job, progress: Progress | None = None, *, examples: Pair | None = None, team: Team | None = None
) -> Gram:
    """Run a job: model, data, token ids, head, Gram, file.

    Whatever can be refused is refused before the first long computation, and a failed job leaves no file.

    Args:
        job: the job.
        progress: called with (flops done, flops in all, stage); loading has a total of 1.
        examples: (train, eval or None) to use instead of the job's files, which then only name them.
        team: the processes that share the job; each makes this call, and loads the model on its own GPU.

    Returns:
        The Gram, backed by its file when the job has an `out`; its `meta` also has this run's `prepare_seconds` and
        `wall_seconds`.

    Raises:
        InputError, CheckFailed, NonFinite: as `compute_gram`, `load_model`, `read_examples`.
    """
    from ntkengine.cluster.comm import together
    from ntkengine.gram.engine import compute_gram
    from ntkengine.inputs.keptheads import HEAD, head_array

    tell, began = progress or quiet, time.perf_counter()
    with together(team):
        check_early(job)
        prepared = Prepared(job, tell, examples, team)
        call = prepared.arguments()
        settings = told_settings(job, read=examples is None)
        fit = prepared.fit_head(tell) if team is None or team.root else None
    if team is not None:
        fit = team.broadcast(fit)
        if fit is not None and not team.root:
            fit.write(prepared.model, -1)
    settings |= {"head": settings["head"] | {"fitted": fit is not None}, "classes": list(prepared.train.label_names)}
    part, whole = job.gram, None if progress is None else Whole(progress, prepared.folds)
    extras: list[Any] = []
    if fit is not None:
        extras = [{HEAD: head_array(fit)}, lambda: prepared.cross_fit(fit, whole, team) if prepared.folds else {}]
    prepared_s = time.perf_counter() - began
    gram = compute_gram(
        prepared.model,
        prepared.inputs,
        **call,
        memory_gib=part.memory_gib,
        resume=part.resume,
        checkpoint_s=part.checkpoint_s,
        check=part.check,
        out=job.out,
        progress=None if whole is None else whole.first,
        targets=prepared.targets(prepared.train),
        eval_targets=prepared.targets(prepared.eval),
        example_ids=prepared.train.ids,
        eval_ids=None if prepared.eval is None else prepared.eval.ids,
        job=settings,
        extras=extras,
        comm=team,
    )
    gram.meta |= {"prepare_seconds": prepared_s, "wall_seconds": time.perf_counter() - began}
    return gram


def run_plan(job: Job, progress: Progress | None = None, **ranks: Any) -> Plan:
    """Return the plan of a job without running it; cost: loading, and about ten passes of three samples.

    Args:
        job: the job.
        progress: as `run_gram`.
        ranks: `ranks`, `gpus_per_node` and `network` of `plan_gram`.
    """
    from ntkengine.gram.foresight import plan_gram
    from ntkengine.gram.heldout import held_out_seconds
    from ntkengine.gram.scaling import check_ranks

    job = replace(job, out=None)
    check_early(job)
    check_ranks(ranks.get("ranks", 1), ranks.get("gpus_per_node"), ranks.get("network"))
    tell = progress or quiet
    prepared = Prepared(job, tell, None)
    call = prepared.arguments()
    part, inputs = job.gram, prepared.inputs
    tell(0.0, 1.0, "probing and timing a few examples")
    plan = plan_gram(prepared.model, inputs, **call, memory_gib=part.memory_gib, check=part.check, **ranks)
    if not prepared.folds:
        return plan
    share = len(prepared.train) / plan.samples
    seconds = held_out_seconds(plan, call, prepared.folds, prepared.num_labels, share)
    return replace(plan, held_out_grams=prepared.folds, held_out_seconds=seconds)
