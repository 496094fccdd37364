"""A LoRA Gram against the passes that no method can do without.

The passes: one forward of every example, and one backward for each output with respect to activations, down to the
lowest adapter, by plain autograd, at the engine's own rate of products.
"""

from __future__ import annotations

import json

import torch

from bench.planned import build
from bench.record import record
from bench.timing import in_turn
from ntkengine.inputs.batches import Samples
from ntkengine.products import full_rate

JOB = {"model": "bert", "N": 512, "T": 32, "lora": True}


def main() -> int:
    """Time both in turn, print, and record a line."""
    import ntkengine as ntk

    model, inputs = build(JOB)
    model.requires_grad_(False)
    trainable = [name for name, _ in model.named_parameters() if "lora_" in name]

    def passes() -> None:
        samples = Samples([inputs])
        first = model.base_model.model.bert.encoder.layer[0]
        leaf: list[torch.Tensor] = []

        def cut(_m: torch.nn.Module, args: tuple) -> tuple:
            leaf[:] = [args[0].detach().requires_grad_(True)]
            return (leaf[0], *args[1:])

        handle = first.register_forward_pre_hook(cut)
        with full_rate():
            for chunk in samples.chunks:
                f = model(**samples.inputs(chunk, torch.device("cpu"), torch.float32)).logits
                for c in range(f.shape[1]):
                    torch.autograd.grad(f[:, c].sum(), leaf, retain_graph=c + 1 < f.shape[1])
        handle.remove()

    def gram(check: bool) -> None:
        ntk.compute_gram(model, inputs, params=trainable, check=check)

    jobs = {"passes": passes, "gram": lambda: gram(False), "gram_checked": lambda: gram(True)}
    gram(True)  # judged by plain autograd before anything is timed
    values: dict[str, float] = {}
    for name, found in in_turn(jobs, 5).items():
        values |= found.values(f"{name}_seconds")
    values |= {
        "ratio": values["gram_seconds"] / values["passes_seconds"],
        "ratio_checked": values["gram_checked_seconds"] / values["passes_seconds"],
    }
    print(json.dumps(record("lora-passes", JOB, values), indent=1))
    return 0
