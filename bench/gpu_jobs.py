"""Whole Grams on one GPU, random weights of real shapes: seconds against the flop floor, peak memory.

* `roberta`: RoBERTa-base, all parameters, N = 1,024, T = 128, C = 2, float32 and bfloat16 passes.
* `llama-7b`: Llama 7B, all parameters, N = 512, T = 128, C = 1, bfloat16, in kernels only: torch's tiles are sized for
  a CPU's cache, 400,000 of them here, a minute of launches.
* `llama-45b`: a Llama of 45 billion parameters, larger than the GPU, N = 64, T = 128, C = 1, bfloat16: weights come
  from the host each time their block runs, but for those of the first blocks, which stay. All blocks share one block's
  pinned memory there, so that the host need not hold 90 GB; what crosses the bus is what a whole model would send.

The floor is the plan's flops (passes, gradients, one triangle of products) at the rate of a bfloat16 product measured
in the same process; contractions of float32 grade count three times, float32 passes run at the float32 rate.
Without a GPU, with TRITON_INTERPRET=1, the jobs are tiny and nothing is recorded.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import transformers
from ntk_kernels.syrk import syrk
from torch import nn

import ntkengine as ntk
from bench.record import record
from ntkengine.inputs.streaming import STREAMED, attach, placeholder
from ntkengine.inputs.weights import Held

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_45B = {
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 52,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}


def main(names: list[str]) -> int:
    """Run the jobs named, by default all."""
    if unknown := [name for name in names if name not in JOBS]:
        print(f"gpu-jobs: no job {unknown[0]!r}: one of {', '.join(JOBS)}", file=sys.stderr)
        return 2
    for name in names or JOBS:
        JOBS[name]()
    return 0


def roberta() -> None:
    """RoBERTa-base."""
    shape = {"vocab_size": 50_265, "max_position_embeddings": 514, "type_vocab_size": 1} if GPU else TINY
    torch.manual_seed(0)
    config = transformers.RobertaConfig(num_labels=2, pad_token_id=1, **shape)
    model = transformers.RobertaForSequenceClassification(config).to(DEVICE).eval()
    N, T = (1024, 128) if GPU else (6, 7)
    inputs = {"input_ids": torch.randint(3, config.vocab_size, (N, T), device=DEVICE)}
    for precision in ("high", "fast"):
        for backend in ("triton", "torch"):
            for check in (False, True) if backend == "triton" else (False,):
                options = {"params": "all", "precision": precision, "backend": backend, "check": check}
                warm(model, inputs, options)
                measure("roberta-base", model, inputs, options)


def llama_7b() -> None:
    """Llama 7B in bfloat16, on the GPU."""
    model = llama(LLAMA_7B if GPU else TINY, shared=False)
    N, T = (512, 128) if GPU else (4, 5)
    inputs = {"input_ids": torch.randint(3, model.config.vocab_size, (N, T), device=DEVICE)}
    options: dict[str, Any] = {"params": "all", "precision": "fast", "backend": "triton", "check": False}
    options |= {"memory_gib": 50.0} if GPU else {}
    warm(model, inputs, options)
    measure("llama-7b", model, inputs, options)


def llama_45b() -> None:
    """A Llama larger than the GPU, streamed from the host."""
    model = llama(LLAMA_45B if GPU else TINY, shared=True)
    streamed = sum(p.numel() for p in model.parameters() if hasattr(p, "ntk_entry"))
    link = bus()
    N, T = (64, 128) if GPU else (4, 5)
    inputs = {"input_ids": torch.randint(3, model.config.vocab_size, (N, T), device=DEVICE)}
    options: dict[str, Any] = {"params": "all", "precision": "fast", "backend": "auto", "check": False}
    options |= {"memory_gib": 60.0} if GPU else {"backend": "triton"}
    measure("llama-45b", model, inputs, options, {"bus_bytes_per_s": link, "streamed_bytes": 2.0 * streamed})


def llama(shape: dict[str, int], *, shared: bool) -> nn.Module:
    """Return a Llama classifier, C = 1, whose large weights are brought when their module runs.

    Args:
        shape: of its configuration.
        shared: hold one block's weights, in pinned host memory, for all blocks; else each its own, on the GPU.
    """
    config = transformers.LlamaConfig(num_labels=1, pad_token_id=0, max_position_embeddings=512, **shape)
    with torch.device("meta"):
        model = transformers.LlamaForSequenceClassification(config).to(torch.bfloat16)
    generator = torch.Generator(DEVICE).manual_seed(0)
    held: dict[str, torch.Tensor] = {}
    for owner, module in list(model.named_modules()):
        for local, p in list(module._parameters.items()):
            if p is None:
                continue
            value = torch.empty(p.shape, dtype=torch.bfloat16, device=DEVICE)
            value = value.normal_(0.0, 0.02, generator=generator) if p.ndim > 1 else value.fill_(1.0)
            large = p.ndim > 1 and p.numel() >= (STREAMED if GPU else 1)
            if not large or "embed" in owner:
                module._parameters[local] = nn.Parameter(value)
                continue
            key = ".".join(part for part in f"{owner}.{local}".split(".") if not part.isdigit()) if shared else ""
            if shared and key not in held:
                held[key] = value.cpu().pin_memory() if GPU else value
            entry = Held(held[key] if shared else value)
            module._parameters[local] = placeholder(p.shape, torch.bfloat16, DEVICE, entry)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding
    for module in model.modules():  # buffers, which the meta device left empty
        for name, child in list(module.named_children()):
            if isinstance(child, rotary):
                setattr(module, name, rotary(config=config).to(DEVICE))
    attach(model)
    return model.eval()


def warm(model: nn.Module, inputs: dict[str, torch.Tensor], options: dict[str, Any]) -> None:
    """Compile what a job will run: on few samples, and a product of as many rows as it has, whose kernel differs."""
    ntk.compute_gram(model, {k: v[:8] for k, v in inputs.items()}, **options)
    if options["backend"] == "triton":
        N = len(inputs["input_ids"])
        x = torch.randn(N, 512, device=DEVICE)
        K = torch.zeros(N, N, dtype=torch.float64, device=DEVICE)
        syrk(x if options["precision"] == "high" else x.bfloat16(), K)


def measure(
    name: str,
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    options: dict[str, Any],
    more: dict[str, Any] | None = None,
) -> None:
    """Compute one Gram; print and record what it took.

    Args:
        name: of the job.
        model: the model.
        inputs: token ids.
        options: for `compute_gram`.
        more: figures to record with it.
    """
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    gram = ntk.compute_gram(model, inputs, **options)
    if GPU:
        torch.cuda.synchronize()
    spent = time.perf_counter() - start
    plan = gram.plan
    contraction = sum(row.flops for row in plan.parameters)
    grade = options["precision"] == "high"
    floor = plan.pass_flops / rate(torch.float32 if grade else torch.bfloat16)
    floor += (3 if grade else 1) * contraction / rate(torch.bfloat16)
    values = {
        "seconds": spent,
        "probe_s": plan.probe_seconds,
        "pass_s": gram.meta["pass_seconds"],
        "contract_s": gram.meta["contract_seconds"],
        "flop_floor_s": floor,
        "of_floor": spent / floor,
        "contraction_flops": contraction,
        "pass_flops": plan.pass_flops,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if GPU else 0.0,
        "noise_relative": gram.meta["noise_relative"],
        "trace": float(gram.values.trace()),
    }
    values |= more or {}
    if "streamed_bytes" in values:  # they cross once in each direction, but for those that stay
        stays = min(values["streamed_bytes"], plan.layout["resident_bytes"])
        values["resident_bytes"] = stays
        values["bus_floor_s"] = (2 * values["streamed_bytes"] - stays) / values["bus_bytes_per_s"]
        values["bus_share"] = values["bus_floor_s"] / spent
        values["bus_share_of_passes"] = values["bus_floor_s"] / gram.meta["pass_seconds"]  # without the probe's reads
    N, T = inputs["input_ids"].shape
    config = {"job": name, "N": N, "T": T, "parameters": gram.meta["parameters"], **options}
    if GPU:
        record("gpu-jobs", config, values, gpu=True)
    print(json.dumps(config | values), flush=True)


def rate(dtype: torch.dtype) -> float:
    """Return the flop/s of a large product, measured once."""
    if dtype not in _RATES:
        n = 8192 if GPU else 64
        a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
        for _ in range(3):
            start = time.perf_counter()
            a @ b
            if GPU:
                torch.cuda.synchronize()
            _RATES[dtype] = max(_RATES.get(dtype, 0.0), 2.0 * n**3 / (time.perf_counter() - start))
    return _RATES[dtype]


def bus() -> float:
    """Return the bytes/s of a copy from pinned host memory."""
    size = (1 << 30) if GPU else 1 << 16
    source = torch.ones(size, dtype=torch.uint8)
    source = source.pin_memory() if GPU else source
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        source.to(DEVICE, copy=True)
        if GPU:
            torch.cuda.synchronize()
        best = max(best, size / (time.perf_counter() - start))
    return best


_RATES: dict[torch.dtype, float] = {}
JOBS = {"roberta": roberta, "llama-7b": llama_7b, "llama-45b": llama_45b}
