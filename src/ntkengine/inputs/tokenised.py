"""Inputs that someone else has made: a DataLoader, a list of batches or of examples, a tokenised data set.

They become one mapping of tensors, in their order, token ids padded on the right. Images and sounds are what the model
says it takes (`main_input_name`), all of one shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ntkengine.errors import InputError
from ntkengine.inputs.columns import input_columns
from ntkengine.inputs.loaders import check_order

# Tensors with a token axis -> what they are padded with; input_ids with the model's own.
_PADDING = {"input_ids": 0, "attention_mask": 0, "token_type_ids": 0, "position_ids": 0, "labels": -100}
_AXES = {"pixel_values": 3, "input_values": 1, "input_features": 2}  # of one example


def main_input(model: nn.Module | None) -> str:
    """Return what a model calls its main input."""
    found = getattr(model, "main_input_name", None)
    return found if isinstance(found, str) else "input_ids"


def is_tokenised(source: Any, model: nn.Module | None = None) -> bool:
    """Return whether a source holds a model's inputs, as far as can be seen without using it up."""
    if isinstance(source, Mapping):
        return "input_ids" in source
    if isinstance(source, DataLoader):
        return True
    if hasattr(source, "column_names"):
        columns = source.column_names or ()
        return not isinstance(columns, Mapping) and bool({"input_ids", main_input(model)} & set(columns))
    return isinstance(source, list | tuple) and bool(source) and _tokens(source[0], main_input(model))


