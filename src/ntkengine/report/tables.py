"""What the terminal and the HTML report show of a job, a Plan or a Gram: tables of text, with units and errors.

Objects are taken by their public attributes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ntkengine.digits import above, between


@dataclass(frozen=True)
class Table:
    """Text in rows.

    Attributes:
        title: one line above.
        columns: headings; empty for label and value pairs.
        rows: cells.
        note: one line below, or empty.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


BEFORE = "before training"  # the last row of a ranking
# What the columns of a ranking are called wherever people see them.
RANKED = (
    "modules",
    "parameters",
    "eval loss (90 %)",
    "accuracy (90 %)",
    "train loss",
    "expected kernel's cond. number",
    "its bound",
)


def invariance_table(rows: Sequence[Any], advice: Sequence[str]) -> Table:
    """Return how far f and its gradient depend on batch and padding (`batch_invariance`), one row a way of running."""
    cells = [
        (r.precision, r.attention, *(f"{value:.1e}" for value in (r.batch, r.right, r.left, r.rounding))) for r in rows
    ]
    columns = ("precision", "attention", "in a batch", "padded right", "padded left", "rounding")
    return Table("Relative change of f and its gradient, against the text alone", columns, cells, "; ".join(advice))


def trained(recipe: Mapping[str, Any]) -> str:
    """Return a saved recipe in a few words."""
    return f"{recipe['optimizer']}, learning rate {recipe['learning_rate']:g}, {recipe['epochs']} epochs"


def progress_table(progress: Mapping[str, Any]) -> Table:
    """Return how far an unfinished job is (`store.read_progress`)."""
    now, running = time.time(), progress.get("running")
    state = {True: "running", False: "stopped: the same command goes on", None: "on another machine"}[running]
    if progress.get("damaged") and not running:
        state = "damaged tiles are open: the same command computes them again"
    rows = [("state", state)]
    if "pid" in progress:
        rows += [("by", f"process {progress['pid']} on {progress['host']}"), ("stage", str(progress.get("stage", "")))]
    done, total = progress.get("done", 0.0), progress.get("total", 0.0)
    if total > 1:
        rows.append(("done", f"{done / total:.0%}"))
    for label, key in (("started", "started"), ("last heard of", "at"), ("last checkpoint", "checkpoint")):
        if progress.get(key):
            rows.append((label, f"{now - progress[key]:.0f} s ago"))
    return Table("Not complete", (), rows)


def gram_table(gram: Any, job: bool = True) -> Table:
    """Return the facts of a Gram: what it is of, how it was computed, how far to trust it.

    Args:
        gram: the Gram.
        job: show its settings too.
    """
    meta, shape = gram.meta, tuple(gram.shape)
    settings = (meta.get("settings") or {}) if job else {}
    rows = [
        ("shape", f"{' × '.join(map(str, shape))} ({gram.contraction}, {gram.transform})"),
        ("error (spectral norm)", _noise(gram)),
        *(("approximation", line) for line in [sketch_note(gram)] if line),
        (
            "examples",
            f"{len(gram.outputs):,} train, {0 if gram.eval_outputs is None else len(gram.eval_outputs):,} eval",
        ),
        ("outputs", str(np.shape(gram.outputs)[1])),
    ]
    told = (
        ("readout", "readout", lambda v: _readout(v, meta)),
        ("parameters in the kernel", "parameters", lambda v: f"{v:,}"),
        ("parameters f does not use", "unused_parameters", lambda v: f"{len(v):,}" if v else ""),
        ("precision", "precision", str),
        ("wall time", "seconds", lambda v: f"{v:.1f} s"),
        ("  in passes", "pass_seconds", lambda v: f"{v:.1f} s"),
        ("  in contractions", "contract_seconds", lambda v: f"{v:.1f} s"),
        ("  taken from checkpoints", "resumed", lambda v: f"{v:,} contractions" if v else ""),
        ("device", "device", str),
        ("date", "date", str),
        ("checked by autograd", "checked", lambda v: "yes" if v else "no"),
        ("versions", "versions", lambda v: ", ".join(f"{name} {version}" for name, version in v.items())),
    )
    rows += [(label, shown) for label, key, show in told if meta.get(key) is not None and (shown := show(meta[key]))]
    if gram.plan is not None:
        rows.append(("work", f"{gram.plan.flops / 1e9:,.0f} GFLOP, {gram.plan.tokens:,} tokens"))
    rows += [
        ("module Grams", f"{len(gram.modules):,}"),
        ("targets", _shape(gram.targets)),
        ("eval × train Gram", _shape(gram.cross)),
        ("further arrays", ", ".join(f"{k} {_shape(v)}" for k, v in gram.extras.items()) or "none"),
    ]
    rows += [(f"job: {name}", value) for name, value in flat(settings)]
    return Table(str(gram.path) if gram.path else "Gram", (), rows)


