"""Hidden states between the two directions of a sweep: on the model's device, in host memory, or in a file."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
from torch import Tensor

from ntkengine.inputs.weights import pread

PLACES = ("device", "host", "disk")


class Hidden:
    """What entered each block, by microbatch and segment.

    Args:
        place: one of `PLACES`. `"disk"`: a temporary file without a name, in $TMPDIR, gone when the sweep ends.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self._kept: dict[tuple[int, int], Any] = {}
        self._file = tempfile.TemporaryFile(prefix="ntkengine-") if place == "disk" else None  # noqa: SIM115
        self._end = 0

    def close(self) -> None:
        """Let go of everything."""
        self._kept.clear()
        if self._file is not None:
            self._file.close()

    def put(self, microbatch: int, segment: int, hidden: Tensor) -> None:
        """Keep a tensor."""
        if self.place == "device":
            self._kept[microbatch, segment] = hidden
        elif self._file is None:
            host = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=hidden.is_cuda)
            self._kept[microbatch, segment] = host.copy_(hidden), hidden.device
        else:
            raw = hidden.contiguous().cpu().view(torch.uint8).numpy().data
            done = 0
            flat = memoryview(raw).cast("B")
            while done < len(flat):
                done += os.pwrite(self._file.fileno(), flat[done:], self._end + done)
            self._kept[microbatch, segment] = self._end, hidden.shape, hidden.dtype, hidden.device
            self._end += len(flat)

    def take(self, microbatch: int, segment: int, *, keep: bool = False) -> Tensor:
        """Return a tensor, and let go of it unless it is to be kept."""
        kept = self._kept[microbatch, segment] if keep else self._kept.pop((microbatch, segment))
        if isinstance(kept, Tensor):
            return kept
        if self._file is None:
            host, device = kept
            return host.to(device, non_blocking=True)
        start, shape, dtype, device = kept
        raw = pread(self._file.fileno(), shape.numel() * dtype.itemsize, start)
        if raw is None:
            msg = "the temporary file of hidden states is shorter than what was written to it"
            raise OSError(msg)
        return torch.frombuffer(raw, dtype=dtype).view(shape).to(device)
