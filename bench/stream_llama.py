"""A Llama of a billion parameters (bfloat16, random weights) streamed from its file within 1 GiB, against it loaded.

Each run is a fresh process; its peak is told over an empty process that has imported the same packages, and over one
that has imported nothing.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from bench.fresh import fresh, status
from bench.record import record

JOB = {"model": "Llama 16L/2048d, bfloat16", "N": 16, "T": 32, "C": 2, "params": "model.layers.*", "memory_gib": 1.0}
SHAPE = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "pad_token_id": 0,
}


def main() -> int:
    """Make the model, run both ways in fresh processes, compare, record a line."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = make(folder / "model")
        runs = {}
        for way in ("empty", "imports", "streamed", "loaded"):
            runs[way] = fresh("bench.fresh") if way == "empty" else fresh("bench.stream_llama", way, str(folder))
        streamed, loaded = (np.load(folder / f"{way}.npy") for way in ("streamed", "loaded"))
    difference = float(np.linalg.norm(streamed - loaded) / np.linalg.norm(loaded))
    peak = runs["streamed"]["peak_gib"]
    values = {
        "parameters": parameters,
        "gib_over_empty_process": peak - runs["empty"]["peak_gib"],
        "gib_over_imports": peak - runs["imports"]["peak_gib"],
        "loaded_gib_over_imports": runs["loaded"]["peak_gib"] - runs["imports"]["peak_gib"],
        "seconds": runs["streamed"]["seconds"],
        "loaded_seconds": runs["loaded"]["seconds"],
        "relative_difference": difference,
    }
    print(json.dumps(record("stream-llama", JOB, values), indent=1))
    return 0 if difference < 1e-5 else 1


def make(folder: Path) -> int:
    """Save the model; return its number of parameters."""
    import transformers as tf

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = tf.LlamaForSequenceClassification(tf.LlamaConfig(**SHAPE, num_labels=JOB["C"]))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def run(way: str, folder: Path) -> dict[str, float]:
    """Run one way in this process."""
    import ntkengine as ntk

    if way == "imports":
        import transformers as tf

        _ = tf.LlamaForSequenceClassification
        return {"peak_gib": status("VmHWM")}
    streamed = way == "streamed"
    model = ntk.load_model(folder / "model", num_labels=JOB["C"], stream=streamed)
    inputs = {"input_ids": torch.from_numpy(np.random.default_rng(0).integers(1, 32000, (JOB["N"], JOB["T"])))}
    budget = {"memory_gib": JOB["memory_gib"]} if streamed else {}
    start = time.perf_counter()
    gram = ntk.compute_gram(model, inputs, params=JOB["params"], **budget)
    seconds = time.perf_counter() - start
    np.save(folder / f"{way}.npy", np.asarray(gram))
    return {"peak_gib": status("VmHWM"), "seconds": seconds}


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], Path(sys.argv[2]))))
