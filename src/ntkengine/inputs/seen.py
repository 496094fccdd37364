"""Which examples a model, or another part of the data, has seen: risk figures must not take them for unseen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

_ENTRIES = 1 << 14  # of an image or a sound that are looked at, and the sum of all
_MOST = 0.5  # share of examples from which on a Gram counts as that of the fitted ones


def marks_of(inputs: Mapping[str, Tensor]) -> frozenset[bytes]:
    """Return a mark of every example: of its tensors, padding cut."""
    return frozenset(_marks(inputs))


def _marks(inputs: Mapping[str, Tensor]) -> list[bytes]:
    given = {k: v.detach() for k, v in sorted(inputs.items()) if k != "labels"}
    ids, mask = given.get("input_ids"), given.pop("attention_mask", None)
    if ids is None and mask is not None:
        given["attention_mask"] = mask
    kept = None if ids is None or mask is None or mask.shape != ids.shape else (mask != 0).cpu()
    parts: list[Any] = []
    for name, values in given.items():
        if ids is not None and values.shape == ids.shape and not name.startswith("decoder"):
            cut = values.cpu() if kept is None else [row[kept[i]] for i, row in enumerate(values.cpu())]
            if name == "input_ids" or bool(values.any()):  # segments that are all the first say nothing
                parts.append(cut)
        else:
            parts.append(_thinned(values))
    rows = zip(*parts, strict=True)
    return [blake2b(b"|".join(x.double().numpy().tobytes() for x in row), digest_size=8).digest() for row in rows]


def _thinned(values: Tensor) -> Tensor:
    rows = values.reshape(len(values), -1)
    step = max(1, -(-rows.shape[1] // _ENTRIES))
    return torch.cat([rows[:, ::step].double(), rows.sum(1, keepdim=True, dtype=torch.float64)], 1).cpu()


@contextmanager
def noting_training(model: nn.Module) -> Iterator[list[Mapping[str, Tensor]]]:
    """Within the block a model is trained on what is put into the list; after it, however it ends, that is noted on it.

    There too where an adapter is merged, and on the model inside a wrapper; with what its parameters were before.
    """
    inside = [model.get_base_model()] if hasattr(model, "get_base_model") else []  # type: ignore[operator]
    inside += [model.module] if isinstance(getattr(model, "module", None), nn.Module) else []
    before = [(o, {_plain(name): _digest(p) for name, p in o.named_parameters()}) for o in (model, *inside)]
    given: list[Mapping[str, Tensor]] = []
    try:
        yield given
    finally:
        marks = frozenset().union(*map(marks_of, given))
        for owner, now in before if given else ():
            old_marks, start = getattr(owner, "ntk_trained_on", None) or (frozenset(), {})
            owner.ntk_trained_on = marks | old_marks, now | start


def _trained_on(model: nn.Module) -> frozenset[bytes]:
    """Return marks of what a model was trained on; none where its parameters are what they were before."""
    noted: tuple[frozenset[bytes], dict[str, bytes]] = getattr(model, "ntk_trained_on", None) or (frozenset(), {})
    marks, start = noted
    known = ((p, start[_plain(name)]) for name, p in model.named_parameters() if _plain(name) in start)
    return marks if any(_digest(p) != was for p, was in known) else frozenset()


def _plain(name: str) -> str:
    """Return a parameter's name, with an adapter beside it or without."""
    return name.replace(".base_layer.", ".")


def _digest(p: nn.Parameter) -> bytes:
    if type(p.data) is not Tensor or p.is_meta or not p.is_floating_point():
        return b""  # quantised, or elsewhere: not trained
    values = p.detach().reshape(-1)
    some = values[:: max(1, -(-len(values) // _ENTRIES))].float().cpu()
    return blake2b(some.numpy().tobytes(), digest_size=8).digest()


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
    head, body = getattr(model, "ntk_head_seen", None) or frozenset(), _trained_on(model)
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
