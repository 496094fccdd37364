"""Which backend runs the contractions: Triton kernels, or torch."""

from __future__ import annotations

import logging

import torch
from ntk_kernels import runtime

from ntkengine.errors import InputError

log = logging.getLogger(__name__)

BACKENDS = ("auto", "triton", "torch")
_logged: set[str] = set()


def uses_kernels(backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether contractions run in Triton kernels.

    Args:
        backend: `"auto"`: on a GPU where they can; `"triton"`: they must; `"torch"`: they must not.
        device: where the model is.
        dtype: what it runs in.

    Raises:
        InputError: `"triton"` where kernels cannot run.
    """
    if backend == "torch":
        return False
    reason = runtime.why_not(device)
    if reason is None and dtype == torch.float64:
        reason = "kernels take float32 and bfloat16, this job runs in float64"
    if backend == "triton":
        if reason is not None:
            msg = f"backend='triton': {reason}; or use backend='torch'"
            raise InputError(msg)
        return True
    if device.type != "cuda":
        return False
    if reason is None and runtime.INTERPRETED:
        reason = "TRITON_INTERPRET is set, and interpreted kernels are slow"
    chosen = f"torch: {reason}" if reason else "triton: kernels run on this GPU"
    if chosen not in _logged:
        _logged.add(chosen)
        log.info("backend='auto' takes %s", chosen)
    return reason is None
