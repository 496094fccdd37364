"""Whatever examples come as, turned into a model's inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from ntkengine.errors import InputError
from ntkengine.inputs.examples import tokenize
from ntkengine.inputs.parameters import require_module
from ntkengine.inputs.tokenised import collated, columns_as_tensors, is_tokenised

Source = Mapping[str, Any] | Iterable[Any]


def as_inputs(source: Any, model: nn.Module) -> Mapping[str, Tensor]:
    """Return a mapping of tensors with a leading sample axis.

    Args:
        source: such a mapping, which is returned as it is; one of arrays or lists; a tensor or an array, for a plain
            torch module; token ids in another form (`inputs.tokenised`); or texts (`tokenize`), for which the model's
            own tokenizer is used.
        model: that will run on them.

    Raises:
        InputError: no model, or as `collated` and `tokenize`.
    """
    require_module(model)
    if isinstance(source, Mapping) and ("text" not in source or any(isinstance(v, Tensor) for v in source.values())):
        if all(isinstance(v, Tensor) for v in source.values()):
            return source
        return columns_as_tensors(source, model)
    if isinstance(source, Tensor | np.ndarray) and source.ndim and not hasattr(model, "config"):
        return columns_as_tensors({"input": source})  # the one input of such a module has no agreed name
    several = isinstance(source, Iterable) or hasattr(source, "texts") or hasattr(source, "columns")
    if isinstance(source, Tensor | str | type) or not several:
        msg = f"inputs: expected a mapping of tensors with a leading sample axis, or texts, got {type(source).__name__}"
        raise InputError(msg)
    if is_tokenised(source):
        return collated(source, model)
    return tokenize(source, model)
