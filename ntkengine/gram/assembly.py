"""Finished sums put into the order and the form that users see."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
import transformers

from ntkengine.gram.plan import Plan
from ntkengine.gram.result import Gram
from ntkengine.gram.run import Sums
from ntkengine.gram.tiles import Frame, unsorted
from ntkengine.inputs.batches import Samples


def assemble(sums: Sums, samples: Samples, frame: Frame, plan: Plan, *, two: bool) -> Gram:
    """Return the Gram of finished sums, its rows and columns in the order of the examples.

    Args:
        sums: finished.
        samples: of the job.
        frame: of the job.
        plan: kept with it.
        two: rows and columns are different inputs.
    """
    rows = samples.sizes[0] * frame.width

    def order(matrix: np.ndarray, group: int, columns: int) -> np.ndarray:
        found = unsorted(matrix, samples, group, columns, frame.width)
        return found if frame.contraction == "per-output" else found[0]

    K = sums.total.K.cpu().numpy()
    outputs = [sums.outputs[slice(*samples.span(g))][samples.unsort(g)] for g in range(len(samples.sizes))]
    values = order(K[:, :rows], 0, 1 if two else 0)
    gram = Gram(values, outputs[0], frame.contraction, frame.transform, float("nan"), plan=plan)
    gram.modules = {
        name: order(part.K.cpu().numpy()[:, :rows], 0, 1 if two else 0) for name, part in sums.parts.items()
    }
    if two:
        gram.eval_outputs = outputs[1]
    elif len(samples.sizes) > 1:
        gram.cross, gram.eval_outputs = order(K[:, rows:], 1, 0), outputs[1]
    return gram


def as_float(array: Any) -> np.ndarray | None:
    """Return an array as float64, None as None."""
    return None if array is None else np.asarray(array, dtype=np.float64)


def surroundings(device: torch.device) -> dict[str, Any]:
    """Return when, on what, and with which versions this runs."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "device": name, "versions": versions}
