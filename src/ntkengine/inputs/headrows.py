"""What a classifier's head reads: the Linear that makes the logits, and its inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkengine.errors import InputError
from ntkengine.inputs.batches import Chunk, Samples
from ntkengine.inputs.readout import logits_of
from ntkengine.inputs.running import call_model, evaluation, explained

_NO_LINEAR = "fit_head: no nn.Linear of the model makes its logits; fit the head yourself"


def head_features(model: nn.Module, samples: Samples) -> tuple[str, np.ndarray]:
    """Return the name of the Linear that makes the logits, and its inputs at the rows they were taken from, (N, d)."""
    name = _logits_linear(model, samples)
    features = None
    for chunk in samples.chunks:
        rows = _rows_read(model, name, samples, chunk)
        if features is None:
            features = np.zeros((samples.total, rows.shape[1]))
        features[chunk.rows] = rows.to(torch.float64).cpu().numpy()
    if features is None or not np.isfinite(features).all():
        msg = "fit_head: the head's input features are not finite"
        raise InputError(msg)
    return name, features


def _logits_linear(model: nn.Module, samples: Samples) -> str:
    """Return the last Linear called whose output, or one token's of it, equals the logits of the first microbatch."""
    outputs: list[tuple[str, Tensor]] = []

    def watch(name: str) -> Any:
        return lambda _m, _args, output: outputs.append((name, output))

    handles = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    logits = chunk_logits(model, samples, samples.chunks[0], handles)
    for name, out in reversed(outputs):
        if logits.ndim == 2 and out.shape[-1] == logits.shape[1] and len(out) == len(logits) and out.ndim in (2, 3):
            tokens = out[:, None] if out.ndim == 2 else out
            if bool((tokens == logits[:, None]).all(2).any(1).all()):
                return name
    raise InputError(_NO_LINEAR)


def _rows_read(model: nn.Module, name: str, samples: Samples, chunk: Chunk) -> Tensor:
    """Return the Linear's inputs, (n, d), at the token whose output the logits are.

    Equal outputs do not tell tokens apart (a head of zeros makes them all equal), the logits' gradient with respect to
    the Linear's output does: ones at the token that was read, zeros elsewhere.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def branch(_m: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        seen.append((args[0].detach(), leaf))
        with torch.enable_grad():
            return leaf.clone()  # what follows may write in place, which a leaf forbids

    handle = model.get_submodule(name).register_forward_hook(branch)
    logits = chunk_logits(model, samples, chunk, [handle], grad=True)
    x, out = seen[-1]
    slope = torch.autograd.grad(logits.sum(), out, allow_unused=True)[0] if logits.requires_grad else None
    if slope is None:
        raise InputError(_NO_LINEAR)
    if x.ndim == 2:
        x, out, slope = x[:, None], out[:, None], slope[:, None]
    token = slope[:, :, 0].abs().argmax(1)
    at = torch.arange(len(x), device=x.device)
    once = torch.zeros_like(slope)
    once[at, token] = 1
    if not torch.equal(slope, once) or not bool((out[at, token] == logits).all()):
        raise InputError(_NO_LINEAR)
    return x[at, token]


def chunk_logits(model: nn.Module, samples: Samples, chunk: Chunk, handles: list[Any], grad: bool = False) -> Tensor:
    """Return a microbatch's logits, (n, C), and remove the hooks that watched it."""
    parameter = next(iter(model.parameters()))
    inputs = samples.inputs(chunk, parameter.device, parameter.dtype)
    try:
        where = f"a batch of {chunk.n} with example {int(chunk.rows[0])}"
        with evaluation(model), torch.set_grad_enabled(grad), explained(model, where):
            return logits_of(call_model(model, inputs))
    finally:
        for handle in handles:
            handle.remove()


def nearness(dtype: torch.dtype) -> float:
    """Return what the same outputs may differ by in another batch, relative to the terms they are sums of."""
    return {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 5e-2)
