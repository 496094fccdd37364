"""Layers whose kernels have no derivative: autograd leaves their part out of a gradient without a word."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from ntkengine.errors import InputError
from ntkengine.inputs.attributes import stored_weight

# torch's own integer layers, but for tables (integers go in), stand-ins for float operations, and models of them.
_INTEGER = re.compile(r"torch\.ao\.nn\.(intrinsic\.)?quantized\.(?!.*(embedding_ops|functional_modules|reference))")
# What torchao's weights say of how the activations that meet them are rounded; None where they are not.
_ACTIVATIONS = ("act_quant_kwargs", "activation_quantization", "input_quant_func")


def check_differentiable(model: nn.Module) -> None:
    """Refuse layers that f cannot be differentiated through.

    Raises:
        InputError: naming the first: torch's integer layers; weights of torchao that round activations as well; 4-bit
            weights of bitsandbytes that are already laid out for its kernel for inference.
    """
    for name, module in model.named_modules():
        kind = f"model: {name} ({type(module).__name__})"
        if _INTEGER.match(type(module).__module__):
            msg = f"{kind} computes in integers, which has no derivative; load the model without that quantisation"
            raise InputError(msg)
        weight: Any = stored_weight(module)
        if any(getattr(weight, key, None) is not None for key in _ACTIVATIONS):
            msg = f"{kind} rounds its activations, which has no derivative; quantise its weights alone"
            raise InputError(msg)
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            msg = (
                f"{kind} ran in eval mode, which packed its 4-bit weights for a "
                "kernel that has no derivative; load the model again and compute its Gram first"
            )
            raise InputError(msg)
