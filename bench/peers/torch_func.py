"""torch.func's vmap(jacrev), the Jacobian contraction of PyTorch's NTK tutorial.

In chunks of 8 samples (in one piece it is killed for memory at 24 GiB). As the tutorial does, the Jacobians of x1 and
of x2 are both taken, though they are equal here; with `sides` = 1 only once, which the tutorial does not offer.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from bench.peers.blocks import blocked
from bench.peers.work import Config

CHUNK = 8


def prepare(model: nn.Module, config: Config) -> Callable[[dict[str, Tensor]], np.ndarray]:
    """Return the call."""
    params = {k: v.detach() for k, v in model.named_parameters()}
    twice = int(config.get("sides", 2)) == 2

    def f(p: dict[str, Tensor], ids: Tensor) -> Tensor:
        return torch.func.functional_call(model, p, (), {"input_ids": ids[None]}).logits[0]

    jacobian = torch.func.vmap(torch.func.jacrev(f), (None, 0))

    def gram(inputs: dict[str, Tensor]) -> np.ndarray:
        ids = inputs["input_ids"]

        def gradients(part: slice) -> dict[str, Tensor]:
            store: dict[str, Tensor] = {}
            for a in range(part.start, part.stop, CHUNK):
                b = min(a + CHUNK, part.stop)
                for key, j in jacobian(params, ids[a:b]).items():
                    if key not in store:
                        store[key] = torch.empty(part.stop - part.start, j[0].numel())
                    store[key][a - part.start : b - part.start] = j.flatten(1)
            return store

        return blocked(len(ids), config["C"], gradients, twice=twice).numpy()

    return gram
