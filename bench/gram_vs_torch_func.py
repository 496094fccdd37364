"""All-parameter trace Gram of a MiniLM-sized BERT, C = 2: the engine against torch.func's vmap(jacrev) and einsum.

The peer is `peers.torch_func`: the Jacobian contraction of PyTorch's NTK tutorial. Each contender runs in a fresh
process, judged before it is timed (`peers.run`).
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from bench.fresh import FailedError
from bench.peers import ENGINES
from bench.peers.run import Contest, differences
from bench.peers.work import WORKS
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
RUNS = (*ENGINES, "torch-func", "torch-func-once")


def main() -> int:
    """Run every contender, compare, print and record."""
    with tempfile.TemporaryDirectory() as folder:
        contest = Contest(WORKS["bert"] | {"C": CONFIG["C"]}, Path(folder), limit_s=600.0)
        found = {name: contest.run(name) for name in RUNS}
    for name, run in found.items():
        if "failure" in run:
            raise FailedError(f"{name}: {run['failure']}")
    K = {name: run.pop("K") for name, run in found.items()}
    seconds = {name: run["seconds"] for name, run in found.items()}
    values = {
        "ratio": seconds["torch-func"] / seconds["engine"],
        "ratio_unchecked": seconds["torch-func"] / seconds["engine-unchecked"],
        "ratio_once": seconds["torch-func-once"] / seconds["engine"],
        "ratio_once_unchecked": seconds["torch-func-once"] / seconds["engine-unchecked"],
        "ratio_fast": seconds["torch-func"] / seconds["engine-fast"],
        "ratio_fast_unchecked": seconds["torch-func"] / seconds["engine-fast-unchecked"],
        "fast_relative_difference": differences(K["engine-fast"], K["engine"])["relative_difference"],
        **differences(K["torch-func"], K["engine"]),
        **{f"{name.replace('-', '_')}_{key}": value for name, run in found.items() for key, value in run.items()},
    }
    print(json.dumps(record("gram-vs-torch-func", CONFIG, values), indent=1))
    return 0
