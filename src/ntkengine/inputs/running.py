"""Running a model as the kernel needs it, and leaving it as it was found."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from ntkengine.errors import CheckFailed, InputError, NonFinite
from ntkengine.inputs.attributes import Attributes
from ntkengine.inputs.differentiable import check_differentiable
from ntkengine.inputs.resident import RESIDENT
from ntkengine.inputs.traces import Traces
from ntkengine.products import full_rate

log = logging.getLogger(__name__)

_SMALL = 1 << 20  # entries of a buffer that a forward pass might write to
# What models note in their attributes when their first call writes to their weights.
FIRST_CALLS: weakref.WeakKeyDictionary[nn.Module, list[tuple[nn.Module, str, Any]]] = weakref.WeakKeyDictionary()
_UNUSABLE = (TypeError, ValueError, LookupError, AttributeError, AssertionError, RuntimeError)
_INFERENCE = "support_avx512bf16_for_cpu"  # bitsandbytes' switch of a kernel without derivative


def arguments(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Return what a model is called with on a batch: labels are kept back (the readout, not the model, reads them)."""
    given = {k: v for k, v in inputs.items() if k != "labels"}
    if len(given) == 1 and _unnamed(model, next(iter(given))):
        return tuple(given.values()), {}
    return (), given


def _unnamed(model: nn.Module, name: str) -> bool:
    """Return whether a module, not of transformers, has no such input: the name is ours, for its only one."""
    if hasattr(model, "main_input_name"):
        return False
    taken = inspect.signature(model.forward).parameters
    if name in taken:
        return taken[name].kind is inspect.Parameter.POSITIONAL_ONLY
    return not hasattr(model, "config") or not any(p.kind is p.VAR_KEYWORD for p in taken.values())


