"""LoRA Gram of MiniLM-L6 on 2,048 movie snippets within 1 GiB: does the budget hold?"""

from __future__ import annotations

import json

from bench.fresh import Memory
from bench.record import record
from bench.timing import timed

JOB = {"model": "MiniLM-L6", "N": 2048, "lora": "query,value r=8", "memory_gib": 1.0}


def main() -> int:
    """Run it once, checked, and record a line."""
    import ntkengine as ntk
    from ntkengine import assets

    found = assets.fetch_demo()
    peft = {"peft_type": "LORA", "r": 8, "target_modules": ["query", "value"]}
    model = ntk.load_model(found.model_dir, peft=peft)
    examples, _ = assets.movie_snippets(found.snippets, JOB["N"], 10, seed=0)
    inputs = ntk.tokenize(examples, model)
    ntk.compute_gram(model, {k: v[:8] for k, v in inputs.items()}, check=True)  # warm-up, and judged
    plan = ntk.plan_gram(model, inputs, memory_gib=1.0)
    with Memory() as memory:
        found = timed(lambda: ntk.compute_gram(model, inputs, memory_gib=1.0), warm=False, repeats=1)
    gram = found.result
    values = {
        **found.values(),
        "planned_seconds": plan.seconds,
        "gib": memory.gib,
        "planned_gib": plan.peak_bytes / 2**30,
        "noise_relative": gram.meta["noise_relative"],
        "hidden": plan.layout["hidden"],
    }
    print(json.dumps(record("minilm-2048", JOB, values), indent=1))
    return 0
