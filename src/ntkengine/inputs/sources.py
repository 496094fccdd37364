"""Whatever examples come as, turned into a model's inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from ntkengine.errors import InputError
from ntkengine.inputs.examples import tokenize
from ntkengine.inputs.parameters import require_module
from ntkengine.inputs.tokenised import collated, columns_as_tensors, is_tokenised, main_input

Source = Mapping[str, Any] | Iterable[Any]


def as_inputs(source: Any, model: nn.Module) -> Mapping[str, Tensor]:
    """Return a mapping of tensors with a leading sample axis.

    Args:
        source: such a mapping, which is returned as it is; one of arrays or lists; a tensor or an array, the model's
            main input where that is no token ids; inputs in another form (`inputs.tokenised`); or texts (`tokenize`),
            for which the model's own tokenizer is used.
        model: that will run on them.

    Raises:
        InputError: no model, or as `collated` and `tokenize`.
    """
    require_module(model)
    if isinstance(source, Mapping) and ("text" not in source or any(isinstance(v, Tensor) for v in source.values())):
        if all(isinstance(v, Tensor) for v in source.values()):
            return source
        return columns_as_tensors(source, model)
    name = main_input(model) if hasattr(model, "main_input_name") else "input"  # a plain module's has no agreed name
    if isinstance(source, Tensor | np.ndarray) and source.ndim and name != "input_ids":  # these may be padded
        return columns_as_tensors({name: source})
    several = isinstance(source, Iterable) or hasattr(source, "texts") or hasattr(source, "columns")
    if isinstance(source, Tensor | str | type) or not several:
        msg = f"inputs: expected a mapping of tensors with a leading sample axis, or texts, got {type(source).__name__}"
        raise InputError(msg)
    if is_tokenised(source, model):
        return collated(source, model)
    return tokenize(source, model)
