"""Opacus: per-sample gradients of all parameters by its GradSampleModule, then matrix products.

It records only in train mode (dropout is set to 0), and takes the leading axis for the sample's: positions and token
types, which BERT shares between samples, are given for each.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from opacus import GradSampleModule
from torch import Tensor, nn

from bench.peers.blocks import blocked
from bench.peers.work import Config


def prepare(model: nn.Module, config: Config) -> Callable[[dict[str, Tensor]], np.ndarray]:
    """Return the call. Activations serve one backward: each output has its own passes."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    wrapped = GradSampleModule(model.train(), loss_reduction="sum")

    def gram(inputs: dict[str, Tensor]) -> np.ndarray:
        every = inputs["input_ids"]
        K = torch.zeros(len(every), len(every))
        for c in range(config["C"]):

            def gradients(part: slice, c: int = c) -> dict[str, Tensor]:
                ids = every[part]
                positions = torch.arange(ids.shape[1]).expand(ids.shape)
                f = wrapped(input_ids=ids, position_ids=positions, token_type_ids=torch.zeros_like(ids)).logits
                f[:, c].sum().backward()
                found = {name: p.grad_sample.flatten(1) for name, p in wrapped.named_parameters()}
                wrapped.zero_grad(set_to_none=True)
                return found

            K += blocked(len(every), 1, gradients)
        return K.numpy()

    return gram
