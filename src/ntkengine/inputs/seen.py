"""Which examples a head was fitted on: risk figures of a kernel must not take them for unseen."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

from torch import Tensor, nn

_MOST = 0.5  # share of examples from which on a Gram counts as that of the fitted ones


def marks_of(inputs: Mapping[str, Tensor]) -> frozenset[bytes]:
    """Return a mark of every example: of its token ids without padding, else of all its numbers."""
    return frozenset(_marks(inputs))


def _marks(inputs: Mapping[str, Tensor]) -> list[bytes]:
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is None:
        parts = [v.detach().cpu() for k, v in sorted(inputs.items()) if k != "labels"]
        rows = [[part[i].reshape(-1) for part in parts] for i in range(len(parts[0]))]
    else:
        kept = None if mask is None or mask.shape != ids.shape else (mask != 0).cpu()
        ids = ids.detach().cpu()
        rows = [[row if kept is None else row[kept[i]]] for i, row in enumerate(ids)]
    return [blake2b(b"".join(x.double().numpy().tobytes() for x in row), digest_size=8).digest() for row in rows]


def fitted_on(model: nn.Module, inputs: Mapping[str, Tensor]) -> bool:
    """Return whether the model's head was fitted, by `fit_head`, on most of these examples."""
    seen = getattr(model, "ntk_head_seen", None)
    if not seen:
        return False
    marks = _marks(inputs)
    return sum(mark in seen for mark in marks) >= _MOST * len(marks)
