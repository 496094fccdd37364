"""Whether padding leaves f alone: what may be cut, and what the user should know."""

from __future__ import annotations

import logging

import torch
from torch import nn

from ntkengine.inputs.batches import Samples
from ntkengine.inputs.readout import Readout
from ntkengine.inputs.running import call_model
from ntkengine.tangents.verify import close

log = logging.getLogger(__name__)


def trim_holds(model: nn.Module, samples: Samples, readout: Readout, parameter: nn.Parameter) -> bool:
    """Return whether cutting padding columns leaves f unchanged, on the shortest sample."""
    if not any(samples.trim):
        return False
    with torch.no_grad():
        f = []
        for trim in (True, False):
            one = Samples(samples.groups, microbatch=1, trim=trim)
            inputs = one.inputs(one.chunks[0], parameter.device, parameter.dtype)
            try:
                f.append(readout(call_model(model, inputs), inputs))
            except (RuntimeError, IndexError, ValueError):
                if not trim:
                    raise
                return False  # the model wants this length
    return close(f[0], f[1])


def warn_of_left_padding(model: nn.Module, samples: Samples, readout: Readout, parameter: nn.Parameter) -> None:
    """Log a warning when padding on the left changes f, on the most padded sample.

    A model that counts positions from the first column gives an example other outputs, and so another kernel, in a
    wider batch. Nothing is wrong with the Gram of these very tensors, but hardly anyone wants it.
    """
    for group in samples.groups:
        mask = group.get("attention_mask")
        if mask is None or mask.ndim != 2 or "position_ids" in group:
            continue
        before = (mask != 0).int().argmax(1)
        row = int(before.argmax())
        cut = int(before[row])
        if not cut:
            continue
        one = {k: v[row : row + 1].to(parameter.device) for k, v in group.items()}
        one = {k: v.to(parameter.dtype) if v.is_floating_point() else v for k, v in one.items()}
        bare = {k: v[:, cut:] if v.shape[1:] == mask.shape[1:] else v for k, v in one.items()}
        with torch.no_grad():
            try:
                f, alone = (readout(call_model(model, x), x) for x in (one, bare))
            except (RuntimeError, IndexError, ValueError):
                continue  # the model wants this length
        if f.shape == alone.shape and not close(f, alone):
            log.warning(
                "inputs: the model counts positions from the first column, so padding on the left changes f (example "
                "%d: by %.1e); pad on the right, or pass position_ids",
                row,
                float((f - alone).abs().max()),
            )
            return
