"""Fingerprints: what a stored Gram was computed from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PIECE = 1 << 24


def fingerprint_model(model: nn.Module) -> str:
    """Return a sha256 over names, dtypes, shapes and bytes of a model's parameters and buffers."""
    return _fingerprint(sorted(model.state_dict().items()))


def fingerprint_inputs(inputs: Mapping[str, Tensor]) -> str:
    """Return a sha256 over names, dtypes, shapes and bytes of a mapping of tensors."""
    return _fingerprint(sorted(inputs.items()))


def fingerprint_array(array: Any) -> str:
    """Return a sha256 over dtype, shape and bytes of an array."""
    array = np.ascontiguousarray(array)
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()


def _fingerprint(items: Iterable[tuple[str, Any]]) -> str:
    digest = hashlib.sha256()
    for name, value in items:
        if not isinstance(value, Tensor):
            digest.update(f"{name}|{value!r}|".encode())
            continue
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        flat = value.detach().reshape(-1)
        for piece in flat.split(_PIECE):
            digest.update(piece.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
