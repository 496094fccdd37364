"""Sketched all-parameter Grams of a MiniLM-sized BERT: error and time against the features kept."""

from __future__ import annotations

import json
import os
import time

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

from bench.record import record

CONFIG = {
    "model": "BERT 6L/384d, vocabulary 30522, random weights",
    "N": 256,
    "T": 32,
    "C": 2,
    "params": "all",
    "contraction": "trace",
    "precision": "high",
}
FEATURES = (256, 1024, 4096, 16384)


def main() -> int:
    """Run exact and sketched once each, checked, and record a line for every k."""
    import ntkengine as ntk

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=CONFIG["C"]
    )
    model = BertForSequenceClassification(config).eval()
    inputs = {"input_ids": torch.randint(1000, 30000, (CONFIG["N"], CONFIG["T"]))}
    ntk.compute_gram(model, {k: v[:8] for k, v in inputs.items()}, params="all", check=False)  # warm-up
    start = time.perf_counter()
    exact = ntk.compute_gram(model, inputs, params="all")
    exact_seconds = time.perf_counter() - start
    K = np.asarray(exact.values)
    print(f"exact: {exact_seconds:.1f} s, of it contractions {exact.meta['contract_seconds']:.1f} s")
    for k in FEATURES:
        start = time.perf_counter()
        gram = ntk.compute_gram(model, inputs, params="all", sketch=k)
        seconds = time.perf_counter() - start
        error = np.asarray(gram.values) - K
        values = {
            "relative_error": float(np.linalg.norm(error) / np.linalg.norm(K)),
            "measured_relative_error": gram.meta["sketch"]["relative_error"],
            "predicted_relative_error": gram.meta["sketch"]["predicted"],
            "noise_over_true": gram.noise / float(np.linalg.norm(error, 2)),
            "parameters_sketched": gram.meta["sketch"]["parameters"],
            "seconds": seconds,
            "pass_seconds": gram.meta["pass_seconds"],
            "contract_seconds": gram.meta["contract_seconds"],
            "exact_seconds": exact_seconds,
            "exact_pass_seconds": exact.meta["pass_seconds"],
            "exact_contract_seconds": exact.meta["contract_seconds"],
            "load_average": os.getloadavg()[0],  # above the cores: other processes were timed along
        }
        print(json.dumps(record("sketch", CONFIG | {"k": k}, values), indent=1))
    return 0
