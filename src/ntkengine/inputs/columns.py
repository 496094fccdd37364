"""Which columns of a tokenised data set are inputs of the model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ntkengine.errors import InputError

# Numbers that tokenizers and data sets put beside the tokens, which no model is called with.
_BOOKKEEPING = frozenset({"idx", "id", "index", "guid", "label", "length", "special_tokens_mask", "offset_mapping"})
_BOOKKEEPING |= frozenset({"overflow_to_sample_mapping", "num_truncated_tokens", "word_ids", "__index_level_0__"})


def input_columns(row: Mapping[str, Any], kept: Iterable[str], model: nn.Module | None) -> set[str]:
    """Return the columns that the model is called with, and its labels.

    A column that the model's `forward` names is an input; one that it does not take, or that holds no numbers, is not.
    Where `forward` names no `input_ids`, or there is no model, every column of numbers is an input but bookkeeping.

    Args:
        row: the data set's first.
        kept: columns that are inputs whatever the model is.
        model: that will run on them; what wraps another's `forward` takes what that one takes.

    Raises:
        InputError: a column of numbers that `forward` does not name but may take (`**kwargs`).
    """
    named, any_other = (set(), True) if model is None else _taken(model)
    found = {"label", *kept} & row.keys() if "labels" not in row else set(kept) & row.keys()
    for column, value in row.items():
        if column in found or column in named:
            found.add(column)
        elif any_other and column not in _BOOKKEEPING and _numbers(value):
            if "input_ids" in named:
                msg = (
                    f"dataset: whether column {column!r} is an input is unknown: the model's forward does not name it "
                    "but may take it; remove it (remove_columns), or give the inputs as a mapping of tensors"
                )
                raise InputError(msg)
            found.add(column)
    return found


def _taken(model: nn.Module) -> tuple[set[str], bool]:
    """Return the names in the signature of `forward`, and whether it takes others too; through PEFT and compilation."""
    named: set[str] = set()
    while True:
        try:
            parameters = inspect.signature(model.forward).parameters.values()
        except (TypeError, ValueError):  # a compiled function's
            return named, True
        named |= {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        base: Any = getattr(model, "get_base_model", None)
        inner = base() if base is not None else getattr(model, "_orig_mod", model)
        if inner is model:
            return named, any(p.kind is p.VAR_KEYWORD for p in parameters)
        model = inner


def _numbers(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and _numbers(value[0])
    if isinstance(value, Tensor) or not hasattr(value, "dtype"):
        return isinstance(value, Tensor | int | float)
    return value.dtype.kind in "biuf"
