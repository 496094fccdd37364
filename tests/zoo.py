"""Tiny random models of many architectures, and the inputs and readouts they take."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as tf
from torch import nn

from tests.brute import VOCABULARY, tiny_inputs

LENGTHS = [11, 3, 5, 7, 2, 9, 5]
EVAL_LENGTHS = [4, 12, 6]
_TOKENS = {"vocab_size": VOCABULARY, "num_labels": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
_T5 = {"d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4, "d_ff": 48, "decoder_start_token_id": 0}


class Convolutions(nn.Module):
    """A small network of images: convolutions, batch statistics, pooling."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 8, 3, stride=2, groups=2)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = torch.tanh(self.norm(self.first(x)))
        return self.head(torch.tanh(self.second(h)).mean((2, 3)))


def classifier(name: str, **settings) -> Callable[[], nn.Module]:
    def build():
        config = getattr(tf, f"{name}Config")(**{**_TOKENS, **_SIZES, **settings})
        return getattr(tf, f"{name}ForSequenceClassification")(config)

    return build


def other(model: str, config: str, **settings) -> Callable[[], nn.Module]:
    return lambda: getattr(tf, model)(getattr(tf, f"{config}Config")(**{**_TOKENS, **settings}))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "albert": classifier("Albert", embedding_size=16),
    "modernbert": classifier(
        "ModernBert", cls_token_id=1, sep_token_id=2, global_attn_every_n_layers=2, local_attention=4
    ),
    "distilbert": other(
        "DistilBertForSequenceClassification", "DistilBert", dim=32, n_layers=2, n_heads=4, hidden_dim=48
    ),
    "deberta": classifier("DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"], max_relative_positions=16),
    "longformer": classifier("Longformer", attention_window=[4, 4]),
    "bloom": other("BloomForSequenceClassification", "Bloom", hidden_size=32, n_layer=2, n_head=4),
    "opt": classifier("OPT", ffn_dim=48, word_embed_proj_dim=32),
    "falcon": classifier("Falcon", multi_query=True),
    "qwen3": classifier("Qwen3", **_GROUPED),
    "gemma3": classifier("Gemma3Text", **_GROUPED, sliding_window=4),
    "mixtral": classifier("Mixtral", **_GROUPED, num_local_experts=4),
    "gpt-oss": classifier("GptOss", **_GROUPED, num_local_experts=4, sliding_window=4),
    "t5": other("T5ForSequenceClassification", "T5", **_T5),
    "t5-lm": other("T5ForConditionalGeneration", "T5", **_T5),
    "bart": other(
        "BartForSequenceClassification",
        "Bart",
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        decoder_start_token_id=2,
    ),
    "mamba": other("MambaForCausalLM", "Mamba", hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=4),
    "rwkv": other("RwkvForCausalLM", "Rwkv", hidden_size=32, num_hidden_layers=2, context_length=64),
    "recurrent-gemma": other(
        "RecurrentGemmaForCausalLM",
        "RecurrentGemma",
        **{**_SIZES, "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 8},
        block_types=["recurrent", "attention"],
    ),
    "bert-mlm": other("BertForMaskedLM", "Bert", **_SIZES),
    "vit": other("ViTForImageClassification", "ViT", **_SIZES, image_size=8, patch_size=4),
    "mlp": _mlp,
    "cnn": Convolutions,
}


def words_at_last(out, inputs):
    """Two words' logits at the last token."""
    last = inputs["attention_mask"].sum(1) - 1
    return out.logits[torch.arange(len(last)), last][:, [5, 9]]


def first_decoded(out, _inputs):
    """Two words' logits at the first decoded token."""
    return out.logits[:, 0, [5, 9]]


READOUTS = {
    "t5-lm": first_decoded,
    **dict.fromkeys(("mamba", "rwkv", "recurrent-gemma", "bert-mlm"), words_at_last),
}


def model(name: str) -> nn.Module:
    """Return the named model in float32 and eval mode, every parameter and statistic away from its usual start."""
    torch.manual_seed(0)
    built = MODELS[name]()
    with torch.no_grad():
        for p in built.parameters():
            p.add_(0.05 * torch.randn_like(p))
        for key, b in built.named_buffers():
            if "running" in key:
                b.add_(0.1 * torch.rand_like(b))
    return built.eval()


def inputs(name: str, built: nn.Module, lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Return inputs of the named model: token ids and mask, images, or rows."""
    generator = torch.Generator().manual_seed(seed)
    n = len(lengths)
    if name == "mlp":
        return {"x": torch.randn(n, 6, generator=generator)}
    if name == "cnn":
        return {"x": torch.randn(n, 3, 8, 8, generator=generator)}
    if name == "vit":
        return {"pixel_values": torch.randn(n, 3, 8, 8, generator=generator)}
    found = tiny_inputs(built, lengths, 12, seed)
    for i, length in enumerate(lengths):  # encoder–decoders classify at the end-of-sequence token
        found["input_ids"][i, length - 1] = 2
    if name == "t5-lm":
        found["decoder_input_ids"] = torch.zeros(n, 1, dtype=torch.long)
    return found
