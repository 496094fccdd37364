"""Whether a tensor's values are what they were: a copy would take its memory again, so a sum of its bits is kept."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ntkengine.inputs.streaming import entry_of

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Traces:
    """Tensors by name, as they are now.

    Some libraries write to a weight what it held before, as PEFT's COFT and its `target_parameters` do at every call.

    Args:
        tensors: by name.
        limit: bytes; of tensors beyond, the smallest counted first, any write counts as a change.

    Cost: each tensor within the limit is read once, and once more if it was written to.
    """

    def __init__(self, tensors: Mapping[str, Tensor], limit: int = 256 << 20) -> None:
        self._held: dict[str, tuple[Tensor, int, Tensor | None]] = {}
        for name, t in sorted(tensors.items(), key=lambda item: item[1].numel()):
            limit -= t.numel() * t.element_size()
            self._held[name] = t, t._version, _sum_of_bits(t) if limit >= 0 else None

    def changed(self) -> list[str]:
        """Return the names of those that were written to and hold other values now, or none that can be compared."""
        found = []
        for name, (tensor, version, before) in self._held.items():
            if tensor._version != version:
                now = _sum_of_bits(tensor)
                if before is None or now is None or not torch.equal(before, now):
                    found.append(name)
        return found


def _sum_of_bits(tensor: Tensor) -> Tensor | None:
    """Return Σ_r (r + 1)·Σ bits of row r, modulo 2⁶⁴; None for what has no bits of its own to sum."""
    plain = tensor.detach()
    if type(plain) is not Tensor or entry_of(tensor) is not None or plain.layout is not torch.strided:
        return None
    if not plain.numel() or plain.element_size() not in _WORDS:
        return None
    bits = plain.view(_WORDS[plain.element_size()]) if plain.ndim else plain.reshape(1).view(_WORDS[plain.nbytes])
    if bits.is_contiguous():
        bits = bits.reshape(len(bits), -1)
        bits = bits.view(torch.int64) if bits[0].nbytes % 8 == 0 else bits  # sums of these are several times quicker
    rows = bits.sum(tuple(range(1, bits.ndim)), dtype=torch.int64) if bits.ndim > 1 else bits.long()
    return (rows * torch.arange(1, len(rows) + 1, device=rows.device)).sum()
