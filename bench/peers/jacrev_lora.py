"""The procedure of arXiv 2602.08239: jacrev over all parameters, one example at a time, only the LoRA part kept."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from bench.peers.work import Config, selected


def prepare(model: nn.Module, config: Config) -> Callable[[dict[str, Tensor]], np.ndarray]:
    """Return the call."""
    params = {k: v.detach() for k, v in model.named_parameters()}
    kept = list(selected(model, config))

    def f(p: dict[str, Tensor], ids: Tensor) -> Tensor:
        return torch.func.functional_call(model, p, (), {"input_ids": ids}).logits[0]

    def gram(inputs: dict[str, Tensor]) -> np.ndarray:
        rows = []
        for ids in inputs["input_ids"]:
            jacobian = torch.func.jacrev(f)(params, ids[None])
            rows.append(torch.cat([jacobian[k].flatten(1) for k in kept], 1).flatten())
        J = torch.stack(rows)
        return (J @ J.T).numpy()

    return gram
