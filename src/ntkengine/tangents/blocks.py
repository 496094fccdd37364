"""The model as input → stack of blocks → head, found by watching one forward pass.

A list of modules is the stack when its members are called once each, in order, each on exactly the tensor the one
before it returned, and nothing else carries a gradient across a boundary. A model without such a list is one segment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ntkengine.inputs.running import call_model


@dataclass(frozen=True)
class Stack:
    """The stack of blocks.

    Attributes:
        names: the blocks' module names; empty when the model is one segment.
        blocks: the modules.
        hidden: where a block takes its hidden states: a position or a keyword.
    """

    names: tuple[str, ...] = ()
    blocks: tuple[nn.Module, ...] = ()
    hidden: int | str = 0

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def segment_name(self, index: int) -> str:
        """Return the name of segment `index`: 0 the input, 1…L the blocks, L + 1 the head."""
        if not self.blocks:
            return "model"
        if index == 0:
            return "input"
        return "head" if index > self.depth else self.names[index - 1]

    @property
    def head(self) -> int:
        """Index of the last segment."""
        return self.depth + 1 if self.blocks else 0

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the hidden states among a block's arguments."""
        if isinstance(self.hidden, str):
            return kwargs.get(self.hidden)
        return args[self.hidden] if len(args) > self.hidden else None

    def put(self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a block's arguments with other hidden states."""
        if isinstance(self.hidden, str):
            return args, {**kwargs, self.hidden: value}
        return (*args[: self.hidden], value, *args[self.hidden + 1 :]), kwargs


def first_tensor(output: Any) -> Any:
    """Return a block's hidden states: its output, or the first entry of a tuple."""
    return output[0] if isinstance(output, tuple | list) and output else output


def replace_first(output: Any, value: Tensor) -> Any:
    """Return the output with other hidden states."""
    if not isinstance(output, tuple | list):
        return value
    changed = [value, *output[1:]]
    return type(output)(*changed) if hasattr(output, "_fields") else type(output)(changed)  # named tuples take entries


def find_stack(model: nn.Module, inputs: Mapping[str, Tensor], n: int) -> Stack:
    """Return the model's stack of blocks, or an empty one, from one forward pass of n samples."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1}
    log: dict[str, list[tuple[int, tuple[Any, ...], dict[str, Any], Any, bool]]] = {name: [] for name in lists}
    handles = []

    def watch(name: str, index: int) -> tuple[Any, Any]:
        versions: list[list[tuple[Tensor, int]]] = []

        def before(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            versions.append([(t, t._version) for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)])

        def after(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            kept = all(t._version == v for t, v in versions.pop())
            log[name].append((index, args, kwargs, first_tensor(output), kept))

        return before, after

    try:
        for name, modules in lists.items():
            for index, child in enumerate(modules):
                before, after = watch(name, index)
                handles.append(child.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(child.register_forward_hook(after, with_kwargs=True))
        with torch.no_grad():
            call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    best = Stack()
    for name, modules in lists.items():
        hidden = _chain(log[name], len(modules), n)
        if hidden is not None and _size(modules) > sum(_size(b) for b in best.blocks):
            best = Stack(tuple(f"{name}.{i}" for i in range(len(modules))), tuple(modules), hidden)
    return best


def _chain(
    calls: list[tuple[int, tuple[Any, ...], dict[str, Any], Any, bool]], length: int, n: int
) -> int | str | None:
    """Return where the hidden states come in, if the calls are a chain in which each block feeds the next unchanged."""
    if [c[0] for c in calls] != list(range(length)) or not all(c[4] for c in calls):
        return None
    spots = []
    for before, now in zip(calls, calls[1:], strict=False):
        places: list[tuple[int | str, Any]] = [*enumerate(now[1]), *now[2].items()]
        found = [place for place, value in places if value is before[3]]
        if len(found) != 1 or not isinstance(before[3], Tensor):
            return None
        spots.append(found[0])
    stack = Stack(hidden=spots[0])
    first = stack.take(calls[0][1], calls[0][2])
    same = all(s == spots[0] for s in spots) and isinstance(first, Tensor) and first.is_floating_point()
    return spots[0] if same and first.shape[0] == n == calls[-1][3].shape[0] else None


def holds_tensors(value: Any, depth: int = 4) -> bool:
    """Whether an argument is an object with tensors inside, such as a cache of keys: a replay could change it."""
    if isinstance(value, Tensor):
        return True
    if depth == 0 or isinstance(value, nn.Module | type):
        return False
    inside = value if isinstance(value, list | tuple) else getattr(value, "__dict__", {}).values()
    return any(holds_tensors(x, depth - 1) for x in inside)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
