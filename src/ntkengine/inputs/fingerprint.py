"""Fingerprints: what a stored Gram was computed from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules import module as everywhere

from ntkengine.inputs.digest import Digest

_GLOBAL = ("_global_forward_pre_hooks", "_global_forward_hooks", "_global_backward_pre_hooks", "_global_backward_hooks")


def fingerprint_model(model: nn.Module) -> str:
    """Return a sha256 over a model's parameters and buffers (names, dtypes, shapes, bytes), modules and configuration.

    Equal weights are not an equal model: activations, heads, rotary base or an adapter's scaling live in the modules'
    classes, code and attributes, and in the configuration. Hooks that run in every module of the process count too.
    """
    digest, hooks = Digest().add(model), _global_hooks()
    return (digest.add(hooks) if any(hooks.values()) else digest).hexdigest()


def fingerprint_inputs(inputs: Mapping[str, Tensor]) -> str:
    """Return a sha256 over names, dtypes, shapes and bytes of a mapping of tensors."""
    return Digest().add(dict(sorted(inputs.items()))).hexdigest()


def fingerprint_array(array: Any) -> str:
    """Return a sha256 over dtype, shape and bytes of an array."""
    return Digest().add(np.asarray(array)).hexdigest()


def libraries_of(function: Any) -> set[str]:
    """Return the top-level names of the modules that `fingerprint_function` knows by name; of None none."""
    digest = Digest().add(function)
    return digest.libraries


def fingerprint_function(function: Any) -> str:
    """Return a sha256 over what a callable does: its code, constants, defaults, what it closes over and is bound to.

    The globals it names count by their values, functions by their code, those of installed libraries by their name.
    """
    return Digest().add(function).hexdigest()


def _global_hooks() -> dict[str, list[Any]]:
    """Return the hooks that run in every module, by kind; but for torch's own, which only watch."""
    return {kind: [hook for hook in vars(everywhere)[kind].values() if not _of_torch(hook)] for kind in _GLOBAL}


def _of_torch(hook: Any) -> bool:
    return str(getattr(hook, "__module__", None) or type(hook).__module__).partition(".")[0] == "torch"