def ranks_line(gram: Any, seconds: float) -> str:
    """Return what a job over several processes took, in one line.

    Args:
        gram: its Gram.
        seconds: of the whole command.
    """
    told = gram.meta["ranks"]
    unit = "rank-seconds" if str(gram.meta.get("device", "")).startswith("cpu") else "GPU-seconds"
    ranks = many(told["count"], "rank")
    return (
        f"{seconds:.1f} s on {ranks}: {seconds * told['count']:.1f} {unit}, {gram.plan.flops:.3g} flops, "
        f"{sum(told['sent_bytes']):.3g} bytes sent, {told['communication_share']:.1%} of the time in communication"
    )


def sketch_note(gram: Any) -> str:
    """Return what a sketched Gram must say of itself; empty for an exact one."""
    found = (getattr(gram, "meta", None) or {}).get("sketch")
    if not found:
        return ""
    error = f"relative error {above(found['relative_error'], 2)}"
    return f"sketched, k={found['features']:,}, {error}, {found['parameters']:,} parameters projected"


def span(value: tuple[float, float, float] | None) -> str:
    """Return an interval's (value, low, high) as text, rounded outwards; nothing for None."""
    return "" if value is None else between(*value)


def flat(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested settings as (dotted name, value) rows; unset ones are left out."""
    rows: list[tuple[str, str]] = []
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{name}.")
        elif value is not None:
            rows.append(
                (
                    prefix + name,
                    ", ".join(map(str, value))
                    if isinstance(value, Sequence | set) and not isinstance(value, str)
                    else str(value),
                )
            )
    return rows


def _noise(gram: Any) -> str:
    relative = gram.meta.get("noise_relative")
    if not np.isfinite(gram.noise):
        why = "the model does not run in float64" if gram.meta.get("checked") else "computed without the check"
        return f"not estimated ({why})"
    return f"± {above(gram.noise, 2)} gradient²" + ("" if relative is None else f", {above(relative, 1)} of the norm")


def _readout(name: str, meta: Mapping[str, Any]) -> str:
    """Return a readout's name; of label words, the words, each with its class."""
    asked = (meta.get("settings") or {}).get("gram") or {}
    words, classes = asked.get("words"), (meta.get("settings") or {}).get("classes") or []
    if not words:
        return str(name)
    paired = len(classes) == len(words)
    told = [f"{w!r} ({c})" for w, c in zip(words, classes, strict=True)] if paired else list(map(repr, words))
    return f"{asked.get('readout')} of {', '.join(told)}"


def _shape(array: Any) -> str:
    return "none" if array is None else " × ".join(map(str, np.shape(array))) or "one number"


def many(number: int, noun: str, plural: str = "s") -> str:
    """Return a number with its noun."""
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def shortened(names: Sequence[str]) -> list[str]:
    """Return dotted names without the parts that all begin with, but for the last of these."""
    split = [name.split(".") for name in names]
    common = 0
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common += 1
    common = min([common, *(len(parts) - 1 for parts in split)]) - 1
    return [".".join(["…", *parts[common:]]) for parts in split] if common > 0 else list(names)
