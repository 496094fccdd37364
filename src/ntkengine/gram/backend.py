"""Which backend runs the contractions: Triton kernels, or torch."""

from __future__ import annotations

import logging

import torch
from ntk_kernels import runtime
from ntk_kernels.syrk import syrk

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


def try_kernels(device: torch.device) -> str | None:
    """Return why kernels do not run on a device, after running a small product there; None where it came out right."""
    reason = runtime.why_not(device)
    if reason is not None:
        return reason
    x = torch.linspace(-1.0, 1.0, 48 * 64, device=device).view(48, 64)
    K = torch.zeros(48, 48, dtype=torch.float64, device=device)
    try:
        syrk(x, K, lower=False)
        wrong = float((K - x.double() @ x.double().T).norm() / K.norm())
    except Exception as error:  # noqa: BLE001  (compilers and drivers fail in ways of their own)
        return f"kernels fail: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None if wrong < 1e-5 else f"kernels give a wrong product, relative error {wrong:.1e}"
