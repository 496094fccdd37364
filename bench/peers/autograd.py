"""One autograd call a sample and output: whole Jacobians in memory, then matrix products."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from bench.peers.blocks import blocked, sliced
from bench.peers.work import Config, outputs, selected


def prepare(model: nn.Module, config: Config) -> Callable[[dict[str, Tensor]], np.ndarray]:
    """Return the call; in the model's own dtype, so that a model in float64 gives the reference."""
    params = list(selected(model, config).values())
    C, P = config["C"], sum(p.numel() for p in params)

    def gram(inputs: dict[str, Tensor]) -> np.ndarray:
        def gradients(part: slice) -> dict[str, Tensor]:
            jacobian = torch.empty(part.stop - part.start, C, P, dtype=params[0].dtype)
            for i, n in enumerate(range(part.start, part.stop)):
                f = outputs(model, sliced(inputs, slice(n, n + 1)))[0]
                for c in range(C):
                    found = torch.autograd.grad(f[c], params, retain_graph=c + 1 < C)
                    torch.cat([g.flatten() for g in found], out=jacobian[i, c])
            return {"all": jacobian.flatten(1)}

        return blocked(len(next(iter(inputs.values()))), C, gradients).numpy()

    return gram
