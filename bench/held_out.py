"""Grams under five held-out heads, side by side in one sweep, against one sweep each."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np

from bench.planned import build
from bench.record import record
from bench.timing import gate, in_turn

JOBS: dict[str, dict[str, Any]] = {
    "lora": {"model": "bert", "N": 384, "T": 32, "lora": True, "params": "*lora_*", "readout": "margin"},
    "lora logits": {"model": "bert", "N": 384, "T": 32, "lora": True, "params": "*lora_*", "readout": "logits"},
    "all": {"model": "bert", "N": 128, "T": 32, "params": "all", "readout": "margin"},
    "all logits": {"model": "bert", "N": 128, "T": 32, "params": "all", "readout": "logits"},
}


def main() -> int:
    """Time both in turn, for adapters and for all parameters, margin and logits, print, and record a line each."""
    import ntkengine as ntk

    for name, job in JOBS.items():
        model, inputs = build(job)
        labels = np.arange(job["N"]) % 2
        head = ntk.fit_head(model, inputs, ntk.encode_targets(labels, "logits", 2) / 2)

        readout, params = job["readout"], job["params"]
        together = partial(ntk.cross_fit, model, inputs, head, readout=readout, params=params, check=False)
        apart = partial(_apart, together)
        alone = apart().grams
        off = np.linalg.norm(together().grams - alone) / np.linalg.norm(alone)
        gate(float(off), 1e-5, "side by side against apart")
        found = in_turn({"together": together, "apart": apart}, 3)
        values = {k: v for way, one in found.items() for k, v in one.values(f"{way}_seconds").items()}
        values |= {"ratio": found["apart"].seconds / found["together"].seconds, "relative_difference": float(off)}
        print(json.dumps(record("held-out", {"job": name, **job, "heads": 5}, values)))
    return 0


def _apart(together: Callable[[], Any]) -> Any:
    from ntkengine.gram import heldout

    with patch.object(heldout, "_has_room", lambda *_: False):
        return together()
