"""Truth for the tests: plain autograd in float64, one sample and one output at a time, and tiny models to try it on."""

from __future__ import annotations

import copy

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model

from ntkengine.inputs.unrounded import unrounded

KINDS = ("bert", "roberta", "gpt2", "llama")
VOCABULARY = 97


def tiny_model(kind: str, num_labels: int = 3, seed: int = 0) -> torch.nn.Module:
    """Return a random classifier of about 30,000 parameters in float32, every parameter away from its usual start."""
    torch.manual_seed(seed)
    common = {"vocab_size": VOCABULARY, "num_labels": num_labels, "max_position_embeddings": 64}
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    if kind == "bert":
        config = transformers.BertConfig(**common, **sizes, pad_token_id=0)
        model = transformers.BertForSequenceClassification(config)
    elif kind == "roberta":
        config = transformers.RobertaConfig(**common, **sizes, pad_token_id=1)
        model = transformers.RobertaForSequenceClassification(config)
    elif kind == "llama":
        config = transformers.LlamaConfig(**common, **sizes, num_key_value_heads=2, pad_token_id=0)
        model = transformers.LlamaForSequenceClassification(config)
    elif kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, num_labels=num_labels, pad_token_id=0
        )
        model = transformers.GPT2ForSequenceClassification(config)
    else:
        raise ValueError(kind)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.eval()


def with_lora(model: torch.nn.Module, targets: list[str], *, away_from_start: bool, seed: int = 1) -> torch.nn.Module:
    """Return the model with a rank-2 LoRA adapter, B = 0 as PEFT starts it, or random."""
    torch.manual_seed(seed)
    adapted = get_peft_model(
        model,
        LoraConfig(r=2, lora_alpha=4, target_modules=targets, lora_dropout=0.1, fan_in_fan_out="c_attn" in targets),
    )
    if away_from_start:
        with torch.no_grad():
            for name, p in adapted.named_parameters():
                if "lora_B" in name:
                    p.normal_(0, 0.1)
    return adapted.eval()


class TwoLinears(torch.nn.Module):
    """Two linears of the same start each time, and a forward pass given from outside: f(module, x)."""

    def __init__(self, forward, width=5):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = torch.nn.Linear(width, width), torch.nn.Linear(width, 2)
        self.forward_of = forward

    def forward(self, x):
        return self.forward_of(self, x)


def tiny_inputs(model: torch.nn.Module, lengths: list[int], width: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return token ids and a mask, padded on the right to `width`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), width), model.config.pad_token_id)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for i, length in enumerate(lengths):
        ids[i, :length] = torch.randint(3, VOCABULARY, (length,), generator=generator)
        mask[i, :length] = 1
    return {"input_ids": ids, "attention_mask": mask}


def gradients(model, inputs, names, f_of=None) -> np.ndarray:
    """Return (N, C, P) float64 gradients of f by autograd in float64, one sample and output at a time.

    The model's own casts to float32 are none.
    """
    model = copy.deepcopy(model).double().eval()
    if hasattr(model, "config"):
        model.config.use_cache = False  # caches are written in place
        if getattr(model.config, "_experts_implementation", None):
            model.config._experts_implementation = "eager"  # the others take no float64
    chosen = [p.requires_grad_(True) for name, p in model.named_parameters() if name in names]
    n = len(next(iter(inputs.values())))
    rows = []
    for i in range(n):
        one = {k: v[i : i + 1].double() if v.is_floating_point() else v[i : i + 1] for k, v in inputs.items()}
        given = {k: v for k, v in one.items() if k != "labels"}
        with unrounded(torch.float64):
            out = model(**given) if hasattr(model, "config") else model(*given.values())
        f = f_of(out, one) if f_of is not None else out if isinstance(out, torch.Tensor) else out.logits
        for c in range(f.shape[1]):
            grads = torch.autograd.grad(f[0, c], chosen, retain_graph=True, allow_unused=True)
            flat = [(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(chosen, grads, strict=True)]
            rows.append(torch.cat(flat))
    return torch.stack(rows).reshape(n, -1, rows[0].numel()).numpy()


def contracted(G: np.ndarray, H: np.ndarray, contraction: str) -> np.ndarray:
    """Return the Gram of gradients G (N, C, P) against H (M, C, P)."""
    if contraction == "trace":
        return np.einsum("ncp,mcp->nm", G, H)
    if contraction == "per-output":
        return np.einsum("ncp,mcp->cnm", G, H)
    if contraction == "full":
        return G.reshape(-1, G.shape[2]) @ H.reshape(-1, H.shape[2]).T
    return G.sum(1) @ H.sum(1).T


def relative_error(got, truth) -> tuple[float, float]:
    """Return (relative Frobenius error, largest error over the largest entry); finite checked first."""
    got, truth = np.asarray(got), np.asarray(truth)
    assert got.shape == truth.shape
    assert np.isfinite(got).all()
    return (
        float(np.linalg.norm(got - truth) / np.linalg.norm(truth)),
        float(np.abs(got - truth).max() / np.abs(truth).max()),
    )
