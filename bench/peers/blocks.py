"""A Gram whose gradients do not fit in memory: those of a block are held, those of the samples before stream past."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

HELD, STREAMED = 128, 32  # gradients: 11 and 3 GiB of the 22 M parameters of MiniLM's size, for a machine of 24 GiB


def blocked(N: int, outputs: int, gradients: Callable[[slice], Mapping[str, Tensor]], *, twice: bool = False) -> Tensor:
    """Return the Gram, (N, N): as few passes as the memory allows, one where all fits.

    Args:
        N: samples.
        outputs: gradients of a sample that `gradients` returns.
        gradients: of some samples, by parameter, one row of numbers a sample.
        twice: a block's own are computed anew for its second side.
    """
    held, streamed = HELD // outputs, STREAMED // outputs
    K: Tensor | None = None
    for a in range(0, N, held):
        b = min(a + held, N)
        mine = gradients(slice(a, b))
        K = next(iter(mine.values())).new_zeros(N, N) if K is None else K
        if not twice:
            K[a:b, a:b] = _products(mine, mine)
        end = b if twice else a
        for s in range(0, end, streamed):
            part = slice(s, min(s + streamed, end))
            K[a:b, part] = _products(mine, gradients(part))
        del mine
    assert K is not None
    return K.tril() + K.tril(-1).T


def _products(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([one[name] @ other[name].T for name in one]).sum(0)


def sliced(inputs: Mapping[str, Tensor], part: slice) -> dict[str, Tensor]:
    """Return some samples of the inputs."""
    return {k: v[part] for k, v in inputs.items()}
