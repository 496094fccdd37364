"""One autograd call a sample and output: the whole Jacobian in memory, then one matrix product."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from bench.peers.work import Config, outputs, selected


def prepare(model: nn.Module, config: Config) -> Callable[[dict[str, Tensor]], np.ndarray]:
    """Return the call; in the model's own dtype, so that a model in float64 gives the reference."""
    params = list(selected(model, config).values())
    P = sum(p.numel() for p in params)

    def gram(inputs: dict[str, Tensor]) -> np.ndarray:
        N = len(next(iter(inputs.values())))
        jacobian = torch.empty(N, config["C"], P, dtype=params[0].dtype)
        for n in range(N):
            f = outputs(model, {k: v[n : n + 1] for k, v in inputs.items()})[0]
            for c in range(len(f)):
                found = torch.autograd.grad(f[c], params, retain_graph=c + 1 < len(f))
                torch.cat([g.flatten() for g in found], out=jacobian[n, c])
        flat = jacobian.view(N, -1)
        return (flat @ flat.T).numpy()

    return gram
