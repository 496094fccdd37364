"""What peers and engine compute alike: models with equal random weights, inputs, the parameters that count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Config = dict[str, Any]

_BERT = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
_SAME: Config = {"N": 64, "C": 1, "contraction": "trace", "dtype": "float32"}
_CLASSIFIER: Config = {"model": "bert", "shape": _BERT, "T": 32, **_SAME}
# As CoLA: 11.3 tokens in the mean, the logits of two classes; more than whose gradients fit in 24 GiB.
_SENTENCES: Config = _CLASSIFIER | {"N": 256, "T": 12, "C": 2}
WORKS: dict[str, Config] = {
    "bert": _CLASSIFIER | {"params": "all"},
    "bert-linear": _CLASSIFIER | {"params": "linear"},
    "bert-lora": _CLASSIFIER | {"params": "lora"},
    "sentences": _SENTENCES | {"params": "all"},
    "sentences-linear": _SENTENCES | {"params": "linear"},
    "sentences-lora": _SENTENCES | {"params": "lora"},
    "mlp": {"model": "mlp", "widths": [3072, 1024, 1024, 1024], "params": "all", **_SAME},
    "cnn": {"model": "cnn", "channels": [3, 64, 128, 256], "side": 32, "params": "all", **_SAME},
}
_TINY_BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def tiny(config: Config) -> Config:
    """Return the same work in a size that takes no time."""
    smaller: Config = {"N": 10}
    if config["model"] == "bert":
        smaller |= {"shape": _TINY_BERT | {"vocab_size": 200}, "T": 5}
    elif config["model"] == "mlp":
        smaller |= {"widths": [12, 16, 16]}
    else:
        smaller |= {"channels": [3, 4, 5], "side": 8}
    return config | smaller


def build(config: Config) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the model, in eval mode, and its inputs.

    Attention is `config["attention"]`: scaled_dot_product_attention has no batching rule, vmap needs "eager".
    """
    torch.manual_seed(0)
    if config["model"] == "bert":
        return _bert(config)
    if config["model"] == "mlp":
        model: nn.Module = Mlp(config["widths"], config["C"])
        return model.eval(), {"x": torch.randn(config["N"], config["widths"][0])}
    side = config["side"]
    model = Cnn(config["channels"], config["C"])
    return model.eval(), {"x": torch.randn(config["N"], config["channels"][0], side, side)}


def _bert(config: Config) -> tuple[nn.Module, dict[str, Tensor]]:
    import transformers as tf

    shape = tf.BertConfig(
        **config["shape"], num_labels=config["C"], attn_implementation=config.get("attention", "sdpa")
    )
    model = tf.BertForSequenceClassification(shape)
    if config["params"] == "lora":
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["query", "value"]))
        for name, p in model.named_parameters():
            if "lora_B" in name:  # zero at the start, where the other factor has no gradient
                nn.init.normal_(p, std=0.02)
    # No mask: it breaks vmap in transformers 5.
    return model.eval(), {"input_ids": torch.randint(100, shape.vocab_size, (config["N"], config["T"]))}


class Mlp(nn.Module):
    """Linear maps with tanh between."""

    def __init__(self, widths: list[int], outputs: int) -> None:
        super().__init__()
        sizes = [*widths, outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, I) to (N, C)."""
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)


class Cnn(nn.Module):
    """3 × 3 convolutions with tanh, halved in size after each; means over space; a linear map."""

    def __init__(self, channels: list[int], outputs: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in zip(channels, channels[1:], strict=False)
        )
        self.head = nn.Linear(channels[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, I, S, S) to (N, C)."""
        for convolution in self.convolutions:
            x = nn.functional.avg_pool2d(torch.tanh(convolution(x)), 2)
        return self.head(x.mean((2, 3)))


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return f, (N, C)."""
    found = model(**inputs)
    return found if isinstance(found, Tensor) else found.logits


def selected(model: nn.Module, config: Config) -> dict[str, nn.Parameter]:
    """Return the parameters that count, by name."""
    every = dict(model.named_parameters())
    if config["params"] == "linear":
        linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        return {k: p for k, p in every.items() if k.rpartition(".")[0] in linear}
    return {k: p for k, p in every.items() if config["params"] == "all" or "lora_" in k}
