"""Labelled text: from files, data sets, frames or lists to examples, and from examples to token ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkengine.arguments import listed, whole
from ntkengine.errors import InputError
from ntkengine.inputs.attributes import stored_weight
from ntkengine.inputs.labels import class_indices, label_text
from ntkengine.inputs.memory import class_names, missing, ordered_names, plain, rows_in
from ntkengine.inputs.parameters import require_module
from ntkengine.inputs.tables import Row, no_column, rows_of
from ntkengine.inputs.tokenised import collated, is_tokenised
from ntkengine.inputs.tokenizers import longest_text, padding_right, tokenizer_of

Text = str | tuple[str, str]


@dataclass(frozen=True)
class Examples:
    """Texts with their labels.

    Attributes:
        texts: strings, or pairs of strings.
        labels: (N,) int64 class indices, or None.
        label_names: class names; label i is called label_names[i].
        ids: where each came from, such as `train.tsv:17` (1-based line).
        source: what they were read from.
    """

    texts: Sequence[Text]
    labels: np.ndarray | None
    label_names: Sequence[str]
    ids: Sequence[str]
    source: str

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        classes = "" if self.labels is None else f", classes {', '.join(map(repr, self.label_names))}"
        return f"Examples({len(self)} from {self.source}{classes})"

    def __getitem__(self, index: slice | Sequence[int] | np.ndarray) -> Examples:
        rows = np.arange(len(self))[index]
        labels = None if self.labels is None else self.labels[rows]
        texts, ids = [self.texts[i] for i in rows], [self.ids[i] for i in rows]
        return Examples(texts, labels, self.label_names, ids, self.source)


def read_examples(
    source: Any,
    text: str = "text",
    label: str | None = "label",
    *,
    text_pair: str | None = None,
    limit: int | None = None,
    label_names: Sequence[str] | None = None,
    shuffle: int | None = None,
    header: Sequence[str] | None = None,
) -> Examples:
    """Return labelled examples.

    Args:
        source: a path to jsonl, json, csv, tsv or parquet; a `datasets.Dataset`, whose class names are taken; a pandas
            frame; a list of mappings; a mapping of columns; with `label=None` a list of texts.
        text: column of the text.
        label: column of the label; None for unlabelled text.
        text_pair: column of a second text.
        limit: at most so many, after shuffling.
        label_names: class names in order; default the categories of an ordered pandas column, else the values found,
            sorted (numbers by value).
        shuffle: seed; None keeps the order.
        header: column names of a csv or tsv that has no header line.

    Raises:
        InputError: naming file, line and what was expected: no such file, unknown kind, missing column, empty text,
            missing or unknown label, decimal numbers in place of classes, one class only, malformed row, nothing to
            read.
    """
    for option, value, least in (("limit", limit, 1), ("shuffle", shuffle, 0)):
        if value is not None:
            whole(option, value, least)
    columns = [c for c in (text, label, text_pair) if c is not None]
    for option, column in (("text", text), ("label", label), ("text_pair", text_pair)):
        if not isinstance(column, str) and (column is not None or option == "text"):
            raise InputError(f"{option}: expected the name of a column, got {type(column).__name__}")
    for option, names in (("label_names", label_names), ("header", header)):
        if names is not None:
            listed(option, names, "names")
    name, rows = rows_of(source, header) if isinstance(source, str | Path) else rows_in(source, columns)
    found: list[tuple[Text, Any, str]] = []
    for row in rows:
        found.append(_example(row, columns, text, label, text_pair))
        if limit is not None and shuffle is None and len(found) == limit:
            break
    if not found:
        msg = f"{name}: expected at least one example, found none"
        raise InputError(msg)
    if shuffle is not None:
        order = np.random.default_rng(shuffle).permutation(len(found))[:limit]
        found = [found[i] for i in order]
    texts, values, ids = (list(part) for part in zip(*found, strict=True))
    if label is None:
        return Examples(texts, None, [], ids, name)
    if label_names is None and len(set(values)) > 1:
        label_names = ordered_names(source, label)
    labels, names = class_indices(values, ids, label, name, class_names(source, label), label_names)
    return Examples(texts, labels, names, ids, name)


def tokenize(
    examples: Any,
    model: nn.Module | None = None,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    truncate: bool = False,
) -> dict[str, Tensor]:
    """Return model inputs for all examples, padded on the right to the longest.

    Args:
        examples: `Examples`; a list of texts or of pairs; a data set, frame, columns or list of mappings with a `text`
            column; or what is tokenised already, which is only put together (`inputs.tokenised`).
        model: its tokenizer and its length limit are used.
        tokenizer: used instead of the model's, and left as it was; without a pad token it pads with its end-of-text.
        max_length: a shorter limit than the model's.
        truncate: cut longer texts; otherwise they are refused.

    Returns:
        What the tokenizer gives (`input_ids`, `attention_mask`, …), (N, T) int64; and `labels` (N,) if there are any.

    Raises:
        InputError: no tokenizer, no examples, a text over the limit, ids the model's embedding lacks.
    """
    if model is not None:
        require_module(model)
    if is_tokenised(examples):
        if max_length is not None or truncate:
            raise InputError("max_length: expected none with examples that are tokens already; cut them yourself")
        inputs = collated(examples, model)
        _check_vocabulary(inputs["input_ids"], model)
        return inputs
    if not isinstance(examples, Examples):
        examples = _examples_of(examples)
    tokenizer = tokenizer_of(model) if tokenizer is None else tokenizer
    if tokenizer is None:
        msg = "tokenize: the model carries no tokenizer; pass tokenizer="
        raise InputError(msg)
    if not len(examples):
        msg = "tokenize: expected at least one example, got none"
        raise InputError(msg)
    with padding_right(tokenizer):
        inputs = _tokens(examples, tokenizer, longest_text(tokenizer, model, max_length), truncate=truncate)
    _check_vocabulary(inputs["input_ids"], model)
    unknown, special = tokenizer.unk_token_id, set(tokenizer.all_special_ids)
    words = {int(i) for i in inputs["input_ids"].unique()} - (special - {unknown})
    if unknown is not None and words == {unknown}:
        msg = (
            f"tokenize: the tokenizer ({type(tokenizer).__name__}) knows no word of these texts: all are unknown tokens"
        )
        raise InputError(msg)
    if examples.labels is not None:
        inputs["labels"] = torch.from_numpy(np.asarray(examples.labels, dtype=np.int64))
    return inputs


def _tokens(examples: Examples, tokenizer: Any, limit: int | None, *, truncate: bool) -> dict[str, Tensor]:
    pairs = isinstance(examples.texts[0], tuple)
    columns = [list(column) for column in zip(*examples.texts, strict=True)] if pairs else [list(examples.texts)]
    cut = {"truncation": True, "max_length": limit} if truncate and limit else {"truncation": False}
    encoded = tokenizer(*columns, **cut, padding=False, return_attention_mask=True, verbose=False)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    longest = int(np.argmax(lengths))
    if limit and lengths[longest] > limit:
        first = next(i for i, length in enumerate(lengths) if length > limit)
        cure = "pass truncate=True (--truncate) to cut longer texts"
        if truncate:
            cure = "no fewer are left of a text that is cut"
        msg = f"{examples.ids[first]}: has {lengths[first]} tokens, over the limit of {limit}; {cure}"
        raise InputError(msg)
    if not all(lengths):
        msg = f"{examples.ids[lengths.index(0)]}: the tokenizer makes no token of this text"
        raise InputError(msg)
    batch = tokenizer.pad(dict(encoded), padding="longest", return_tensors="pt", verbose=False)
    return {key: value for key, value in batch.items() if isinstance(value, Tensor)}


def _examples_of(source: Any) -> Examples:
    """Return unlabelled examples from a list of texts or of pairs, or from the `text` column of a table."""
    if hasattr(source, "column_names") or hasattr(source, "columns") or isinstance(source, dict):
        return read_examples(source, label=None)
    if isinstance(source, list | tuple) and source and isinstance(source[0], Mapping):
        return read_examples(source, label=None)
    if isinstance(source, str) or not isinstance(source, Iterable):
        msg = f"examples: expected Examples, a list of texts or of pairs, or a table, got {source!r}"
        raise InputError(msg)
    texts = [tuple(t) if isinstance(t, list) else t for t in source]
    ids = [f"example {i}" for i in range(len(texts))]
    pairs = bool(texts) and isinstance(texts[0], tuple)
    for where, text in zip(ids, texts, strict=True):
        parts = text if pairs and isinstance(text, tuple) else (text,)
        if len(parts) != 1 + pairs or not all(isinstance(part, str) for part in parts):
            msg = f"{where}: expected {'a pair of texts' if pairs else 'a text'} like the others, got {text!r}"
            raise InputError(msg)
    return Examples(texts, None, [], ids, "texts")


def _example(row: Row, columns: list[str], text: str, label: str | None, pair: str | None) -> tuple[Text, Any, str]:
    for column in columns:
        if column not in row.values:
            raise no_column(row.named_at or row.where, column, row.values)
    parts = []
    for column in (text,) if pair is None else (text, pair):
        value = row.values[column]
        if not isinstance(value, str) or not value.strip():
            empty = isinstance(value, str) or missing(value)
            what = "is empty" if empty else f"is {type(value).__name__}, not text"
            msg = f"{row.where}: column {column!r} {what}"
            raise InputError(msg)
        parts.append(value)
    value = None if label is None else plain(row.values[label])
    if label is not None and (missing(value) or label_text(value) == ""):
        msg = f"{row.where}: column {label!r} has no label"
        raise InputError(msg)
    if label is not None and not isinstance(value, str | int | float | np.generic):
        msg = f"{row.where}: column {label!r} is {type(value).__name__}, expected a class, as text or a number"
        raise InputError(msg)
    return (parts[0] if pair is None else (parts[0], parts[1])), value, row.where


def _check_vocabulary(ids: Tensor, model: nn.Module | None) -> None:
    get: Any = getattr(model, "get_input_embeddings", None)
    embedding = get() if get is not None else None
    shape = None if embedding is None else getattr(stored_weight(embedding), "shape", None)
    rows = getattr(embedding, "num_embeddings", None) if shape is None else shape[0]
    if rows is not None and int(ids.max()) >= rows:
        msg = f"tokenize: token id {int(ids.max())} is beyond the model's {rows} embeddings: not this model's tokenizer"
        raise InputError(msg)
