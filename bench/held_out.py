"""Grams under five held-out heads, side by side in one sweep, against one sweep each."""

from __future__ import annotations

import json
from typing import Any
from unittest.mock import patch

import numpy as np

from bench.planned import build
from bench.record import record
from bench.timing import gate, in_turn

JOBS: dict[str, dict[str, Any]] = {
    "lora": {"model": "bert", "N": 384, "T": 32, "lora": True, "params": "*lora_*"},
    "all": {"model": "bert", "N": 128, "T": 32, "params": "all"},
}


def main() -> int:
    """Time both in turn, for adapters and for all parameters, print, and record a line each."""
    import ntkengine as ntk
    from ntkengine.gram import heldout

    for name, job in JOBS.items():
        model, inputs = build(job)
        labels = np.arange(job["N"]) % 2
        head = ntk.fit_head(model, inputs, ntk.encode_targets(labels, "logits", 2) / 2)

        def grams(model: Any = model, inputs: Any = inputs, head: Any = head, job: Any = job) -> ntk.CrossFit:
            return ntk.cross_fit(model, inputs, head, readout="margin", params=job["params"], check=False)

        def apart(grams: Any = grams) -> ntk.CrossFit:
            with patch.object(heldout, "_has_room", lambda *_: False):
                return grams()

        off = np.linalg.norm(grams().grams - apart().grams) / np.linalg.norm(apart().grams)
        gate(float(off), 1e-5, "side by side against apart")
        found = in_turn({"together": grams, "apart": apart}, 3)
        values = {k: v for way, one in found.items() for k, v in one.values(f"{way}_seconds").items()}
        values |= {"ratio": found["apart"].seconds / found["together"].seconds, "relative_difference": float(off)}
        print(json.dumps(record("held-out", {"job": name, **job, "heads": 5}, values)))
    return 0
