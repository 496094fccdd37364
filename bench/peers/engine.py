"""The engine itself: `check` compares with plain autograd and estimates the noise, which no peer does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor, nn

from bench.peers.work import Config, selected


def prepare(model: nn.Module, config: Config) -> Callable[[dict[str, Tensor]], np.ndarray]:
    """Return the call."""
    import ntkengine as ntk

    names = list(selected(model, config))
    check, precision = config.get("check", "yes") == "yes", config.get("precision", "high")

    def gram(inputs: dict[str, Tensor]) -> np.ndarray:
        return np.asarray(ntk.compute_gram(model, inputs, params=names, check=check, precision=precision).values)

    return gram
