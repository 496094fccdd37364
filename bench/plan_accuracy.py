"""What the plan says a job takes, in time and memory, against what it takes: six jobs, each in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from bench.record import record

BERT = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
LLAMA = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1376}
JOBS: dict[str, dict[str, Any]] = {
    "bert all": {"model": "bert", "N": 64, "T": 32, "params": "all"},
    "bert lora": {"model": "bert", "N": 512, "T": 32, "lora": True},
    "bert all, bounded": {"model": "bert", "N": 192, "T": 32, "params": "all", "memory_gib": 0.5},
    "bert lora, bounded": {"model": "bert", "N": 1024, "T": 32, "lora": True, "memory_gib": 0.25},
    "llama all, full": {"model": "llama", "N": 48, "T": 48, "params": "all", "contraction": "full"},
    "llama fast": {"model": "llama", "N": 128, "T": 64, "params": "all", "precision": "fast"},
}


def main() -> int:
    """Run every job, print the table, and record a line each."""
    print(f"{'job':20} {'planned s':>10} {'took s':>8} {'ratio':>6} {'planned GiB':>12} {'took GiB':>9} {'ratio':>6}")
    for name, job in JOBS.items():
        done = subprocess.run(
            [sys.executable, "-m", "bench.plan_accuracy", name], capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return 1
        found = json.loads(done.stdout.splitlines()[-1])
        s, m = found["planned_seconds"] / found["seconds"], found["planned_gib"] / found["gib"]
        print(
            f"{name:20} {found['planned_seconds']:10.2f} {found['seconds']:8.2f} {s:6.2f} {found['planned_gib']:12.3f} "
            f"{found['gib']:9.3f} {m:6.2f}"
        )
        record("plan-accuracy", {"job": name, **job}, found | {"seconds_ratio": s, "gib_ratio": m})
    return 0


def build(job: dict[str, Any]) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Return a job's model and inputs."""
    torch.manual_seed(0)
    if job["model"] == "bert":
        model = tf.BertForSequenceClassification(tf.BertConfig(**BERT, num_labels=2)).eval()
    else:
        config = tf.LlamaConfig(**LLAMA, num_labels=2, vocab_size=32000, num_key_value_heads=4, pad_token_id=0)
        model = tf.LlamaForSequenceClassification(config).eval()
    if job.get("lora"):
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["query", "value"])).eval()
    ids = torch.randint(1000, 30000, (job["N"], job["T"]))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def contender(name: str) -> None:
    """Plan and run one job; print a JSON line."""
    import ntkengine as ntk

    job = JOBS[name]
    model, inputs = build(job)
    arguments = {k: job[k] for k in ("params", "memory_gib", "contraction", "precision") if k in job}
    small = {k: v[:8] for k, v in inputs.items()}
    ntk.compute_gram(model, small, **arguments, check=False)  # warm-up
    plan = ntk.plan_gram(model, inputs, **arguments)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    start = time.perf_counter()
    ntk.compute_gram(model, inputs, **arguments, check=False)
    seconds = time.perf_counter() - start
    print(
        json.dumps(
            {
                "planned_seconds": plan.seconds,
                "seconds": seconds,
                "planned_gib": plan.peak_bytes / 2**30,
                "gib": _status("VmHWM") - before,
            }
        )
    )


def _status(key: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if x.startswith(key))
    return int(line.split()[1]) / 2**20


if __name__ == "__main__":
    contender(sys.argv[1])
