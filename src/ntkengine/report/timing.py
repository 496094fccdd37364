"""Where the time of a run went."""

from __future__ import annotations

from typing import Any

from ntkengine.report.tables import Table

_LEAST_S = 0.0005  # parts below are not told


def timing_table(gram: Any) -> Table | None:
    """Return the seconds of each part of the run that made a Gram, their shares and rates, as they were measured.

    Args:
        gram: as `compute_gram` returned it, with `write_seconds` in its `meta` and, of a job, `prepare_seconds` and
            `wall_seconds`; over ranks they are those of rank 0.

    Returns:
        None of a Gram that was only opened: it took no time.
    """
    meta = gram.meta
    if "write_seconds" not in meta:
        return None
    plan = gram.plan
    prepare, write = meta.get("prepare_seconds", 0.0), meta["write_seconds"]
    work = (plan.pass_flops + plan.projection_flops) / plan.ranks, sum(row.flops for row in plan.parameters)
    parts = [
        ("loading, tokens, head", prepare, "", ""),
        ("probe and plan", meta.get("plan_seconds", 0.0), "", ""),
        ("passes", meta["pass_seconds"], *_work(work[0], meta["pass_seconds"])),
        ("contractions", meta["contract_seconds"], *_work(work[1], meta["contract_seconds"])),
        ("checks and noise", meta.get("check_seconds", 0.0), "", ""),
        ("held-out heads", meta.get("extras_seconds", 0.0), "", ""),
        ("writing", write, *_bytes(gram, write)),
    ]
    known = sum(seconds for _, seconds, *_ in parts)
    # What is taken from checkpoints was computed by earlier runs, whose time `seconds` holds.
    total = max(meta.get("wall_seconds", 0.0), prepare + meta["seconds"] + write, known)
    parts.append(("other", total - known, "", ""))
    rows = [
        (name, _seconds(seconds), f"{seconds / total:.1%}", done, rate)
        for name, seconds, done, rate in parts
        if seconds >= _LEAST_S
    ]
    rows.append(("all", _seconds(total), "100.0%", "", ""))
    note = "times of the earlier runs are in it" if meta.get("resumed") else ""
    return Table("Time", ("part", "time (s)", "share", "work", "rate"), rows, note)


def _seconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _work(flops: float, seconds: float) -> tuple[str, str]:
    return f"{flops / 1e9:,.3g} GFLOP", f"{flops / max(seconds, 1e-9) / 1e9:,.3g} GFLOP/s"


def _bytes(gram: Any, seconds: float) -> tuple[str, str]:
    if gram.path is None or gram.meta.get("ranks"):
        return "", ""
    mb = gram.path.stat().st_size / 1e6
    return f"{mb:,.3g} MB", f"{mb / max(seconds, 1e-9):,.3g} MB/s"
