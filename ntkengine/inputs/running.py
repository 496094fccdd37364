"""Running a model as the kernel needs it, and leaving it as it was found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ntkengine.errors import InputError

_INFERENCE = "support_avx512bf16_for_cpu"  # bitsandbytes' switch of a kernel without derivative


def call_model(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """Return the model's output on a batch, labels kept back (the readout, not the model, looks at them)."""
    given = {k: v for k, v in inputs.items() if k != "labels"}
    if len(given) == 1 and not hasattr(model, "config"):  # a plain torch module: its one input has no agreed name
        return model(*given.values())
    return model(**given)


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Run a model as the kernel needs it, and restore everything after.

    Eval mode, weights frozen, no KV cache, no TF32; mixture-of-experts layers by their plain loop, the only one that
    takes every dtype and rounds in it; 4-bit layers of bitsandbytes without their CPU kernel for inference, which has
    no derivative.

    Raises:
        InputError: such a layer's weights are already laid out for that kernel.
    """
    training = [(m, m.training) for m in model.modules()]
    grads = [(p, p.requires_grad) for p in model.parameters()]
    configs = {id(c): c for c in (getattr(m, "config", None) for m in model.modules()) if c is not None}
    configs |= {id(c): c for owner in list(configs.values()) if (c := getattr(owner, "text_config", None)) is not None}
    plain = {"use_cache": False, "_experts_implementation_internal": "eager"}
    settings = [(c, k, getattr(c, k)) for c in configs.values() for k in plain if getattr(c, k, None)]
    settings += [(m, _INFERENCE, True) for m in model.modules() if getattr(m, _INFERENCE, False)]
    _check_differentiable(model)
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        model.eval()
        for p, _ in grads:
            p.requires_grad_(False)
        for owner, key, _ in settings:
            setattr(owner, key, plain.get(key, False))
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        with torch.enable_grad():
            yield
    finally:
        for module, was in training:
            module.training = was
        for p, wanted in grads:
            p.requires_grad_(wanted)
        for owner, key, was in settings:
            setattr(owner, key, was)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


def _check_differentiable(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if getattr(getattr(getattr(module, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
            msg = (
                f"model: {name} ({type(module).__name__}) ran in eval mode, which packed its 4-bit weights for a "
                "kernel that has no derivative; load the model again and compute its Gram first"
            )
            raise InputError(msg)


@contextmanager
def wanting_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within the block these frozen parameters require gradients."""
    chosen = list(parameters)
    try:
        for p in chosen:
            p.requires_grad_(True)
        yield
    finally:
        for p in chosen:
            p.requires_grad_(False)
