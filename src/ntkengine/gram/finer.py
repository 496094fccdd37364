"""What a float64 copy of the model is for: the check against plain autograd, what has a sign, and the noise."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import replace

import torch

from ntkengine.errors import CheckFailed, InputError, NonFinite, RankFailed
from ntkengine.gram.check import Check
from ntkengine.gram.frame import Frame
from ntkengine.gram.layout import Layout
from ntkengine.gram.noise import LIMIT, USUAL, Noise, estimate_noise
from ntkengine.gram.run import Sums
from ntkengine.gram.spread import Spread
from ntkengine.gram.task import Task, in_precision
from ntkengine.gram.transforms import SIGNS
from ntkengine.gram.truth import TURNED, UNSURE
from ntkengine.inputs.batches import Samples
from ntkengine.inputs.running import evaluation
from ntkengine.tangents.probe import probe
from ntkengine.tangents.structure import Structure

log = logging.getLogger(__name__)

# What a model may raise that does not run in float64.
_UNUSABLE = (NonFinite, RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)


def measures_noise(task: Task, *, check: bool) -> bool:
    """Whether a float64 copy of the model is made, for the noise or for what a sign is of."""
    return check or task.transform in SIGNS


def double_of(task: Task, running: ExitStack, *, lazy: bool) -> Task | None:
    """Return the task in float64, ready to run: itself, or on a copy; None where that fails, and no signs need it."""
    try:
        model = in_precision(task.model, "exact", task.readout, task.samples, lazy=lazy)
    except InputError as error:
        if task.transform in SIGNS:
            raise
        log.warning("%s: the noise of this Gram is unknown", error)
        return None
    if model is task.model:
        return task
    running.enter_context(evaluation(model))
    return task.on(model, torch.float64)


def checked_by_autograd(
    task: Task,
    double: Task | None,
    samples: Samples,
    frame: Frame,
    structure: Structure,
    seed: int,
    layout: Layout,
    precision: str,
) -> Check:
    """Return what plain autograd says of a few samples, whose gradients the sweep has reproduced.

    Both in float64, where the model runs in it and there is room: no rounding is mistaken for a fault, nor hides one.
    Else float64 settles what the job's own precision refuses. That this one is near enough is seen in the Gram's
    entries, and by the noise. Signs are those of the job's precision.

    Raises:
        CheckFailed: it has not.
    """
    given = samples, frame, structure, seed, layout
    finer = double is not None and double is not task and task.transform not in SIGNS and not structure.foreign
    if not finer or double is None:
        return _swept(task, *given, turned=TURNED.get(precision, UNSURE))
    first, second = (double, task) if layout.doubles else (task, double)
    try:
        return _swept(first, *given)
    except _UNUSABLE as error:
        if isinstance(error, CheckFailed) == layout.doubles or isinstance(error, InputError | torch.OutOfMemoryError):
            raise
        try:
            return _swept(second, *given)
        except _UNUSABLE as other:
            raise other if isinstance(other, CheckFailed) or layout.doubles else error from None


def _swept(
    task: Task, samples: Samples, frame: Frame, structure: Structure, seed: int, layout: Layout, turned: float = UNSURE
) -> Check:
    double = task.dtype == torch.float64
    held = replace(layout, gradients=layout.gradients // 2) if double else layout  # as many bytes
    found = Check(task, samples, frame, structure.on(task.model), seed, held, turned)
    found.sweep()
    return found


def without_sign(task: Task, structure: Structure, double: Task, seed: int) -> list[str]:
    """Return the parameters without a sign: float32 suspects them, float64 decides."""
    suspects = structure.negligible
    if not suspects or double is task:
        return suspects
    again = probe(double.model, double.selected, double.samples, double.readout, seed)
    return [n for n in again.negligible if n in suspects]


def noise_in_float64(
    task: Task,
    structure: Structure,
    samples: Samples,
    frame: Frame,
    sums: Sums | Spread,
    seed: int,
    double: Task,
    precision: str,
    layout: Layout,
    room: float,
    *,
    sketched: bool,
    alone: bool,
) -> Noise | None:
    """Return the noise of a finished Gram, measured in float64; None, with a warning, where the model has none.

    Args:
        task: as it was swept.
        structure: from the probe.
        samples: the job's.
        frame: the job's.
        sums: finished.
        seed: of the draw.
        double: the task in float64.
        precision: of the job.
        layout: the job's.
        room: bytes that it may take; infinity for a job without a bound.
        sketched: whether the Gram is a sketch.
        alone: whether examples are recomputed one by one, as where no entry of the Gram was compared with autograd's.

    Raises:
        CheckFailed: as `estimate_noise`.
    """
    expected, limit = float("inf") if precision == "fast" else USUAL, LIMIT[precision]
    if task.transform in SIGNS:  # which rounding turns, whatever its size
        limit = max(limit, LIMIT["high"])
    same = double is task
    other = structure.on(double.model)
    other = replace(other, one_by_one=other.one_by_one or same or alone, trim=other.trim and not same)
    try:
        return estimate_noise(
            double,
            other,
            samples,
            frame,
            sums,
            layout,
            room,
            seed=seed,
            expected=expected,
            limit=limit,
            sketched=sketched,
        )
    except _UNUSABLE as error:
        if same or isinstance(error, CheckFailed | InputError | RankFailed | torch.OutOfMemoryError):
            raise
        if sketched:  # its error is far above float32's
            given = task, structure, samples, frame, sums, seed, task, precision, layout, room
            return noise_in_float64(*given, sketched=True, alone=alone)
        log.warning("the model does not run in float64 (%s): the noise of this Gram is unknown", str(error)[:200])
        return None
