"""The benchmarks, as data."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True)
class Case:
    """A benchmark.

    Attributes:
        name: what it is called, and its lines' file.
        purpose: in one line.
        module: holds `main()`, or `main(arguments)` if it takes any; returns an exit status.
        minutes: about how long, on two cores or one GPU.
        needs: "gpu", "mpi", or a package.
        arguments: it takes, after `--`.
        watched: figures of its lines, the lower the better, of which `compare` looks for regressions.
    """

    name: str
    purpose: str
    module: str
    minutes: float
    needs: tuple[str, ...] = ()
    arguments: str = ""
    watched: tuple[str, ...] = ("seconds", "gib")

    def missing(self) -> list[str]:
        """Return what it needs and this machine, or this environment, has not."""
        return [need for need in self.needs if not _here(need)]


def _here(need: str) -> bool:
    if need == "gpu":
        import torch

        return torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
    return find_spec({"mpi": "mpi4py"}.get(need, need)) is not None


_PEERS = ("engine_seconds", "engine_unchecked_seconds", "engine_gib")
_KERNELS = ("syrk_s", "ghost_s", "pack_s", "lookup_s", "gram_s", "materialise_s")
_JOBS = ("seconds", "peak_gib")
CASES = {
    case.name: case
    for case in (
        Case("peers", "the engine and six other ways to the same Gram", "peers.run", 20, (), "[PEER…]", _PEERS),
        Case(
            "gram-vs-torch-func",
            "all parameters, C = 2, against vmap(jacrev): ratios of time",
            "gram_vs_torch_func",
            2,
            watched=("engine_seconds", "engine_unchecked_seconds", "engine_fast_seconds", "engine_gib"),
        ),
        Case("contraction", "contractions of one BERT layer against the machine's rate", "contraction", 3),
        Case(
            "lora-passes",
            "a LoRA Gram against the passes no method can do without",
            "lora_passes",
            1,
            watched=("gram_seconds", "gram_checked_seconds"),
        ),
        Case(
            "held-out",
            "Grams under held-out heads, side by side against apart",
            "held_out",
            3,
            watched=("together_seconds",),
        ),
        Case("landmarks", "columns of a few landmarks against the whole Gram", "landmarks", 1),
        Case("sketch", "sketched Grams: error and time against the features kept", "sketch", 5),
        Case("plan-accuracy", "what the plan says against what jobs take", "plan_accuracy", 2),
        Case("scaling", "time and memory against N, T, P and C, with the plan's", "scaling", 8),
        Case("ranks", "one job on several MPI ranks, with the plan's time and bytes", "ranks", 2, ("mpi",), "[COUNT…]"),
        Case("minilm-2048", "a LoRA Gram of 2,048 snippets within 1 GiB", "minilm_2048", 2),
        Case("stream-llama", "a billion parameters streamed within 1 GiB, against loaded", "stream_llama", 6),
        Case("spectrum", "eigenvalues and solves against their peers", "spectrum", 8, (), "[SECTION…]"),
        Case("faults", "the long fault campaign: what is lost must be 0", "faults", 20, (), "[--kills N …]", ()),
        Case("fuzz", "malformed inputs against every reader: faults must be 0", "fuzz", 3, (), "[--inputs N …]", ()),
        Case("kernels", "Triton kernels: error, time, share of the roofline", "kernels", 2, ("gpu",), "", _KERNELS),
        Case("gpu-jobs", "whole Grams on one GPU against the flop floor", "gpu_jobs", 4, ("gpu",), "[JOB…]", _JOBS),
    )
}
