"""All-parameter trace Gram of a MiniLM-sized BERT: the engine against torch.func's vmap(jacrev) and einsum.

The peer is the Jacobian contraction of PyTorch's NTK tutorial, kept within 24 GiB: in chunks of 8 samples (in one piece
it was killed for memory), with eager attention (scaled_dot_product_attention has no batching rule). `torch-func` takes
the Jacobians of x1 and of x2 as the tutorial does, `torch-func-once` only one for both, which the tutorial does not
offer. Each contender runs in a fresh process, so that peak memory is its own; the Grams are compared before any figure
is printed.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

from bench.record import record

CONFIG = {
    "model": "BERT 6L/384d, vocabulary 30522, random weights",
    "N": 64,
    "T": 32,
    "C": 2,
    "params": "all",
    "contraction": "trace",
    "dtype": "float32",
}
CHUNK = 8
RUNS = {"engine": 5, "engine-unchecked": 5, "engine-fast": 5, "torch-func": 1, "torch-func-once": 1}


def main() -> int:
    """Run every contender, compare, print and record."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in RUNS:
            target = Path(folder) / f"{name}.npy"
            done = subprocess.run(
                [sys.executable, "-m", "bench.gram_vs_torch_func", name, str(target)],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return 1
            found[name] = json.loads(done.stdout.splitlines()[-1]) | {"K": np.load(target)}
    K = {name: run.pop("K") for name, run in found.items()}
    difference = float(np.linalg.norm(K["engine"] - K["torch-func"]) / np.linalg.norm(K["engine"]))
    if not difference < 1e-3:
        print(f"the Grams differ by {difference:.1e}: not timed", file=sys.stderr)
        return 1
    seconds = {name: run["seconds"] for name, run in found.items()}
    values = {
        "ratio": seconds["torch-func"] / seconds["engine"],
        "ratio_unchecked": seconds["torch-func"] / seconds["engine-unchecked"],
        "ratio_once": seconds["torch-func-once"] / seconds["engine"],
        "ratio_once_unchecked": seconds["torch-func-once"] / seconds["engine-unchecked"],
        "ratio_fast": seconds["torch-func"] / seconds["engine-fast"],
        "fast_relative_difference": float(np.linalg.norm(K["engine-fast"] - K["engine"]) / np.linalg.norm(K["engine"])),
        "relative_difference": difference,
        **{f"{name.replace('-', '_')}_{key}": value for name, run in found.items() for key, value in run.items()},
    }
    line = record("gram-vs-torch-func", CONFIG, values)
    print(json.dumps(line, indent=1))
    return 0


def contender(name: str, target: Path) -> None:
    """Time one contender and save its Gram; print a JSON line."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=CONFIG["C"],
        attn_implementation="eager" if name.startswith("torch-func") else "sdpa",
    )
    model = BertForSequenceClassification(config).eval()
    inputs = {
        "input_ids": torch.randint(1000, 30000, (CONFIG["N"], CONFIG["T"]))
    }  # a mask breaks vmap in transformers 5
    loaded = peak_gib()
    if name.startswith("torch-func"):  # warm-up, small: the full Jacobian is 11 GiB
        torch_func(model, {k: v[:2] for k, v in inputs.items()}, name)
    else:
        engine(model, inputs, name)
    times = []
    for _ in range(RUNS[name]):
        start = time.perf_counter()
        K = (torch_func if name.startswith("torch-func") else engine)(model, inputs, name)
        times.append(time.perf_counter() - start)
    np.save(target, K)
    print(
        json.dumps(
            {
                "seconds": statistics.median(times),
                "seconds_min": min(times),
                "seconds_max": max(times),
                "peak_gib": peak_gib(),
                "loaded_gib": loaded,
            }
        )
    )


def engine(model: torch.nn.Module, inputs: dict[str, torch.Tensor], name: str) -> np.ndarray:
    """The engine; unchecked and fast leave out the comparison with autograd and the noise estimate."""
    import ntkengine as ntk

    precision = "fast" if name == "engine-fast" else "high"
    return np.asarray(ntk.compute_gram(model, inputs, params="all", check=name == "engine", precision=precision))


def torch_func(model: torch.nn.Module, inputs: dict[str, torch.Tensor], name: str) -> np.ndarray:
    """vmap(jacrev) over samples, then a sum of contractions over parameters."""
    params = {k: v.detach() for k, v in model.named_parameters()}

    def single(p: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        given = {"input_ids": ids[None]}
        return torch.func.functional_call(model, p, (), given).logits[0]

    ids = inputs["input_ids"]
    jacobian = torch.func.vmap(torch.func.jacrev(single), (None, 0))
    store: dict[str, torch.Tensor] = {}
    for start in [*range(0, len(ids), CHUNK)] * (1 if name == "torch-func-once" else 2):  # x2's overwrite x1's, equal
        for key, j in jacobian(params, ids[start : start + CHUNK]).items():
            if key not in store:
                store[key] = torch.empty(len(ids), CONFIG["C"], j[0, 0].numel())
            store[key][start : start + CHUNK] = j.flatten(2)
    return sum(torch.einsum("Naf,Maf->NM", store[key], store.pop(key)) for key in list(store)).numpy()


def peak_gib() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    contender(sys.argv[1], Path(sys.argv[2]))