def collated(source: Any, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Return one mapping of tensors with a leading sample axis.

    Args:
        source: as `is_tokenised` knows it. Batches are mappings of tensors (n, T, …), examples of sequences (T,) and
            numbers; `label` is called `labels`. Of a data set only what the model takes is kept (`inputs.columns`).
            In a list, of inputs other than token ids, the number of axes tells examples from batches.
        model: its padding token pads `input_ids`, and its `forward` says what it takes.

    Raises:
        InputError: nothing in it, no `input_ids`, batches that do not go together, batches of different widths without
            an attention mask or padded on the left, a column of a data set that may be an input or not, or a loader
            that does not go through all examples in order (`inputs.loaders`).
    """
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    padding = _PADDING | {"input_ids": pad if isinstance(pad, int) and pad >= 0 else 0}
    if isinstance(source, DataLoader):
        check_order(source)
    parts: Iterable[Any] = [source] if isinstance(source, Mapping) else source
    columns, main = None, main_input(model)
    batched = isinstance(source, Mapping) or (isinstance(source, DataLoader) and source.batch_sampler is not None)
    single = False if batched else True if hasattr(source, "column_names") else None
    batches = []
    for i, part in enumerate(parts):
        if i == 0 and hasattr(source, "column_names") and isinstance(part, Mapping):
            columns = input_columns(part, {main, *_PADDING}, model)
        batches.append(_batch(part, f"batch {i}", columns, main, single))
    if not batches:
        msg = "inputs: expected at least one batch, got none"
        raise InputError(msg)
    first = batches[0]
    for i, batch in enumerate(batches):
        if batch.keys() != first.keys():
            msg = f"batch {i}: expected {', '.join(first)} like batch 0, got {', '.join(batch)}"
            raise InputError(msg)
    widths = [int(batch["input_ids"].shape[1]) for batch in batches if "input_ids" in batch]
    if len(set(widths)) > 1:
        for i, batch in enumerate(batches):
            _can_pad(batch, f"batch {i}")
        batches = [_padded(batch, max(widths), padding) for batch in batches]
    try:
        return {name: torch.cat([batch[name] for batch in batches]) for name in first}
    except (RuntimeError, TypeError) as error:
        msg = f"inputs: batches do not go together: {str(error).splitlines()[0]}"
        raise InputError(msg) from error


def columns_as_tensors(source: Mapping[str, Any], model: nn.Module | None = None) -> dict[str, Tensor]:
    """Return a mapping of tensors, arrays or lists, as a tokenizer returns it, as one of tensors.

    Token ids of several lengths are padded on the right, as `collated` does.

    Args:
        source: values with one entry an example.
        model: as for `collated`.

    Raises:
        InputError: values that are no numbers, or whose lengths do not go together.
    """
    found = {}
    for name, value in source.items():
        try:
            found[name] = value if isinstance(value, Tensor) else torch.as_tensor(np.array(value))
        except (TypeError, ValueError, RuntimeError) as error:
            if "input_ids" in source and _ragged(source):
                examples = [dict(zip(source, row, strict=True)) for row in zip(*source.values(), strict=True)]
                return collated(examples, model)
            msg = f"inputs[{name!r}]: expected a tensor, or numbers of one shape, got {type(value).__name__}"
            raise InputError(msg) from error
    return found


def _ragged(source: Mapping[str, Any]) -> bool:
    """Whether all values are lists of as many examples."""
    return all(isinstance(v, list | tuple) for v in source.values()) and len({len(v) for v in source.values()}) == 1


def _tokens(part: Any, main: str) -> bool:
    if not isinstance(part, Mapping):
        return False
    return "input_ids" in part or main in part or any(isinstance(v, Tensor) for v in part.values())


def _batch(part: Any, where: str, columns: set[str] | None, main: str, single: bool | None) -> dict[str, Tensor]:
    """Return a batch, or an example as a batch of one, as tensors; all columns, or those.

    Args:
        part: the batch or example.
        where: it is, for messages.
        columns: that are inputs; None for all.
        main: the model's main input, where there are no `input_ids`.
        single: whether it is an example; None where its axes must tell.
    """
    if not isinstance(part, Mapping) or not {"input_ids", main} & part.keys():
        got = f"a mapping of {', '.join(map(str, part))}" if isinstance(part, Mapping) else type(part).__name__
        what = "token ids, a mapping with input_ids" if main == "input_ids" else f"a mapping with {main}"
        more = "; `tokenize` makes them from texts" if main == "input_ids" else ""
        raise InputError(f"{where}: expected {what}, got {got}{more}")
    main = "input_ids" if "input_ids" in part else main
    found = {}
    for name, value in part.items():
        if columns is not None and name not in columns:
            continue
        name = "labels" if name == "label" and "labels" not in part else str(name)
        if value is None:
            msg = f"{where}: {name} has no value"
            raise InputError(msg)
        try:
            found[name] = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            msg = f"{where}: expected numbers of one length in {name} ({str(error).splitlines()[0]})"
            raise InputError(msg) from error
    if main == "input_ids":
        single = found[main].ndim == 1
    elif single is None:
        label = found.get("labels")
        single = found[main].ndim == _AXES.get(main) if label is None else label.ndim == 0
    if single:
        found = {name: value[None] for name, value in found.items()}
        if main == "input_ids":
            found.setdefault("attention_mask", torch.ones_like(found[main]))
    ids = found[main]
    if (ids.ndim != 2 if main == "input_ids" else ids.ndim < 2) or not ids.numel():
        msg = f"{where}: expected {main} of shape (n, {'T' if main == 'input_ids' else '…'}), got {tuple(ids.shape)}"
        raise InputError(msg)
    for name, value in found.items():
        if value.ndim == 0 or len(value) != len(ids):
            msg = f"{where}: expected {len(ids)} examples in {name} as in {main}, got shape {tuple(value.shape)}"
            raise InputError(msg)
    return found


def _can_pad(batch: Mapping[str, Tensor], where: str) -> None:
    mask = batch.get("attention_mask")
    if mask is None or mask.ndim != 2:
        msg = f"{where}: batches of different widths need an attention_mask that says what is padding"
        raise InputError(msg)
    if bool((mask[:, 1:] > mask[:, :-1]).any()):
        msg = f"{where}: is padded on the left; batches of different widths are put together padded on the right"
        raise InputError(msg)


def _padded(batch: Mapping[str, Tensor], width: int, padding: Mapping[str, int]) -> dict[str, Tensor]:
    more = width - batch["input_ids"].shape[1]
    return {
        name: nn.functional.pad(value, (0, more), value=padding[name]) if name in padding and value.ndim == 2 else value
        for name, value in batch.items()
    }
