"""Run one benchmark by name."""

from __future__ import annotations

import sys

from bench import contraction, gram_vs_torch_func, landmarks, lora_passes, minilm_2048, plan_accuracy, scaling, sketch

CASES = {
    "gram-vs-torch-func": gram_vs_torch_func.main,
    "contraction": contraction.main,
    "lora-passes": lora_passes.main,
    "landmarks": landmarks.main,
    "plan-accuracy": plan_accuracy.main,
    "scaling": scaling.main,
    "minilm-2048": minilm_2048.main,
    "sketch": sketch.main,
}


def main() -> int:
    """Run the named case."""
    if len(sys.argv) != 2 or sys.argv[1] not in CASES:
        print(f"usage: python -m bench [{' | '.join(CASES)}]", file=sys.stderr)
        return 2
    return CASES[sys.argv[1]]()


if __name__ == "__main__":
    sys.exit(main())
