"""Tensors of a device that is simulated, and the mode in which torch makes them."""

from __future__ import annotations

import contextlib
import types

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
DEVICE = torch.device("cuda:0")
_CROSS = {aten._to_copy.default, aten.copy_.default, aten._pin_memory.default}
_INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
_WIDER = {aten.mm.dtype: aten.mm.default, aten.bmm.dtype: aten.bmm.default}  # exist on CUDA devices alone


class Simulated(torch.Tensor):
    """A tensor that says it is on the device; `inner` has its numbers."""

    is_sparse = property(lambda self: self.inner.is_sparse)
    layout = property(lambda self: self.inner.layout)

    @staticmethod
    def __new__(cls, inner):
        place = {}
        if inner.layout == torch.strided:
            place = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=DEVICE, **place)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, _types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            new = Simulated(self.inner.clone()).requires_grad_(self.requires_grad)
            if getattr(self, "_is_param", False):
                new._is_param = True
            memo[id(self)] = new
        return memo[id(self)]

    def __repr__(self):
        return f"Simulated({self.inner!r})"

    def __array__(self, *_args, **_more):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

    def numpy(self, *_args, **_more):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

    def record_stream(self, _stream):
        pass

    def data_ptr(self):
        return self.inner.data_ptr()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def tolist(self):
        return self.inner.tolist()

    def coalesce(self):
        return Simulated(self.inner.coalesce())

    def values(self):
        return Simulated(self.inner.values())

    def indices(self):
        return Simulated(self.inner.indices())


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    """Run an operation on the numbers of its arguments, if a device would.

    Raises:
        RuntimeError: tensors of both sides.
    """
    if func in _WIDER:
        func, args = _WIDER[func], tuple(x.to(args[2]) for x in args[:2])
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    ours = [x for x in tensors if isinstance(x, Simulated)]
    if ours and func not in _CROSS:
        _refuse_both(func, tensors)
    wanted = kwargs.get("device")
    if wanted is not None:
        on = torch.device(wanted).type == "cuda"
        kwargs = {**kwargs, "device": torch.device("cpu") if on else wanted}
    elif func is aten.copy_.default:
        on = isinstance(args[0], Simulated)
    else:
        on = bool(ours) and func not in (aten._pin_memory.default, aten._local_scalar_dense.default)
    known = {id(x.inner): x for x in ours}
    args, kwargs = (tree_map(lambda x: x.inner if isinstance(x, Simulated) else x, given) for given in (args, kwargs))
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    if func is aten._pin_memory.default:
        return args[0].clone()
    found = func(*args, **kwargs)
    return tree_map(lambda x: _placed(x, known), found) if on else found


def _refuse_both(func, tensors):
    host = [x for x in tensors if not isinstance(x, Simulated)]
    if func in _INDEX:
        if not isinstance(tensors[0], Simulated):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    elif any(x.dim() for x in host):
        shapes = [tuple(x.shape) for x in tensors]
        raise RuntimeError(f"expected all tensors on one device, got cuda:0 and cpu: {func} of {shapes}")


def _placed(x, known):
    if not isinstance(x, torch.Tensor) or isinstance(x, Simulated):
        return x
    if x._is_zerotensor():  # of forward mode; an inner tensor is past where torch knows of it
        x = torch.zeros(x.shape, dtype=x.dtype)
    return known[id(x)] if id(x) in known else Simulated(x)


class _Stream:
    """A stream on which everything has happened already."""

    def __init__(self, *_device):
        pass

    def record_event(self):
        return self

    def wait_event(self, event):
        assert isinstance(event, _Stream)


@contextlib.contextmanager
def simulated():
    """Within the block `torch.cuda` has one device, of a capability that kernels are not written for."""
    facts = {"total_memory": 16 << 30, "multi_processor_count": 1, "major": 7, "minor": 5, "name": "simulated"}
    said = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": lambda *_: None,
        "device": lambda *_: contextlib.nullcontext(),
        "stream": lambda *_: contextlib.nullcontext(),
        "Stream": _Stream,
        "current_stream": lambda *_: _Stream(),
        "get_device_name": lambda *_: "simulated",
        "get_device_capability": lambda *_: (7, 5),
        "get_device_properties": lambda *_: types.SimpleNamespace(**facts),
        "mem_get_info": lambda *_: (8 << 30, 16 << 30),
        "memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "empty_cache": lambda: None,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda *_: None,
    }
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=) makes a host tensor, then moves it
    torch.__future__.set_swap_module_params_on_conversion(True)  # module.to(): parameters stay what they are
    before = {name: getattr(torch.cuda, name) for name in said}
    for name, answer in said.items():
        setattr(torch.cuda, name, answer)
    try:
        with Mode():
            yield
    finally:
        for name, answer in before.items():
            setattr(torch.cuda, name, answer)
