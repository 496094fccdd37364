"""Which examples a model, or another part of the data, has seen: risk figures must not take them for unseen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

_ENTRIES = 1 << 14  # of an image or a sound that are looked at, and the sum of all
_MOST = 0.5  # share of examples from which on a Gram counts as that of the fitted ones


def marks_of(inputs: Mapping[str, Tensor]) -> frozenset[bytes]:
    """Return a mark of every example: of its token ids without padding, else of its numbers."""
    return frozenset(_marks(inputs))


def _marks(inputs: Mapping[str, Tensor]) -> list[bytes]:
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is None:
        parts = [_thinned(v.detach()) for k, v in sorted(inputs.items()) if k != "labels"]
        rows = [[part[i] for part in parts] for i in range(len(parts[0]))]
    else:
        kept = None if mask is None or mask.shape != ids.shape else (mask != 0).cpu()
        ids = ids.detach().cpu()
        rows = [[row if kept is None else row[kept[i]]] for i, row in enumerate(ids)]
    return [blake2b(b"".join(x.double().numpy().tobytes() for x in row), digest_size=8).digest() for row in rows]


def _thinned(values: Tensor) -> Tensor:
    rows = values.reshape(len(values), -1)
    step = max(1, -(-rows.shape[1] // _ENTRIES))
    return torch.cat([rows[:, ::step].double(), rows.sum(1, keepdim=True, dtype=torch.float64)], 1).cpu()


def note_training(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Note on a model what it was trained on: there too where an adapter is merged."""
    seen = marks_of(inputs) | (getattr(model, "ntk_trained_on", None) or frozenset())
    model.ntk_trained_on = seen  # type: ignore[assignment]
    if hasattr(model, "get_base_model"):
        model.get_base_model().ntk_trained_on = seen  # type: ignore[operator]


def seen_before(model: nn.Module, groups: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return what a Gram's `meta` says of examples that were seen before they are scored.

    Args:
        model: as `fit_head` and `fine_tune` left it.
        groups: inputs of the train, and of the eval examples.

    Returns:
        head_fitted: whether `fit_head` saw most of the train examples; trained_on: whether `fine_tune` did;
        repeated: train examples that are there more than once; eval_seen: eval examples that are train examples too, or
        that `fit_head` or `fine_tune` saw, None without any.
    """
    head, body = (getattr(model, name, None) or frozenset() for name in ("ntk_head_seen", "ntk_trained_on"))
    train = _marks(groups[0])
    count = Counter(train)
    known = head | body | count.keys()
    most = _MOST * len(train)
    return {
        "head_fitted": sum(mark in head for mark in train) >= most,
        "trained_on": sum(mark in body for mark in train) >= most,
        "repeated": sum(count[mark] > 1 for mark in train),
        "eval_seen": sum(mark in known for mark in _marks(groups[1])) if len(groups) > 1 else None,
    }
