"""Per-sample weight gradients of convolutions: patches of the input against output gradients.

A convolution is a linear map of patches, G_nc = Σ_l d_ncl p_nlᵀ with patches p of length c_in/groups·kernel, so that a
sample's gradient is a product of matrices; the module's own VJP would also run the convolution again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_PATCH_BYTES = 16 << 20  # of unfolded patches at once


def unfolds(module: nn.Module) -> bool:
    """Whether a module is a convolution whose patches `torch.nn.functional.unfold` makes: in one or two dimensions."""
    known = type(module).forward in (nn.Conv1d.forward, nn.Conv2d.forward)
    return known and getattr(module, "padding_mode", "") == "zeros" and not isinstance(module.padding, str)


def weight_gradient(module: nn.Module, x: Tensor, d: Tensor) -> Tensor:
    """Return (n, C, c_out, c_in/groups·kernel), in the order of the weight's entries.

    Args:
        module: a convolution that `unfolds`.
        x: (n, c_in, …) its input.
        d: (n, C, c_out, …) gradients of its output.
    """
    one: Any = module
    line = len(one.kernel_size) == 1  # as a picture of height 1

    def pair(value: tuple[int, ...], along: int) -> tuple[int, ...]:
        return (along, *value) if line else value

    n, C, groups = *d.shape[:2], one.groups
    d = d.reshape(n, C, groups, one.out_channels // groups, -1)
    x = x.unsqueeze(2) if line else x
    found = torch.empty(n, groups, C, d.shape[3], one.weight[0].numel(), dtype=d.dtype, device=d.device)
    step = max(1, _PATCH_BYTES // max(1, d.shape[-1] * x.shape[1] * one.weight[0, 0].numel() * x.element_size()))
    for start in range(0, n, step):
        part = slice(start, start + step)
        patches = nn.functional.unfold(
            x[part], pair(one.kernel_size, 1), pair(one.dilation, 1), pair(one.padding, 0), pair(one.stride, 1)
        )
        patches = patches.unflatten(1, (groups, -1)).transpose(2, 3).flatten(0, 1)  # (n·groups, positions, entries)
        rows = d[part].transpose(1, 2).flatten(0, 1).flatten(1, 2)  # (n·groups, C·c_out/groups, positions)
        found[part] = torch.bmm(rows, patches).view(-1, *found.shape[1:])
    return found.transpose(1, 2).flatten(2, 3)