def call_model(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """Return the model's output on a batch."""
    args, kwargs = arguments(model, inputs)
    return model(*args, **kwargs)


@contextmanager
def explained(
    model: nn.Module, what: str, *, hint: str = "", kinds: tuple[type[Exception], ...] = _UNUSABLE
) -> Iterator[None]:
    """Within the block, make of what a model's code raises on inputs one line.

    Args:
        model: that is run.
        what: on what, for the line.
        hint: at its end.
        kinds: of exceptions; default those that inputs it cannot take lead to.

    Raises:
        InputError: in place of it.
    """
    try:
        yield
    except (InputError, CheckFailed, NotImplementedError, torch.OutOfMemoryError):
        raise
    except kinds as error:
        reason = " ".join(str(error).split())[:200]
        more = " (set model.config.pad_token_id)" if "padding token" in reason else hint
        raise InputError(f"model: {type(model).__name__} cannot be run on {what}: {reason}{more}") from error


@contextmanager
def taken_apart(model: nn.Module) -> Iterator[None]:
    """Within the block, make one line of what a model raises when it is run in parts and backwards.

    Raises:
        InputError: in place of it.
    """
    try:
        yield
    except (InputError, CheckFailed, NonFinite, torch.OutOfMemoryError):
        raise
    except (*_UNUSABLE, NotImplementedError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise InputError(f"model: {type(model).__name__} cannot be run in parts and backwards: {reason}") from error


def coarsest(model: nn.Module, f: Tensor) -> torch.dtype:
    """Return the dtype that a model's outputs f are rounded in, where they pass through any of its weights' dtypes."""
    dtypes = {p.dtype if p.is_floating_point() else torch.bfloat16 for p in model.parameters()}
    return max(dtypes | {f.dtype}, key=lambda dtype: torch.finfo(dtype).eps)


@contextmanager
def _no_checkpointing() -> Iterator[None]:
    """Within the block a segment under torch's reentrant checkpointing runs as if it were not.

    Its gradient is only there for `backward()`, and only where an input wants one.
    """
    held = vars(CheckpointFunction).get("apply")

    def run(function: Callable[..., Any], _preserve: bool, *args: Any) -> Any:
        return function(*args)

    CheckpointFunction.apply = staticmethod(run)  # type: ignore[method-assign]
    try:
        yield
    finally:
        if held is None:
            del CheckpointFunction.apply
        else:
            CheckpointFunction.apply = held  # type: ignore[method-assign]


@contextmanager
def _no_input_leaves(model: nn.Module) -> Iterator[None]:
    """Within the block no hook of transformers' `enable_input_require_grads`."""
    found: list[tuple[Any, int, Any]] = [
        (m._forward_hooks, key, hook)
        for m in model.modules()
        for key, hook in m._forward_hooks.items()
        if getattr(hook, "__name__", "") == "make_inputs_require_grads"
    ]
    try:
        for hooks, key, _ in found:
            del hooks[key]
        yield
    finally:
        for hooks, key, hook in found:
            hooks[key] = hook
            hooks.move_to_end(key, last=False)


@contextmanager
def evaluation(model: nn.Module, trained: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Run a model as the kernel needs it, and leave it, the random numbers and torch's settings as they were.

    Eval mode, weights frozen, no KV cache, no TF32, no autocast, nor what accelerate wraps around a forward for it;
    mixture-of-experts layers by their plain loop, the only one that takes every dtype and rounds in it; 4-bit layers of
    bitsandbytes without their CPU kernel for inference, which has no derivative; embeddings without transformers' hook
    that makes their output a leaf for checkpointing, which has none in forward mode.

    Args:
        model: any module.
        trained: parameters that are written to within the block, and stay so.

    Raises:
        InputError: a layer whose kernel has no derivative.
    """
    check_differentiable(model)
    plain = _torch_settings(model), _no_checkpointing(), _no_input_leaves(model), torch.enable_grad()
    with _as_found(model, trained), ExitStack() as stack:
        for setting in plain:
            stack.enter_context(setting)
        for module in model.modules():  # not model.eval(), which some make merge their adapters into the weights
            module.training = False
            if {"forward", "_original_forward"} <= vars(module).keys():  # an autocast of its own, within any other
                module.forward = module._original_forward  # type: ignore[assignment]
        for p in model.parameters():
            p.requires_grad_(False)
        for owner, key, value in _unwanted(model):
            setattr(owner, key, value)
        # Looking at every call would slow down a model on a GPU, where it changes none.
        with full_rate() if any(p.device.type == "cpu" for p in model.parameters()) else nullcontext():
            yield


def _unwanted(model: nn.Module) -> list[tuple[Any, str, Any]]:
    """Return (owner, attribute, value) of what is set otherwise than a kernel needs it."""
    plain = {"use_cache": False, "_experts_implementation_internal": "eager"}
    wanted = [(c, k, v) for c in _configurations(model) for k, v in plain.items() if getattr(c, k, None)]
    wanted += [(m, _INFERENCE, False) for m in model.modules() if getattr(m, _INFERENCE, False)]
    return wanted + [(m, "sparse", False) for m in model.modules() if getattr(m, "sparse", False) is True]


def _configurations(model: nn.Module) -> list[Any]:
    found = {id(c): c for c in (getattr(m, "config", None) for m in model.modules()) if c is not None}
    found |= {id(c): c for owner in list(found.values()) if (c := getattr(owner, "text_config", None)) is not None}
    return list(found.values())


@contextmanager
def _as_found(model: nn.Module, trained: Iterable[nn.Parameter]) -> Iterator[None]:
    """After the block make the model what it was; say which large tensors its forward pass wrote to."""
    grads = [(p, p.requires_grad) for p in model.parameters()]
    settings = [(owner, key, getattr(owner, key)) for owner, key, _ in _unwanted(model)]
    before = Attributes(model)
    buffers = [(b, b._version, b.detach().clone()) for b in model.buffers() if b.numel() <= _SMALL]
    unsaved = {**dict(model.named_parameters()), **{n: b for n, b in model.named_buffers() if b.numel() > _SMALL}}
    known = {id(p) for p in trained}
    traces = Traces({name: t for name, t in unsaved.items() if id(t) not in known})
    try:
        yield
    finally:
        for p, wanted in grads:
            p.requires_grad_(wanted)
        for owner, key, was in settings:
            setattr(owner, key, was)
        written = traces.changed()
        first = FIRST_CALLS.pop(model, [])
        noted = before.changed() if written else first  # what goes with weights as they are now
        before.restore()
        for module, key, value in noted:
            vars(module)[key] = value
        RESIDENT.clear()
        for buffer, version, value in buffers:
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(value)
        if written:
            log.warning("model: its forward pass wrote to %s, which is left as it is now", ", ".join(written[:3]))


@contextmanager
def _torch_settings(model: nn.Module) -> Iterator[None]:
    """Within the block no TF32, no autocast, no nested tensors (which have no rows to record); after it all as it was.

    Random numbers that a model draws are taken back too.
    """
    devices = {p.device for p in model.parameters()}
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(sorted(d.index for d in devices if d.type == "cuda")))
        for kind in sorted({d.type for d in devices}):
            stack.enter_context(torch.autocast(kind, enabled=False))
        torch.backends.mha.set_fastpath_enabled(False)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
            torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def wanting_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within the block these parameters require gradients; after it those that did before."""
    before = [(p, p.requires_grad) for p in parameters]
    try:
        for p, _ in before:
            p.requires_grad_(True)
        yield
    finally:
        for p, wanted in before:
            p.requires_grad_(wanted)
