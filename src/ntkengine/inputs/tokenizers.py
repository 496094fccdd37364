"""A model's tokenizer: which it is, the longest text it takes, and leaving it as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ntkengine.arguments import whole
from ntkengine.errors import InputError

# RoBERTa's positions start after the padding index.
_OFFSET = frozenset(
    {"roberta", "xlm-roberta", "camembert", "longformer", "mpnet", "xlm-roberta-xl", "roberta-prelayernorm"}
)


def tokenizer_of(model: nn.Module | None) -> Any:
    """Return the tokenizer that a model carries or that lies in its folder, None without.

    Raises:
        InputError: none can be loaded from the folder.
    """
    if model is not None and hasattr(model, "ntk_tokenizer"):
        return model.ntk_tokenizer
    path = getattr(model, "name_or_path", "") or getattr(getattr(model, "config", None), "_name_or_path", "")
    if not path or not Path(path).is_dir():
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        msg = f"tokenize: {path} holds no tokenizer; pass tokenizer="
        raise InputError(msg) from error


def longest_text(tokenizer: Any, model: nn.Module | None, max_length: int | None) -> int | None:
    """Return the longest text in tokens that the model, the tokenizer and the caller all allow.

    Raises:
        InputError: a limit below 1.
    """
    limits = [max_length] if max_length is not None else []
    if max_length is not None:
        whole("max_length", max_length, 1)
    if tokenizer.model_max_length and tokenizer.model_max_length < 10**9:  # "unlimited" is a huge number there
        limits.append(int(tokenizer.model_max_length))
    config = getattr(model, "config", None)
    positions = getattr(config, "max_position_embeddings", None)
    if positions:
        offset = config.pad_token_id + 1 if getattr(config, "model_type", "") in _OFFSET and config is not None else 0
        limits.append(int(positions) - offset)
    return min(limits, default=None)


@contextmanager
def padding_right(tokenizer: Any) -> Iterator[None]:
    """Within the block a tokenizer pads on the right, with its end-of-text token if it has no other; then as it was.

    Raises:
        InputError: it has neither, or is no tokenizer.
    """
    if not hasattr(tokenizer, "pad_token"):
        raise InputError(f"tokenizer: expected one of a transformers model, got {type(tokenizer).__name__}")
    pad = tokenizer.pad_token
    if pad is None and tokenizer.eos_token is None:
        msg = "tokenize: expected a tokenizer with a pad or an end-of-text token, this one has neither"
        raise InputError(msg)
    side = tokenizer.padding_side
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)  # a fast one's: a call leaves its settings there
    settings = [getattr(backend, name, None) for name in ("padding", "truncation")]
    try:
        tokenizer.padding_side = "right"
        if pad is None:
            tokenizer.pad_token = tokenizer.eos_token
        yield
    finally:
        tokenizer.padding_side = side
        if pad is None:
            tokenizer.pad_token = None
        if hasattr(backend, "no_padding"):
            padding, truncation = settings
            backend.enable_padding(**padding) if padding else backend.no_padding()
            backend.enable_truncation(**truncation) if truncation else backend.no_truncation()
