"""A float64 model without its own casts to fewer digits: what "exact" means of a model that has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodWrapperType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FEWER = frozenset({torch.float32, torch.float16, torch.bfloat16})
_CASTS = frozenset({Tensor.float, Tensor.half, Tensor.bfloat16})
_OPERATIONS = frozenset({torch._ops.OpOverload, torch._ops.OpOverloadPacket})
_OWN = frozenset({"aten", "prims", "higher_order"})  # torch's operations, which take any dtype or refuse it
_BITS = frozenset({Tensor.view, torch.frombuffer, torch.asarray})  # what is there is read, nothing is rounded


@contextmanager
def watching() -> Iterator[set[str]]:
    """Yield a set that the names of libraries whose own kernels run within the block are put in."""
    found: set[str] = set()
    with _Watching(found):
        yield found


@contextmanager
def unrounded(dtype: torch.dtype, *, foreign: bool = False) -> Iterator[None]:
    """Within the block, if `dtype` is float64, what asks for floating-point numbers of fewer digits gets float64.

    Normalisations, softmaxes and rotary tables of many language models compute in float32 whatever the model is in.

    Args:
        dtype: of the model.
        foreign: it runs kernels of other libraries (quantised layers), which need the digits they ask for: all stays as
            it is.

    Raises:
        RuntimeError: such a kernel runs all the same.
    """
    if dtype != torch.float64 or foreign:
        yield
        return
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Unrounded():
            yield
    finally:
        torch.set_default_dtype(default)


class _Watching(TorchFunctionMode):
    def __init__(self, found: set[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._found |= {_library(func)} - _OWN
        return func(*args, **(kwargs or {}))


class _Unrounded(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if type(func) is MethodWrapperType:  # reads an attribute: half of what a mode sees
            return func(*args)
        if type(func) in _OPERATIONS and _library(func) not in _OWN:
            msg = f"{func} is a kernel of another library, which did not run on the first example"
            raise RuntimeError(msg)
        kwargs = kwargs or {}
        if func in _CASTS:
            return args[0].double(*args[1:], **kwargs)
        if func not in _BITS:
            if any(type(x) is torch.dtype for x in args):
                args = tuple(_kept(x) for x in args)
            if kwargs:
                kwargs = {name: _kept(x) for name, x in kwargs.items()}
        return func(*args, **kwargs)


def _library(func: Any) -> str:
    """Return whose an operation is; functions that Python has of torch's are torch's."""
    if isinstance(func, torch._ops.OpOverloadPacket):
        return func._qualified_op_name.partition("::")[0]
    return getattr(func, "namespace", "aten")


def _kept(argument: Any) -> Any:
    return torch.float64 if isinstance(argument, torch.dtype) and argument in _FEWER else argument
