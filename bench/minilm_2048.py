"""LoRA Gram of MiniLM-L6 on 2,048 movie snippets within 1 GiB: does the budget hold?"""

from __future__ import annotations

import json
import time
from pathlib import Path

from bench.planned import status
from bench.record import record

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
    ntk.compute_gram(model, {k: v[:8] for k, v in inputs.items()}, check=False)  # warm-up
    plan = ntk.plan_gram(model, inputs, memory_gib=1.0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    start = time.perf_counter()
    gram = ntk.compute_gram(model, inputs, memory_gib=1.0)
    values = {
        "seconds": time.perf_counter() - start,
        "planned_seconds": plan.seconds,
        "gib": status("VmHWM") - before,
        "planned_gib": plan.peak_bytes / 2**30,
        "noise_relative": gram.meta["noise_relative"],
        "hidden": plan.layout["hidden"],
    }
    print(json.dumps(record("minilm-2048", JOB, values), indent=1))
    return 0
