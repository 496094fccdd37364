"""Gradient factors of a parameter from its module's recorded inputs and output gradients: one path for each kind.

Shape suffixes: n samples of a microbatch, C outputs, T tokens, I and O layer inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.pytorch_utils import Conv1D

from ntkengine.inputs.attributes import Attributes
from ntkengine.inputs.resident import RESIDENT
from ntkengine.inputs.streaming import entry_of
from ntkengine.tangents.capture import Call, PathFailed, Pulled
from ntkengine.tangents.convolution import unfolds, weight_gradient
from ntkengine.tangents.factors import Dense, Lookup, Outer, Use

# Relative error of a sum over samples that rounding explains.
_SUM = {torch.float64: 1e-7, torch.float32: 1e-4}
_PRODUCT_BYTES = 16 << 20  # of a norm's products, one for each token and entry, before they are summed


def path_for(module: nn.Module, parameter: str) -> str:
    """Return the cheapest path that fits the module's own forward: a subclass that overrides it gets the general one.

    `"outer"`: a linear weight; `"outer-transposed"`: one stored (in, out); `"lookup"`: an embedding table; `"sum"`: a
    bias, output gradients summed over tokens; `"norm"`: a LayerNorm weight; `"convolution"`: of one or two dimensions,
    and `"channels"`, its bias; `"leaf"`: the module's own VJP, vmapped over samples.
    """
    forward = type(module).forward
    if forward is nn.Linear.forward:
        return "outer" if parameter == "weight" else "sum"
    if forward is Conv1D.forward:
        return "outer-transposed" if parameter == "weight" else "sum"
    if forward is nn.Embedding.forward:
        simple = getattr(module, "max_norm", None) is None and not getattr(module, "scale_grad_by_freq", False)
        return "lookup" if simple else "leaf"
    if forward is nn.LayerNorm.forward:
        return "norm" if parameter == "weight" else "sum"
    if unfolds(module):
        return "convolution" if parameter == "weight" else "channels"
    return "leaf"


def uses_of(path: str, module: nn.Module, name: str, parameter: str, pulled: Iterable[Pulled], n: int) -> list[Use]:
    """Return the factors of one parameter from its module's calls on n samples.

    With n = 1 every row a call saw belongs to that sample, whatever its shape; with more, the leading axis must be the
    samples'.

    Args:
        path: one of `path_for`.
        module: the module that owns the parameter.
        name: its name, for messages.
        parameter: the parameter's own name in the module, dotted when a list or dictionary of the module holds it.
        pulled: calls and output gradients.
        n: samples in the microbatch.

    Raises:
        PathFailed: a call has no leading sample axis, its input was overwritten, or its VJP cannot be vmapped.
    """
    built: list[Use] = []
    for call, d_C in pulled:
        call.check_unchanged(name)
        if path == "leaf":
            if d_C.shape[1] != n:
                msg = f"{name}: output of shape {tuple(call.out_shape)} has no leading axis of {n} samples"
                raise PathFailed(msg)
            built.append(Dense(_leaf(module, parameter, call, d_C.transpose(0, 1)).detach()))
            continue
        whole = n == 1 and (d_C.ndim == 2 or d_C.shape[1] != 1)
        d = d_C[None] if whole else d_C.transpose(0, 1)  # (n, C, tokens..., O)
        if d.shape[0] != n:
            msg = f"{name}: output of shape {tuple(call.out_shape)} has no leading axis of {n} samples"
            raise PathFailed(msg)
        x = _input(call)
        x = x[None] if whole else x.expand(n, *x.shape[1:]) if x.shape[0] == 1 else x
        if x.shape[0] != n:
            msg = f"{name}: input of shape {tuple(x.shape)} has no leading axis of {n} samples"
            raise PathFailed(msg)
        built.append(_BUILDERS[path](module, x, d).compact())
    return built


def _input(call: Call) -> Tensor:
    tensors = [*call.args, *call.kwargs.values()]
    if len(tensors) != 1 or not isinstance(tensors[0], Tensor) or tensors[0].ndim == 0:
        msg = "expected one tensor argument"
        raise PathFailed(msg)
    return tensors[0].detach()


def _tokens(d: Tensor) -> Tensor:
    """Return d as (n, C, T, O): every axis between outputs and features is a token axis."""
    return d.unsqueeze(2) if d.ndim == 3 else d.flatten(2, -2)


def _outer(_module: nn.Module, x: Tensor, d: Tensor) -> Use:
    return Outer(x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2), _tokens(d))


def _lookup(module: nn.Module, x: Tensor, d: Tensor) -> Use:
    ids = x.unsqueeze(1) if x.ndim == 1 else x.flatten(1)
    d = _tokens(d)
    padding = getattr(module, "padding_idx", None)
    if padding is not None:  # autograd gives this row no gradient
        d = d * (ids != padding)[:, None, :, None]
    return Lookup(ids, d)


def _sum(_module: nn.Module, _x: Tensor, d: Tensor) -> Use:
    return Dense(_tokens(d).sum(2)[..., None])


def _norm(module: nn.Module, x: Tensor, d: Tensor) -> Use:
    shape = tuple(module.normalized_shape)  # type: ignore[arg-type]
    xhat = nn.functional.layer_norm(x, shape, eps=float(module.eps))  # type: ignore[arg-type]
    tokens = tuple(range(2, d.ndim - len(shape)))
    found = []
    for part in d.split(max(1, _PRODUCT_BYTES // max(1, xhat.nbytes)), dim=1):
        g = part * xhat.unsqueeze(1)
        found.append(g.sum(tokens) if tokens else g)
    g = torch.cat(found, dim=1)
    return Dense(g.reshape(*g.shape[:2], shape[0], -1))


def _convolution(module: nn.Module, x: Tensor, d: Tensor) -> Use:
    return Dense(weight_gradient(module, x, d))


def _channels(_module: nn.Module, _x: Tensor, d: Tensor) -> Use:
    return Dense(d.flatten(3).sum(3)[..., None])


_BUILDERS = {
    "outer": _outer,
    "outer-transposed": _outer,
    "lookup": _lookup,
    "sum": _sum,
    "norm": _norm,
    "convolution": _convolution,
    "channels": _channels,
}


def _leaf(module: nn.Module, parameter: str, call: Call, d: Tensor) -> Tensor:
    """Return (n, C, R, I): one VJP for each sample, vmapped."""
    n = len(d)
    weight: Tensor = module.get_parameter(parameter)
    if (entry := entry_of(weight)) is not None:
        weight = RESIDENT.bring(entry, weight.dtype, weight.device)
    leaves, spec = tree_flatten((call.args, call.kwargs))
    values = [x.detach() if isinstance(x, Tensor) else x for x in leaves]
    mapped = [isinstance(x, Tensor) and x.ndim > 0 and x.shape[0] == n for x in values]
    # An argument may have n rows by chance (a table of positions): then the samples do not sum to the whole.
    choices = [mapped, *([m and i != j for i, m in enumerate(mapped)] for j, m in enumerate(mapped) if m)]
    failed: list[PathFailed] = []
    for choice in choices:
        try:
            return _mapped(module, parameter, weight, values, spec, choice, d)
        except PathFailed as error:
            failed.append(error)
    raise failed[0]


@torch.no_grad()
def _mapped(
    module: nn.Module, parameter: str, weight: Tensor, values: list[Any], spec: Any, mapped: list[bool], d: Tensor
) -> Tensor:
    n, C = d.shape[:2]
    rows = [x for x, m in zip(values, mapped, strict=True) if m]
    if not rows:
        msg = f"no argument has a leading axis of {n} samples"
        raise PathFailed(msg)

    def per_sample(d_C: Tensor, *row: Tensor) -> Tensor:
        given = iter(row)
        args, kwargs = tree_unflatten(
            [next(given)[None] if m else x for x, m in zip(values, mapped, strict=True)], spec
        )
        pull = torch.func.vjp(
            lambda p: torch.func.functional_call(module, {parameter: p}, args, kwargs), weight.detach()
        )[1]
        return torch.func.vmap(lambda one: pull(one[None])[0])(d_C)

    before = Attributes(module)
    try:
        g = torch.func.vmap(per_sample)(d, *rows)
        whole = torch.func.vjp(
            lambda p: torch.func.functional_call(module, {parameter: p}, *tree_unflatten(values, spec)), weight.detach()
        )[1](d[:, 0])[0]
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        msg = f"its VJP cannot be vmapped ({(str(error).splitlines() or [''])[0]})"
        raise PathFailed(msg) from error
    finally:
        before.restore()  # of what it kept of this call, a wrapped tensor that lives no longer
    off = float((g[:, 0].sum(0) - whole).norm())
    if not off <= _SUM.get(d.dtype, 5e-2) * float(torch.linalg.vector_norm(g[:, 0].flatten(1), dim=1).sum()):
        msg = f"the VJPs of its samples do not sum to that of the batch of {n}"
        raise PathFailed(msg)
    return g.reshape(n, C, *matrix_shape(weight))


def matrix_shape(parameter: Tensor) -> tuple[int, int]:
    """Return (R, I): the parameter as a matrix, its first axis the rows."""
    return (
        (parameter.shape[0], parameter.numel() // parameter.shape[0])
        if parameter.ndim and parameter.numel()
        else (1, parameter.numel())
    )
