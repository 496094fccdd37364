"""Which parameters the tangent kernel is taken in."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ntkengine.errors import InputError


def require_module(model: Any) -> None:
    """Refuse what is no model, such as its path.

    Raises:
        InputError: saying what makes one.
    """
    if not isinstance(model, nn.Module):
        msg = f"model: expected a torch.nn.Module, as load_model(path) returns, got {type(model).__name__}"
        raise InputError(f"{msg} {str(model)[:80]!r}" if isinstance(model, str | Path) else msg)


def select_parameters(model: nn.Module, params: str | Iterable[str]) -> dict[str, nn.Parameter]:
    """Return the selected parameters by name, in the model's order; a shared parameter once, under its first name.

    Args:
        model: any module.
        params: `"trainable"` (requires_grad), `"all"`, a glob over parameter names, or a list of these; an entry of
            the list that begins with `!` leaves out what it matches. Any alias of a shared parameter stands for it.

    Raises:
        InputError: a pattern that matches nothing, nothing left, a selected parameter that is not floating point, or
            parameters that the model makes anew at each look.
    """
    require_module(model)
    entries = [params] if isinstance(params, str) or not isinstance(params, Iterable) else list(params)
    if not all(isinstance(entry, str) for entry in entries):
        msg = f"params: expected 'trainable', 'all', a glob, or a list of names, got {params!r}"
        raise InputError(msg)
    first = {id(p): name for name, p in reversed(list(model.named_parameters()))}
    named = list(model.named_parameters(remove_duplicate=False))
    for name, p in named:
        if id(p) not in first:
            msg = f"model: {name} is another tensor whenever the parameters are listed, so no gradient belongs to it"
            raise InputError(msg)
    aliases = [(name, first[id(p)]) for name, p in named]
    chosen: set[str] = set()
    out: set[str] = set()
    for pattern in entries:
        if pattern == "all":
            chosen |= set(first.values())
        elif pattern == "trainable":
            trainable = {name for name, p in model.named_parameters() if p.requires_grad}
            if not trainable:
                msg = "params 'trainable': no parameter of the model has requires_grad; use 'all', a glob, or names"
                raise InputError(msg)
            chosen |= trainable
        else:
            wanted = pattern.removeprefix("!")
            matched = {name for alias, name in aliases if fnmatchcase(alias, wanted)}
            if not matched:
                examples = ", ".join(name for name, _ in aliases[:3])
                msg = f"params {pattern!r}: matches no parameter; names look like {examples}, …"
                raise InputError(msg)
            (out if pattern.startswith("!") else chosen).update(matched)
    chosen -= out
    if not chosen:
        got = "leaves nothing" if out else "got an empty list"
        msg = f"params: expected 'trainable', 'all', a glob, or names, {got}"
        raise InputError(msg)
    selected = {name: p for name, p in model.named_parameters() if name in chosen and p.numel()}
    if not selected:
        msg = f"params: expected parameters with entries, got {', '.join(sorted(chosen)[:3])} of size 0"
        raise InputError(msg)
    for name, p in selected.items():
        if not p.is_floating_point():
            msg = f"params: {name} is {p.dtype}; only floating-point parameters have gradients, exclude it"
            raise InputError(msg)
        if p._backward_hooks:
            msg = f"params: {name} has a hook that changes its gradient, which no kernel sees; remove it, or exclude it"
            raise InputError(msg)
    return selected


def check_values(model: nn.Module) -> None:
    """Refuse a model whose parameters have no values, or none that autograd may read.

    Raises:
        InputError: naming the first.
    """
    require_module(model)
    if isinstance(model, torch.jit.ScriptModule):
        msg = f"model: {type(model).__name__} is TorchScript, whose modules cannot be watched; pass the model itself"
        raise InputError(msg)
    for name, p in model.named_parameters():
        if nn.parameter.is_lazy(p):
            msg = f"model: {name} has no shape yet; run the model once first"
        elif p.is_meta:
            msg = f"model: {name} is on the meta device and has no values; load them first"
        elif p.is_inference():
            msg = f"model: {name} was made in torch.inference_mode(), where no gradient is kept; load it outside"
        else:
            continue
        raise InputError(msg)


def leave_out(name: str) -> str:
    """Return how to leave a parameter out, for messages."""
    return f"leave it out with params=['all', '!{name}']"


def module_of(parameter_name: str) -> str:
    """Return the module a parameter is reported under: its owner; for adapters, the layer they adapt."""
    owner = parameter_name.rpartition(".")[0]
    parts = owner.split(".")
    for i, part in enumerate(parts):
        if part.startswith("lora_"):
            return ".".join(parts[:i])
    return owner or parameter_name
