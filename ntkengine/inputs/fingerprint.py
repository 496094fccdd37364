"""Fingerprints: what a stored Gram was computed from."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import types
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkengine.inputs.streaming import brings, entry_of

_PIECE = 1 << 24
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
# A module's own bookkeeping, and what names a source; parameters and buffers are hashed by themselves.
_NOT_STATE = frozenset(
    {*vars(nn.Module()), "config", "generation_config", "name_or_path", "warnings_issued",
     "_is_hf_initialized", "_use_kernels", "_weight_conversions", "kernel_config",
     "ntk_source", "ntk_tokenizer", "ntk_head_new", "peft_config"}
)  # fmt: skip
# Fields that change no value; use_cache is switched off while a kernel is computed.
_NOT_VALUES = frozenset(
    {"_name_or_path", "base_model_name_or_path", "transformers_version", "peft_version", "use_cache", "architectures"}
)


def fingerprint_model(model: nn.Module) -> str:
    """Return a sha256 over a model's parameters and buffers (names, dtypes, shapes, bytes), modules and configuration.

    Equal weights are not an equal model: activations, heads, rotary base or an adapter's scaling live in the modules'
    classes and plain attributes, and in the configuration.
    """
    # Rotary tables are in no state dict; keep_vars: a streamed weight is known by its parameter.
    tensors = {**dict(model.named_buffers()), **dict(model.state_dict(keep_vars=True))}
    modules = [(name, _module(module)) for name, module in model.named_modules()]
    return _fingerprint([*sorted(tensors.items()), ("modules", modules), ("config", _configuration(model))])


def _module(module: nn.Module) -> tuple[Any, ...]:
    """Return a module's class, plain attributes and hooks, as far as they may bear on what it computes."""
    kept = {k: v for k, v in vars(module).items() if k not in _NOT_STATE and "cache" not in k}
    hooks = [
        _named(hook)
        for kind in ("_forward_pre_hooks", "_forward_hooks")
        for hook in vars(module)[kind].values()
        if not brings(hook)
    ]
    return _named(type(module)), [(k, _simple(v)) for k, v in sorted(kept.items())], hooks


def _named(value: Any) -> str:
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def _simple(value: Any, depth: int = 3) -> Any:
    """Return plain values as they are, and the kind of anything else: modules and parameters are listed elsewhere."""
    if value is None or isinstance(value, bool | int | float | complex | str | torch.dtype):
        return value
    if depth and isinstance(value, Mapping):
        return sorted((str(k), _simple(v, depth - 1)) for k, v in value.items())
    if depth and isinstance(value, list | tuple | set | frozenset):
        found = [_simple(v, depth - 1) for v in value]
        return sorted(found, key=repr) if isinstance(value, set | frozenset) else found
    if (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.numel() < _PIECE
        and entry_of(value) is None
    ):
        return fingerprint_inputs({"": value.detach()})
    return _named(value) if callable(value) else _named(type(value))


def _configuration(model: nn.Module) -> str:
    """Return the model's and its adapters' settings as text, without what names a place or a version."""
    configs = [getattr(model, "config", None), *dict(getattr(model, "peft_config", None) or {}).values()]
    found = [c.to_dict() for c in configs if hasattr(c, "to_dict")]
    kept = [{k: v for k, v in c.items() if k not in _NOT_VALUES} for c in found]
    return json.dumps(kept, sort_keys=True, default=lambda v: sorted(map(str, v)) if isinstance(v, set) else str(v))


def fingerprint_inputs(inputs: Mapping[str, Tensor]) -> str:
    """Return a sha256 over names, dtypes, shapes and bytes of a mapping of tensors."""
    return _fingerprint(sorted(inputs.items()))


def fingerprint_array(array: Any) -> str:
    """Return a sha256 over dtype, shape and bytes of an array."""
    array = np.ascontiguousarray(array)
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()


def fingerprint_function(function: Any) -> str:
    """Return a sha256 over what a callable does: its code, constants, defaults, and what it closes over.

    The globals it names count by their values, functions by their code, those of installed libraries by their name.
    """
    return hashlib.sha256(_ADDRESS.sub("", repr(_parts(function, set()))).encode()).hexdigest()


def _parts(value: Any, seen: set[int]) -> Any:
    if isinstance(value, types.FunctionType):
        if id(value) in seen:
            return value.__qualname__
        seen.add(id(value))
    if isinstance(value, functools.partial | types.MethodType | types.FunctionType | types.CodeType):
        return _code(value, seen)
    if isinstance(value, Tensor):
        return fingerprint_inputs({"": value})
    if isinstance(value, np.ndarray):
        return fingerprint_array(value)
    if isinstance(value, nn.Module):
        return fingerprint_model(value)
    if isinstance(value, types.ModuleType | type):
        return getattr(value, "__name__", "")
    if callable(value):  # an object: its class's code and its state
        state = sorted((k, _parts(v, seen)) for k, v in getattr(value, "__dict__", {}).items())
        call = _parts(type(value).__call__, seen) if hasattr(type(value).__call__, "__code__") else ""
        return type(value).__qualname__, call, state
    return value


def _code(value: Any, seen: set[int]) -> Any:
    if isinstance(value, functools.partial):
        keywords = {k: _parts(v, seen) for k, v in value.keywords.items()}
        return _parts(value.func, seen), [_parts(v, seen) for v in value.args], keywords
    if isinstance(value, types.CodeType):
        return value.co_code, value.co_names, [_parts(c, seen) for c in value.co_consts]
    if isinstance(value, types.MethodType):
        return _parts(value.__func__, seen), _parts(value.__self__, seen)
    cells = [_parts(cell.cell_contents, seen) for cell in value.__closure__ or ()]
    given = [_parts(v, seen) for v in value.__defaults__ or ()]
    outside = {n: value.__globals__[n] for n in _names(value.__code__) if n in value.__globals__}
    own = {n: _parts(v, seen) for n, v in sorted(outside.items()) if not _foreign(v)}
    return _parts(value.__code__, seen), given, value.__kwdefaults__, cells, own


def _names(code: types.CodeType) -> set[str]:
    inside = [_names(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return set(code.co_names).union(*inside)


def _foreign(value: Any) -> bool:
    """Whether a function belongs to an installed library, which its version stands for."""
    return isinstance(value, types.FunctionType) and "site-packages" in value.__code__.co_filename


def _plain(value: Tensor) -> list[Tensor]:
    """Return the dense tensors a tensor is made of: itself, or what a quantised one wraps."""
    if type(value) not in (Tensor, nn.Parameter) and hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        return [part for name in names for part in _plain(getattr(value, name))]
    return [value if value.layout is torch.strided else value.to_dense()]


def _fingerprint(items: Iterable[tuple[str, Any]]) -> str:
    digest = hashlib.sha256()
    for name, value in items:
        if not isinstance(value, Tensor):
            digest.update(f"{name}|{value!r}|".encode())
            continue
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        entry = entry_of(value)
        if entry is not None:
            rows = max(1, _PIECE // max(1, entry.nbytes // entry.shape[0]))
            for start in range(0, entry.shape[0], rows):
                piece = entry.read(start, min(start + rows, entry.shape[0])).to(value.dtype)
                digest.update(piece.view(torch.uint8).numpy().data)
            continue
        for part in _plain(value.detach()):
            for piece in part.reshape(-1).split(_PIECE):
                digest.update(piece.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
