"""Weights that stay in their safetensors file: each large one is in memory only while its module needs it.

A streamed parameter is a placeholder of the right shape and no memory that reads as NaN: no one can use it by accident.
Before its module runs, the weight is read from the file, in the placeholder's dtype; after, it is let go, and autograd
keeps a note instead of the weight, which brings it back when the backward pass asks. Plain autograd, hooks, copies and
conversions therefore see an ordinary model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ntkengine.errors import InputError, NonFinite
from ntkengine.inputs.resident import RESIDENT, Key, brought_ahead
from ntkengine.inputs.weights import Entry, Held

STREAMED = 1 << 18  # entries; smaller parameters and vectors are loaded


class _Placeholder(nn.Parameter):
    """A streamed parameter. A copy has its file too, or a copy of its weight."""

    ntk_entry: Entry | Held

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        make, (*parts, entry, wanted) = self.__reduce_ex__(2)
        entry = entry if isinstance(entry, Entry) else copy.deepcopy(entry, memo)
        memo[id(self)] = other = make(*parts, entry, wanted)
        return other

    def __reduce_ex__(self, _protocol: Any) -> Any:
        return placeholder, (tuple(self.shape), self.dtype, self.device, self.ntk_entry, self.requires_grad)


def placeholder(
    shape: Iterable[int],
    dtype: torch.dtype,
    device: torch.device | str,
    entry: Entry | Held,
    requires_grad: bool = True,
) -> nn.Parameter:
    """Return a parameter of that shape that takes no memory and reads as NaN; its weight is `entry`."""
    p = _Placeholder(torch.full((), float("nan"), dtype=dtype, device=device).expand(*shape), requires_grad)
    p.ntk_entry = entry
    return p


def entry_of(parameter: Any) -> Entry | Held | None:
    """Return the file entry of a streamed parameter, None for any other."""
    return getattr(parameter, "ntk_entry", None)


def streamed_keys(module: nn.Module) -> list[Key]:
    """Return what `Resident` calls the module's streamed weights, each once, in the order of its modules."""
    return [(entry, p.dtype, p.device) for p in module.parameters() if (entry := entry_of(p)) is not None]


def streamed_entries(module: nn.Module) -> int:
    """Return the number of entries of a module's streamed weights."""
    return sum(p.numel() for p in module.parameters() if entry_of(p) is not None)


def turn_entries(model: nn.Module, device: torch.device) -> int | None:
    """Return `Resident.turn` for a model: its largest block, twice where the next is brought meanwhile; None without.

    Blocks are what its lists of modules hold, before it is known which list they are called in.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    largest = max((streamed_entries(block) for blocks in lists for block in blocks), default=0)
    return (2 if brought_ahead(device) else 1) * largest or None


def is_streamed(model: nn.Module) -> bool:
    """Whether any parameter stays in its file."""
    return any(entry_of(p) is not None for p in model.parameters())


@contextmanager
def told_of_streaming(model: nn.Module) -> Iterator[None]:
    """Within the block, of a streamed model, what is not finite says that a weight left in its file may be why.

    Raises:
        NonFinite: in place of it.
        InputError: the model writes to such a weight.
    """
    try:
        yield
    except InputError as error:
        if not is_streamed(model) or "single memory location" not in str(error):
            raise
        msg = f"model: {type(model).__name__} writes to a weight left in its file: load the model without stream"
        raise InputError(msg) from error
    except NonFinite as error:
        if not is_streamed(model):
            raise
        msg = f"{error}; a weight left in its file is NaN where another module than its own reads it: load the model "
        raise NonFinite(msg + "without stream") from error


def brings(hook: Any) -> bool:
    """Whether a module's hook is one that brings its weights."""
    return isinstance(getattr(hook, "__self__", None), _Bring)


def attach(model: nn.Module) -> None:
    """Make every module with streamed parameters bring them when it runs."""
    for module in model.modules():
        ready = any(brings(hook) for hook in module._forward_pre_hooks.values())
        if not ready and any(entry_of(p) is not None for p in module._parameters.values()):
            bring = _Bring()
            module.register_forward_pre_hook(bring.before)
            module.register_forward_hook(bring.after, always_call=True)


