"""torch.func's vmap(jacrev), the Jacobian contraction of PyTorch's NTK tutorial.

In chunks of 8 samples (in one piece it is killed for memory at 24 GiB). As the tutorial does, the Jacobians of x1 and
of x2 are both taken, though they are equal here; with `sides` = 1 only once, which the tutorial does not offer.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from bench.peers.work import Config

CHUNK = 8


def prepare(model: nn.Module, config: Config) -> Callable[[dict[str, Tensor]], np.ndarray]:
    """Return the call."""
    params = {k: v.detach() for k, v in model.named_parameters()}
    sides = int(config.get("sides", 2))

    def f(p: dict[str, Tensor], ids: Tensor) -> Tensor:
        return torch.func.functional_call(model, p, (), {"input_ids": ids[None]}).logits[0]

    jacobian = torch.func.vmap(torch.func.jacrev(f), (None, 0))

    def gram(inputs: dict[str, Tensor]) -> np.ndarray:
        ids = inputs["input_ids"]
        store: dict[str, Tensor] = {}
        for start in [*range(0, len(ids), CHUNK)] * sides:  # x2's overwrite x1's, equal
            for key, j in jacobian(params, ids[start : start + CHUNK]).items():
                if key not in store:
                    store[key] = torch.empty(len(ids), config["C"], j[0, 0].numel())
                store[key][start : start + CHUNK] = j.flatten(2)
        return sum(torch.einsum("Naf,Maf->NM", store[key], store.pop(key)) for key in list(store)).numpy()

    return gram
