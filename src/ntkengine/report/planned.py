"""A plan as a table."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ntkengine.report.tables import Table, many, shortened


def scaling_note(scaling: Mapping[str, Any]) -> str:
    """Return what a job is predicted to take on many ranks.

    Args:
        scaling: `Plan.scaling`.
    """
    return (
        f"on {scaling['ranks']} ranks like this one about {scaling['seconds']:.1f} s: probe "
        f"{scaling['probe_seconds']:.1f}, passes {scaling['pass_seconds']:.1f}, contractions "
        f"{scaling['contract_seconds']:.1f}, checks {scaling.get('check_seconds', 0.0):.1f}, communication "
        f"{scaling['wait_seconds']:.2f} ({scaling['communication_share']:.1%}); each sends up to "
        f"{max(scaling['sent_bytes']):.3g} bytes at {scaling['bandwidth']:.3g} bytes/s"
    )


def plan_table(plan: Any) -> Table:
    """Return a plan with layers folded: one row for each kind of parameter and strategy."""
    found: dict[tuple[str, ...], list[Any]] = {}
    for row in plan.parameters:
        found.setdefault((re.sub(r"\.\d+(?=\.)", ".*", row.parameter), row.path, row.strategy), []).append(row)
    rows = [
        (
            label,
            str(len(same)),
            f"{same[0].rows}×{same[0].columns}",
            path,
            strategy,
            f"{sum(r.flops for r in same) / 1e9:,.2f}",
            f"{sum(r.seconds or 0.0 for r in same):,.2f}",
            f"{sum(r.bytes for r in same) / 2**20:,.1f}",
        )
        for label, ((_, path, strategy), same) in zip(shortened([k[0] for k in found]), found.items(), strict=True)
    ]
    note = (
        f"{many(plan.samples, 'example')}, {many(plan.tokens, 'token')}, {many(plan.outputs, 'output')}, "
        f"{many(plan.microbatches, 'microbatch', 'es')}; passes {plan.pass_flops / 1e9:,.1f} of "
        f"{plan.flops / 1e9:,.1f} GFLOP; peak {plan.peak_bytes / 2**20:,.0f} "
        f"MiB above the model; about {plan.seconds:.1f} s: probe {plan.probe_seconds:.1f}, passes "
        f"{plan.pass_seconds:.1f}, checks {plan.check_seconds:.1f}, contractions {plan.contract_seconds:.1f} at "
        f"{plan.rate / 1e9:,.0f} GFLOP/s"
    )
    if plan.held_out_grams:
        grams = f"{plan.held_out_grams} more Grams of the train examples, under held-out heads"
        note += f"; then about {plan.held_out_seconds:.1f} s for {grams}"
    if plan.scaling:
        note += f"; {scaling_note(plan.scaling)}"
    layout = plan.layout
    if projected := sum("sketched" in row.path for row in plan.parameters):
        sketched = f"{many(projected, 'parameter')} sketched"
        note += f"; approximate: {sketched}, {plan.projection_flops / 1e9:,.1f} GFLOP to project"
    if layout.get("hidden", "device") != "device":
        note += f"; hidden states wait on the {layout['hidden']}"
    if layout.get("factor_bytes", math.inf) < math.inf:
        note += f"; at most {layout['factor_bytes'] / 2**20:,.0f} MiB of factors at once"
    if layout.get("tile"):
        note += f"; tiles of {many(layout['tile'], 'example')}, {many(plan.sweeps, 'sweep')}"
    if plan.frozen:
        note += f"; {many(len(plan.frozen), 'parameter')} not selected ({plan.frozen[0]}, …)"
    if plan.unused:
        note += f"; f does not depend on {many(len(plan.unused), 'selected parameter')} ({plan.unused[0]}, …)"
    if plan.negligible:
        zero = f"{len(plan.negligible)} have a gradient of zero but for rounding ({plan.negligible[0]}, …)"
        note += f"; {zero}"
    slow = [row.parameter for row in plan.parameters if "explicit-block" in row.path]
    if slow:
        note += f"; {len(slow)} need plain autograd, one example at a time ({slow[0]}, …): slower"
    return Table("Plan", _PLAN, rows, note)


_PLAN = ("parameter", "uses", "size", "gradient", "strategy", "work (GFLOP)", "time (s)", "factors (MiB)")
