"""Parameters of the model a user holds that a copy of it in another precision still computes with.

A function that names its model, such as `lambda out, inputs: out[0] @ model.head.weight.T` or a hook set in a script,
goes on reading that model when a copy is run: what it gives is no function of the copy's parameters alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ntkengine.errors import InputError
from ntkengine.inputs.batches import Chunk, Samples
from ntkengine.inputs.readout import Readout
from ntkengine.inputs.running import call_model, evaluation, wanting_gradients
from ntkengine.inputs.unrounded import unrounded


def refuse_strangers(model: nn.Module, copy: nn.Module, readout: Readout, samples: Samples) -> None:
    """Refuse a copy whose outputs on one example depend on the parameters of the model that it was made of.

    Args:
        model: the model.
        copy: in another dtype, made of it.
        readout: f.
        samples: of which the shortest is run.

    Raises:
        InputError: naming the first such parameter.
    """
    ours = {id(p) for p in copy.parameters()}
    theirs = {id(p): name for name, p in model.named_parameters() if p.is_floating_point() and id(p) not in ours}
    parameter = next(p for p in copy.parameters() if p.is_floating_point())
    chunk = Chunk(samples.chunks[0].group, samples.chunks[0].rows[:1], samples.chunks[0].start)
    inputs = samples.inputs(chunk, parameter.device, parameter.dtype)
    found = None
    with evaluation(copy), wanting_gradients(p for p in model.parameters() if id(p) in theirs), torch.enable_grad():
        try:
            with unrounded(parameter.dtype):
                f = readout(call_model(copy, inputs), inputs)
        except Exception:  # noqa: BLE001 - whatever it is, the probe meets it and says so
            return
        found = next((theirs[leaf] for leaf in _leaves(f) if leaf in theirs), None)
    if found is not None:
        raise InputError(
            f"{found}: a function in the readout or the model reads it from the model it was written for, not from the "
            f"copy in {str(parameter.dtype).removeprefix('torch.')} that is computed with; read it in a module's "
            "forward from `self`, or give the model in that dtype"
        )


def _leaves(f: Tensor) -> set[int]:
    """Return the ids of the leaves that a tensor depends on."""
    found, seen, left = set(), set(), [f.grad_fn]
    while left:
        node: Any = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found.add(id(leaf))
        left.extend(next_node for next_node, _ in node.next_functions)
    return found
