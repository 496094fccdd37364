"""Fingerprints: what a stored Gram was computed from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from ntkengine.inputs.digest import Digest


def fingerprint_model(model: nn.Module) -> str:
    """Return a sha256 over a model's parameters and buffers (names, dtypes, shapes, bytes), modules and configuration.

    Equal weights are not an equal model: activations, heads, rotary base or an adapter's scaling live in the modules'
    classes, code and attributes, and in the configuration.
    """
    return Digest().add(model).hexdigest()


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
