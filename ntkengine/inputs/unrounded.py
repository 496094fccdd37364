"""A float64 model without its own casts to fewer digits: what "exact" means of a model that has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FEWER = frozenset({torch.float32, torch.float16, torch.bfloat16})
_CASTS = frozenset({Tensor.float, Tensor.half, Tensor.bfloat16})
_BITS = frozenset({Tensor.view, torch.frombuffer, torch.asarray})  # what is there is read, nothing is rounded


@contextmanager
def unrounded(dtype: torch.dtype) -> Iterator[None]:
    """Within the block, if `dtype` is float64, what asks for floating-point numbers of fewer digits gets float64.

    Normalisations, softmaxes and rotary tables of many language models compute in float32 whatever the model is in.
    Operations of other libraries (kernels of quantised layers) are left as they are.
    """
    if dtype != torch.float64:
        yield
        return
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Unrounded():
            yield
    finally:
        torch.set_default_dtype(default)


class _Unrounded(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _CASTS:
            return args[0].double(*args[1:], **kwargs)
        if func not in _BITS and getattr(func, "namespace", "aten") == "aten":
            args = tuple(_kept(x) for x in args)
            kwargs = {name: _kept(x) for name, x in kwargs.items()}
        return func(*args, **kwargs)


def _kept(argument: Any) -> Any:
    return torch.float64 if isinstance(argument, torch.dtype) and argument in _FEWER else argument
