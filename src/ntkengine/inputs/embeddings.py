"""Embeddings whose gradient autograd can give as the rows a batch touches: the table would be mostly zeros."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ntkengine.inputs.attributes import stored_weight


def tables(model: nn.Module) -> dict[str, nn.Embedding]:
    """Return the embeddings whose weight's gradient autograd can give as the rows a batch touches, by weight name."""
    found = {}
    for name, module in model.named_modules():
        plain = type(module).forward is nn.Embedding.forward and isinstance(stored_weight(module), nn.Parameter)
        if plain and module.max_norm is None and not module.scale_grad_by_freq:
            found[f"{name}.weight" if name else "weight"] = module
    return found


@contextmanager
def sparse_tables(model: nn.Module) -> Iterator[None]:
    """Within the block, embeddings' weights get sparse gradients: the rows touched, not the table.

    Only through the embeddings' own calls: others that read their settings (adapters) go on as before.
    """

    def switch(*, sparse: bool) -> Any:
        def hook(module: nn.Embedding, *_: Any) -> None:
            module.sparse = sparse

        return hook

    handles = []
    try:
        for module in tables(model).values():
            handles.append(module.register_forward_pre_hook(switch(sparse=True)))
            handles.append(module.register_forward_hook(switch(sparse=False), always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
