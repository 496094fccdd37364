"""What a module saw and what came back: its calls on a microbatch recorded, with where output gradients can be read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_flatten


class PathFailed(Exception):  # noqa: N818
    """This way of taking a gradient does not fit the module; a slower one must."""


@dataclass
class Call:
    """One use of a module: its arguments, and where its output's gradient can be read."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    edge: GradientEdge | None
    out_shape: torch.Size
    versions: tuple[tuple[Tensor, int], ...]

    def check_unchanged(self, name: str) -> None:
        """Refuse inputs that were overwritten after the module read them."""
        if any(t._version != version for t, version in self.versions):
            msg = f"{name}: its input is changed in place after use"
            raise PathFailed(msg)


class Recorder:
    """Context manager that records every call of the given modules during a forward pass of n samples.

    Args:
        modules: by name.
        n: samples in the batch.
        expand: modules of which an output with one row (a table of positions) stands for all samples: give each its
            own copy, so that each has its own gradient. Wrong where one row is one routed token; the probe decides.

    Attributes:
        calls: by module.
        expanded: modules whose one row was given to all samples.
    """

    def __init__(self, modules: dict[str, nn.Module], n: int, *, expand: Collection[str]) -> None:
        self.modules = modules
        self.n = n
        self.expand = expand
        self.calls: dict[str, list[Call]] = defaultdict(list)
        self.expanded: set[str] = set()
        self._handles: list[Any] = []

    def __enter__(self) -> Recorder:
        for name, module in self.modules.items():
            hook = self._hook(name)
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Record no more: the modules can be called again."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Any:
        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not torch.is_grad_enabled():  # no gradient comes back this way
                return None
            if not isinstance(output, Tensor) or not output.is_floating_point():
                self.calls[name].append(Call(args, kwargs, None, torch.Size(), ()))  # no path but the enclosing block's
                return None
            if name in self.expand and output.ndim > 1 and output.shape[0] == 1 < self.n:
                self.expanded.add(name)
                output = output.expand(self.n, *output.shape[1:])
            if not output.requires_grad:
                # The clone lets code downstream write in place, which a leaf forbids.
                output = output.detach().requires_grad_(True).clone()
            leaves = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
            versions = tuple((t, t._version) for t in leaves)
            self.calls[name].append(Call(args, kwargs, get_gradient_edge(output), output.shape, versions))
            return output

        return record


class Pulled(NamedTuple):
    """One call with its output gradients d, (C, *out.shape)."""

    call: Call
    d: Tensor
