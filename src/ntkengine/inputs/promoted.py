"""Products of tensors of several precisions, in the widest of them: torch promotes sums, and refuses products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Promoted(TorchFunctionMode):
    """Within it a product that torch refuses for want of one dtype is taken in the widest.

    As where a readout's own float32 weights meet a model that runs in float64. Nothing is rounded.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            kinds, name = _kinds([*args, *kwargs.values()]), getattr(func, "__name__", "_")
            in_place = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or "out" in kwargs
            if len(kinds) < 2 or in_place:
                raise
            widest = kinds[0]
            for kind in kinds[1:]:
                widest = torch.promote_types(widest, kind)
            return func(*(_to(x, widest) for x in args), **{name: _to(x, widest) for name, x in kwargs.items()})


def _kinds(arguments: list[Any]) -> list[torch.dtype]:
    """Return the floating-point dtypes among arguments, lists and tuples of tensors looked into."""
    inside = [x for a in arguments for x in (a if isinstance(a, list | tuple) else (a,))]
    return sorted({x.dtype for x in inside if isinstance(x, Tensor) and x.is_floating_point()}, key=str)


def _to(argument: Any, dtype: torch.dtype) -> Any:
    if isinstance(argument, list | tuple):
        return type(argument)(_to(x, dtype) for x in argument)
    return argument.to(dtype) if isinstance(argument, Tensor) and argument.is_floating_point() else argument