def converted(
    model: nn.Module,
    dtype: torch.dtype | None,
    device: torch.device | None = None,
    *,
    lazy: bool = False,
) -> nn.Module:
    """Return a copy of the model in another dtype; streamed parameters stay in their file.

    Args:
        model: the model.
        dtype: for its floating parameters and buffers; None: each its own.
        device: where to; default where it is.
        lazy: convert a large weight only while its module runs, so that the copy takes hardly any memory.
    """
    # A tokenizer carried along need not be copied; a state left from the last call (not a leaf) cannot be.
    keep = getattr(model, "ntk_tokenizer", None)
    memo: dict[int, Any] = {} if keep is None else {id(keep): keep}
    left = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor) and v.grad_fn is not None]
    memo |= {id(v): v.detach() for v in left}
    streamed = [(p, _as_rounded(p, entry)) for p in model.parameters() if (entry := entry_of(p)) is not None]
    held = [p for p in model.parameters() if type(p) is nn.Parameter and entry_of(p) is None and p.is_floating_point()]
    streamed += [(p, Held(p)) for p in held if lazy and p.ndim > 1 and p.numel() >= STREAMED]
    later = {id(p) for p, _ in streamed}
    for p in held:  # converted at once, not copied and then converted
        if id(p) not in later:
            value = p.detach().to(device or p.device, dtype or p.dtype, copy=True)
            memo[id(p)] = nn.Parameter(value, requires_grad=p.requires_grad)
    for p, entry in streamed:
        memo[id(p)] = placeholder(p.shape, dtype or p.dtype, device or p.device, entry).requires_grad_(p.requires_grad)
    other = copy.deepcopy(model, memo)
    imaginary = torch.complex128 if dtype == torch.float64 else torch.complex64

    def moved(x: Tensor) -> Tensor:
        wanted = dtype if x.is_floating_point() else imaginary if x.is_complex() else None
        return x.to(device or x.device, x.dtype if dtype is None else wanted or x.dtype)

    attach(other)
    left_out = [
        (module._parameters, name, p)
        for module in other.modules()
        for name, p in module._parameters.items()
        if p is not None and entry_of(p) is not None
    ]
    for parameters, name, _ in left_out:  # torch may make new parameters, which would have no file
        parameters[name] = None
    other._apply(moved)
    for parameters, name, p in left_out:
        parameters[name] = p
    for module in other.modules():
        for name, value in vars(module).items():  # plain attributes: `.to` does not know them
            if isinstance(value, Tensor):
                setattr(module, name, moved(value))
    return other


def _as_rounded(p: nn.Parameter, entry: Entry | Held) -> Entry | Held:
    """Return a streamed parameter's entry, its weight rounded to the dtype the parameter has."""
    return entry.through(p.dtype) if isinstance(entry, Entry) else entry


class _Bring:
    """Brings a module's weights while its forward runs, one call at a time."""

    def __init__(self) -> None:
        self.open: list[Any] = []

    def __deepcopy__(self, _memo: dict[int, Any]) -> _Bring:
        return _Bring()

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        live: dict[int, Callable[[], Tensor]] = {}
        for name, p in module._parameters.items():
            entry = entry_of(p)
            if p is None or entry is None:
                continue
            alone = type(module).forward is nn.Embedding.forward and len(module._forward_pre_hooks) == 1
            rows = args[0] if args and alone and not p.requires_grad else None  # other hooks may read more of it
            weight = _rows(p, entry, rows) if isinstance(rows, Tensor) else RESIDENT.bring(entry, p.dtype, p.device)
            live[weight.untyped_storage().data_ptr()] = partial(RESIDENT.bring, entry, p.dtype, p.device)
            # An instance attribute hides the parameter from the module's forward, and only there.
            module.__dict__[name] = _Streamed.apply(p, weight) if p.requires_grad else weight
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: _pack(x, live), _unpack) if live else nullcontext()
        hooks.__enter__()
        self.open.append(hooks)

    def after(self, module: nn.Module, _args: Any, _output: Any) -> None:
        if self.open:
            self.open.pop().__exit__(None, None, None)
        for name, p in module._parameters.items():
            if entry_of(p) is not None:
                module.__dict__.pop(name, None)


class _Streamed(torch.autograd.Function):
    """The weight of a placeholder; its gradient goes to the placeholder."""

    @staticmethod
    def forward(_ctx: Any, _placeholder: Tensor, weight: Tensor) -> Tensor:  # noqa: D102
        return weight.view_as(weight)

    @staticmethod
    def backward(_ctx: Any, *grads: Any) -> Any:  # noqa: D102
        return grads[0], None


@dataclass(frozen=True)
class _Note:
    """What autograd keeps instead of a weight: how to load it, and which view of it was saved."""

    load: Callable[[], Tensor]
    size: torch.Size
    stride: Any
    offset: Any


def _pack(x: Tensor, live: dict[int, Callable[[], Tensor]]) -> Any:
    load = live.get(x.untyped_storage().data_ptr()) if x.layout is torch.strided else None
    return x if load is None else _Note(load, x.shape, x.stride(), x.storage_offset())


def _unpack(kept: Any) -> Tensor:
    return kept.load().as_strided(kept.size, kept.stride, kept.offset) if isinstance(kept, _Note) else kept


def _rows(p: Tensor, entry: Entry | Held, ids: Tensor) -> Tensor:
    """Return an embedding table of which only the rows asked for are filled in, and only they take memory."""
    table = torch.empty(p.shape, dtype=p.dtype, device=p.device)
    for row in torch.unique(ids).tolist():
        table[row] = entry.read(row, row + 1)[0].to(p.device, p.dtype)
    return table
