"""One job, planned and then run in a fresh process: the plan's time and memory beside what it took."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import transformers as tf

from bench.fresh import Memory, fresh
from bench.timing import timed

BERT = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
LLAMA = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1376}
ARGUMENTS = ("params", "memory_gib", "contraction", "precision", "sketch")


def measured(job: dict[str, Any]) -> dict[str, Any]:
    """Return planned and measured seconds and GiB of a job, and their ratios.

    Raises:
        FailedError: the job failed.
    """
    found = fresh("bench.planned", json.dumps(job))
    ratios = {f"{unit}_ratio": found[f"planned_{unit}"] / found[unit] for unit in ("seconds", "gib")}
    return found | ratios


def build(job: dict[str, Any]) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Return a job's model (random weights; `config` changes its shape) and inputs."""
    torch.manual_seed(0)
    C = job.get("C", 2)
    if job["model"] == "bert":
        model = tf.BertForSequenceClassification(tf.BertConfig(**BERT | job.get("config", {}), num_labels=C)).eval()
    else:
        shape = LLAMA | {"vocab_size": 32000, "num_key_value_heads": 4, "pad_token_id": 0} | job.get("config", {})
        model = tf.LlamaForSequenceClassification(tf.LlamaConfig(**shape, num_labels=C)).eval()
    if job.get("lora"):
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["query", "value"])).eval()
    ids = torch.randint(1000, 30000, (job["N"], job["T"]))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Plan and run one job in this process."""
    import ntkengine as ntk

    model, inputs = build(job)
    arguments = {k: job[k] for k in ARGUMENTS if k in job}
    ntk.compute_gram(model, {k: v[:8] for k, v in inputs.items()}, **arguments)  # warm-up
    plan = ntk.plan_gram(model, inputs, **arguments)
    with Memory() as memory:
        found = timed(lambda: ntk.compute_gram(model, inputs, **arguments), warm=False, repeats=3, most_s=10)
    gram = found.result
    return {
        "planned_seconds": plan.seconds,
        **found.values(),
        "planned_gib": plan.peak_bytes / 2**30,
        "gib": memory.gib,
        "parameters": gram.meta["parameters"],
        "flops": plan.flops,
        "pass_seconds": gram.meta["pass_seconds"],
        "planned_pass_seconds": plan.pass_seconds,
        "contract_seconds": gram.meta["contract_seconds"],
        "check_seconds": gram.meta["check_seconds"],
        "planned_check_seconds": plan.check_seconds,
    }


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
