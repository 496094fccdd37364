"""Finished sums put into the order and the form that users see."""

from __future__ import annotations

import platform
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch import nn

from ntkengine.cluster.comm import Team
from ntkengine.gram.blocks import TOTAL
from ntkengine.gram.frame import unsorted
from ntkengine.gram.plan import Plan
from ntkengine.gram.result import Elsewhere, Gram
from ntkengine.gram.run import Sums
from ntkengine.gram.spread import Spread
from ntkengine.gram.versions import versions
from ntkengine.inputs.batches import Samples
from ntkengine.inputs.readout import Readout


def assemble(sums: Sums | Spread, samples: Samples, plan: Plan, *, two: bool, gather: bool) -> Gram:
    """Return the Gram of finished sums, its rows and columns in the order of the examples.

    Args:
        sums: finished; over ranks every rank makes this call.
        samples: of the job.
        plan: kept with it.
        two: rows and columns are different inputs.
        gather: over ranks: whether rank 0 gets the entries; otherwise each keeps its own.
    """
    frame = sums.frame
    rows = samples.sizes[0] * frame.width

    def order(K: np.ndarray | None, group: int, columns: int) -> Any:
        if K is None:
            shape = tuple(samples.sizes[g] * frame.width for g in (group, columns))
            return Elsewhere((frame.layers, *shape) if frame.contraction == "per-output" else shape)
        found = unsorted(K[:, :rows] if group == 0 else K[:, rows:], samples, group, columns, frame.width)
        return found if frame.contraction == "per-output" else found[0]

    def whole(part: str) -> np.ndarray | None:
        return sums.whole(part) if gather or isinstance(sums, Sums) else None

    K = whole(TOTAL)
    outputs = [sums.outputs[slice(*samples.span(g))][samples.unsort(g)] for g in range(len(samples.sizes))]
    values = order(K, 0, 1 if two else 0)
    gram = Gram(values, outputs[0], frame.contraction, frame.transform, float("nan"), plan=plan)
    gram.modules = {name: order(whole(name), 0, 1 if two else 0) for name in sums.parts}
    if two:
        gram.eval_outputs = outputs[1]
    elif len(samples.sizes) > 1:
        gram.cross, gram.eval_outputs = order(K, 1, 0), outputs[1]
        gram.cross_modules = {name: order(whole(name), 1, 0) for name in sums.parts}
    return gram


def shared(team: Team | None, gram: Gram | None) -> Gram:
    """Return rank 0's Gram; on the other ranks the same without the entries that rank 0 has.

    Args:
        team: the ranks; None: this process alone, which has it.
        gram: on rank 0 the finished one.
    """
    if team is None:
        assert gram is not None
        return gram
    told = None
    if gram is not None and team.root:
        far = {name: Elsewhere(matrix.shape) for name, matrix in gram.modules.items()}
        cross = None if gram.cross is None else Elsewhere(gram.cross.shape)
        crosses = {name: Elsewhere(matrix.shape) for name, matrix in gram.cross_modules.items()}
        told = replace(gram, values=Elsewhere(gram.shape), cross=cross, modules=far, cross_modules=crosses, extras={})
    found: Gram = team.broadcast(told)
    return gram if gram is not None and team.root else found


def as_float(array: Any) -> np.ndarray | None:
    """Return an array as float64, None as None."""
    return None if array is None else np.asarray(array, dtype=np.float64)


def surroundings(device: torch.device, model: nn.Module, readout: Readout) -> dict[str, Any]:
    """Return when, on what, and with which versions this runs."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": name,
        "versions": {"python": platform.python_version(), **versions(model, readout)},
    }
