"""Run one benchmark by name."""

from __future__ import annotations

import sys
from importlib import import_module

# The modules are imported when asked for: kernels are, or are not, run in the interpreter from then on.
CASES = {
    "gram-vs-torch-func": "gram_vs_torch_func",
    "contraction": "contraction",
    "lora-passes": "lora_passes",
    "landmarks": "landmarks",
    "plan-accuracy": "plan_accuracy",
    "scaling": "scaling",
    "minilm-2048": "minilm_2048",
    "stream-llama": "stream_llama",
    "sketch": "sketch",
    "kernels": "kernels",
    "gpu-jobs": "gpu_jobs",
    "faults": "faults",
    "fuzz": "fuzz",
    "ranks": "ranks",
    "spectrum": "spectrum",
}


def main() -> int:
    """Run the named case."""
    if len(sys.argv) < 2 or sys.argv[1] not in CASES:
        print(f"usage: python -m bench [{' | '.join(CASES)}]", file=sys.stderr)
        return 2
    return import_module(f"bench.{CASES[sys.argv[1]]}").main()


if __name__ == "__main__":
    sys.exit(main())
