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

_PIECE = 1 << 24
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
# Fields that change no value; use_cache is switched off while a kernel is computed.
_NOT_VALUES = frozenset(
    {"_name_or_path", "base_model_name_or_path", "transformers_version", "peft_version", "use_cache", "architectures"}
)


def fingerprint_model(model: nn.Module) -> str:
    """Return a sha256 over a model's parameters and buffers (names, dtypes, shapes, bytes) and its configuration.

    Equal weights are not an equal model: heads, activation, rotary base or an adapter's scaling live in the config.
    """
    tensors = {**dict(model.named_buffers()), **dict(model.state_dict())}  # rotary tables are in no state dict
    return _fingerprint([*sorted(tensors.items()), ("config", _configuration(model))])


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
    """Return a sha256 over what a callable does: its code, constants, defaults and what it closes over.

    Functions it calls by a global name are known by that name alone.
    """
    return hashlib.sha256(_ADDRESS.sub("", repr(_parts(function))).encode()).hexdigest()


def _parts(value: Any) -> Any:
    if isinstance(value, functools.partial):
        return _parts(value.func), [_parts(v) for v in value.args], {k: _parts(v) for k, v in value.keywords.items()}
    if isinstance(value, types.CodeType):
        return value.co_code, value.co_names, [_parts(c) for c in value.co_consts]
    if isinstance(value, types.MethodType):
        return _parts(value.__func__), _parts(value.__self__)
    if isinstance(value, types.FunctionType):
        cells = [_parts(cell.cell_contents) for cell in value.__closure__ or ()]
        return _parts(value.__code__), [_parts(v) for v in value.__defaults__ or ()], value.__kwdefaults__, cells
    if isinstance(value, Tensor):
        return fingerprint_inputs({"": value})
    if isinstance(value, nn.Module):
        return fingerprint_model(value)
    if callable(value) and not isinstance(value, type):  # an object: its class's code and its state
        state = sorted((k, _parts(v)) for k, v in getattr(value, "__dict__", {}).items())
        return type(value).__qualname__, _parts(type(value).__call__), state
    return value


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
        for part in _plain(value.detach()):
            for piece in part.reshape(-1).split(_PIECE):
                digest.update(piece.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
