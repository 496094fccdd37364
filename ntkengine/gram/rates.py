"""What this machine does in a second on this job: measured on a piece of it, never guessed."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from ntkengine.gram.plan import Plan
from ntkengine.gram.strategies import contract, outer_costs
from ntkengine.gram.tiles import Accumulator, Frame
from ntkengine.inputs.batches import Samples
from ntkengine.inputs.readout import Readout
from ntkengine.inputs.running import call_model
from ntkengine.tangents.factors import Dense, Outer, ParameterFactors

_SAMPLES = 64  # of the contraction that is timed


def forward_seconds(model: nn.Module, samples: Samples, readout: Readout) -> float:
    """Return the seconds of one forward pass of all samples, from two runs of a middle microbatch."""
    parameter = next(iter(model.parameters()))
    chunk = samples.chunks[len(samples.chunks) // 2]
    inputs = samples.inputs(chunk, parameter.device, parameter.dtype)

    def run() -> None:
        with torch.no_grad():
            readout(call_model(model, inputs), inputs)

    lengths = samples.lengths[chunk.group][chunk.rows]
    share = float(lengths.sum()) / sum(float(found.sum()) for found in samples.lengths)
    return _best(run, parameter.device, 2) / share


def contraction_rate(
    plan: Plan, frame: Frame, dtype: torch.dtype, device: torch.device, *, kernels: bool = False
) -> float:
    """Return the flop/s of the job's largest contraction, on as many random samples as fit in a tenth of a second."""
    rows = [r for r in plan.parameters if r.strategy in ("materialise", "ghost") and r.tokens or r.features]
    rows = [row for row in rows if row.strategy != "lookup"]
    if not rows:
        return float("nan")
    row = max(rows, key=lambda r: r.flops)
    if row.features is not None:
        return _explicit_rate(row.features, min(_SAMPLES, plan.samples), frame, dtype, device, kernels=kernels)
    S, C, T = min(_SAMPLES, plan.samples), plan.outputs, row.tokens
    R = min(row.rows, max(64, int(2e9 / (2.0 * S * S * C * row.columns))))
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
