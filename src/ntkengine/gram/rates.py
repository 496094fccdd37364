"""What this machine does in a second on this job: measured on a piece of it, never guessed."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Mapping

import torch

from ntkengine.gram.anew import drawn_of
from ntkengine.gram.frame import Frame
from ntkengine.gram.layout import Layout
from ntkengine.gram.noise import recomputed
from ntkengine.gram.plan import Plan
from ntkengine.gram.strategies import contract, outer_costs
from ntkengine.gram.task import Task
from ntkengine.gram.tiles import Accumulator
from ntkengine.gram.truth import DRAWN
from ntkengine.inputs.batches import Samples
from ntkengine.tangents.factors import Dense, Outer, ParameterFactors
from ntkengine.tangents.sketch import Sketch
from ntkengine.tangents.structure import Structure
from ntkengine.tangents.sweep import KEEP_BYTES, Sweep

_SAMPLES = 512  # of the contraction that is timed: products of fewer run slower
_FLOPS = 1e10
_PAGES = 64 << 20  # bytes touched to time the first touch


def sweep_seconds(
    task: Task,
    structure: Structure,
    plan: Plan,
    layout: Layout,
    samples: Samples,
    sketches: Mapping[str, Sketch],
    kept: int,
) -> tuple[float, dict[str, int]]:
    """Return the seconds of the passes over all samples: a middle microbatch swept alone, at the best of two runs.

    And the tokens that count for each of its parameters, where output gradients of the others are zero.

    Args:
        task: in the precision it will run in.
        structure: from the probe.
        plan: the job's, for its factors' sizes.
        layout: what is held at once, and where.
        samples: the job's.
        sketches: by parameter, what is kept of its gradient.
        kept: microbatches whose activations are kept rather than recomputed.
    """
    chunk = samples.chunks[len(samples.chunks) // 2]
    rows = torch.from_numpy(chunk.rows.copy())
    group = {k: v[rows.to(v.device)] for k, v in samples.groups[chunk.group].items()}
    few = Samples([group], microbatch=chunk.n, trim=structure.trim)
    sizes = {row.parameter: row.bytes for row in plan.parameters}
    limit = layout.factor_bytes / layout.share(plan.samples)
    tokens: dict[str, int] = {}

    def run(keep: int) -> Callable[[], None]:
        def sweep() -> None:
            passes = Sweep(
                task.model,
                task.selected,
                structure,
                few,
                task.readout,
                keep_bytes=keep,
                hidden=layout.hidden,
                factor_bytes=sizes,
                limit=limit,
                sketches=sketches,
            )
            for _, found in passes.segments():
                tokens.update({factors.name: factors.tokens for factors in found if factors.name not in sketches})

        return sweep

    length = float(samples.lengths[chunk.group][chunk.rows].sum())
    each = sum(float(found.sum()) for found in samples.lengths) / len(samples.chunks) / length
    seconds = 0.0
    for count, keep in ((kept, KEEP_BYTES), (len(samples.chunks) - kept, 0)):
        if count:
            seconds += count * each * _best(run(keep), task.device, 2)
    width = int(samples.lengths[chunk.group][chunk.rows].max())
    return seconds, {name: found for name, found in tokens.items() if found < width}


def checks_seconds(task: Task, plan: Plan, samples: Samples, seconds: float) -> float:
    """Return the seconds of the checks and the noise, from what a token costs in the sweep.

    Plain autograd has gradients of weights besides, float64 takes twice as long, and where all weights are selected as
    much again goes into their gradients; what a few single examples take is half of what the probe took.

    Args:
        task: the job.
        plan: with its probe's time.
        samples: the job's.
        seconds: of the passes over all samples, once.
    """
    sizes = enumerate(samples.sizes)
    rows = recomputed(samples.total, sketched=plan.projection_flops > 0) + DRAWN
    tokens = sum(drawn_of(samples, g) * samples.width(g) + 2 * min(n, rows) * samples.mean_tokens for g, n in sizes)
    plain = (1 + 2 * plan.outputs) / (2 + plan.outputs)
    chosen, every = (sum(p.numel() for p in ps) for ps in (task.selected.values(), task.model.parameters()))
    return (1 + chosen / every) * (plan.probe_seconds / 2 + plain * seconds * tokens / plan.tokens)


def page_seconds(peak_bytes: float, device: torch.device) -> float:
    """Return the seconds it takes the system to hand out so much memory for the first time; 0 on a GPU."""
    if device.type != "cpu":
        return 0.0
    pages = torch.frombuffer(mmap.mmap(-1, _PAGES), dtype=torch.float32)
    start = time.perf_counter()
    pages.fill_(0.0)
    middle = time.perf_counter()
    pages.fill_(0.0)
    again = time.perf_counter() - middle
    return peak_bytes / _PAGES * max(0.0, middle - start - again)


def contraction_rate(plan: Plan, frame: Frame, dtype: torch.dtype, device: torch.device, *, kernels: bool) -> float:
    """Return the flop/s of the job's largest contraction, on as many random samples as fit in a tenth of a second."""
    rows = [r for r in plan.parameters if r.strategy in ("materialise", "ghost") and r.tokens or r.features]
    rows = [row for row in rows if row.strategy != "lookup"]
    if not rows:
        return float("nan")
    row = max(rows, key=lambda r: r.flops)
    if row.features is not None:
        return _explicit_rate(row.features, min(_SAMPLES, plan.samples), frame, dtype, device, kernels=kernels)
    S, C, T = min(_SAMPLES, plan.samples), plan.outputs, row.tokens
    R = min(row.rows, max(16, int(_FLOPS / (2.0 * S * S * C * row.columns))))
    a = torch.randn(S, T, row.columns, device=device).to(dtype)
    d = torch.randn(S, C, T, R, device=device).to(dtype)
    factors = ParameterFactors(row.parameter, (R, row.columns), [S], [[Outer(a, d)]])
    small = Frame((0, S), (0, S), C, frame.contraction)
    total = Accumulator(small, device, kernels=kernels)
    flops = outer_costs((R, row.columns), T, S, small)[row.strategy]
    return flops / _best(lambda: contract(factors, row.strategy, total), device, 3)


def _explicit_rate(
    features: int, samples: int, frame: Frame, dtype: torch.dtype, device: torch.device, *, kernels: bool
) -> float:
    small = Frame((0, samples), (0, samples), frame.outputs, frame.contraction)
    g = torch.randn(samples, frame.outputs, max(1, features // 8), min(8, features), device=device).to(dtype)
    factors = ParameterFactors("", (g.shape[2], g.shape[3]), [samples], [[Dense(g)]])
    total = Accumulator(small, device, kernels=kernels)
    flops = small.computed * small.outputs * small.width * 2.0 * g[0, 0].numel()
    return flops / _best(lambda: contract(factors, "explicit", total), device, 3)


def _best(run: Callable[[], None], device: torch.device, times: int) -> float:
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
