"""Matrix products on the CPU at the rate of its widest instructions.

On processors that are not Intel's, MKL, behind `torch.mm`, takes its AVX2 kernels: half the rate of AVX-512 (measured
on a Zen 5: 230 of 505 GFLOP/s, two cores). oneDNN, which torch carries as well, looks at the instruction set alone.
The choice depends on the processor only, never on a timing, so that the same machine gives the same digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

_SMALLEST = 1 << 21  # flops below which the longer way to oneDNN costs more than it saves
_ROWS = 512  # rows from which it is worth a look whether most are zero
_FEW, _MULTIPLE = 256, 64  # rows that a product's are filled up to a multiple of, if there are more than a few
_SHORT = 256  # tokens up to which the backward pass of bfloat16 attention is faster in float32 (4.5 times at 32)
_mm, _addmm = torch.ops.aten.mm.default, torch.ops.aten.addmm.default
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@cache
def prefers_onednn() -> bool:
    """Whether this CPU has AVX-512 that MKL leaves unused."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    try:
        vendor = next(x for x in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if "vendor_id" in x)
    except (OSError, StopIteration):
        return False
    return "GenuineIntel" not in vendor and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def inner_products(x: Tensor, y: Tensor) -> Tensor:
    """Return x yᵀ, (m, n), of x (m, k) and y (n, k) of one dtype, summed in that dtype.

    Cost: 2·m·n·k flops; a copy of an operand whose rows are not contiguous.
    """
    if to_onednn(x, y):
        return _onednn(x, y, None)
    return _first(_filled(x) @ y.T, len(x)) if _is_half(x) else x @ y.T


@contextmanager
def full_rate() -> Iterator[None]:
    """Within the block, large float32 products of matrices on the CPU, also in backward passes, go to oneDNN.

    Rows of zeros are left out of them. The backward pass of short bfloat16 attention is computed in float32, which is
    faster there.
    """
    if not prefers_onednn() or _Routed.active is not None:
        yield
        return
    _Routed.active = _Routed()
    try:
        with _Routed.active:
            yield
    finally:
        _Routed.active = None


@contextmanager
def unrouted() -> Iterator[None]:
    """Within the block `full_rate` rests: for code that calls `inner_products` itself.

    Looking at each of many small operations takes longer than some of them.
    """
    mode = _Routed.active
    if mode is None or _get_current_dispatch_mode() is not mode:
        yield
        return
    mode.__exit__(None, None, None)
    try:
        yield
    finally:
        mode.__enter__()


class _Routed(TorchDispatchMode):
    active: _Routed | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the wrapper it would add costs more than all else here

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not types:
            if func is _mm and args[0].device.type == "cpu" and args[0].shape[0] >= _ROWS:
                return _of_rows(*args)
            if func is _mm and to_onednn(args[0], args[1].T):
                return _onednn(args[0], args[1].T, None)
            if func is _mm and _is_half(args[0]):
                return inner_products(args[0], args[1].T)
            if func is _addmm and len(args) == 3 and not kwargs and args[0].ndim == 1:
                if to_onednn(args[1], args[2].T):
                    return _onednn(args[1], args[2].T, args[0])
                if _is_half(args[1]):
                    return _first(func(args[0], _filled(args[1]), args[2]), len(args[1]))
            if func is _attention_backward and args[0].dtype == torch.bfloat16 and args[0].shape[-2] <= _SHORT:
                wide = [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
                return tuple(g.to(torch.bfloat16) for g in func(*wide, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def to_onednn(x: Tensor, y: Tensor) -> bool:
    """Whether x yᵀ, of x (m, k) and y (n, k), is worth sending to oneDNN."""
    return (
        x.dtype == y.dtype == torch.float32
        and x.device.type == "cpu"
        and x.ndim == y.ndim == 2
        and min(x.shape[0], y.shape[0]) >= 8
        and 2 * x.shape[0] * x.shape[1] * y.shape[0] >= _SMALLEST
        and prefers_onednn()
    )


def _of_rows(x: Tensor, w: Tensor) -> Tensor:
    """Return x w, leaving out rows of zeros: most output gradients of a last block that is read at one token.

    One column tells in passing that there are few; then all are looked at.
    """
    if 2 * int(x[:, 0].count_nonzero()) < len(x):
        filled = x.any(1)
        kept = filled.nonzero()[:, 0]
        if 2 * len(kept) < len(x):
            one = filled.logical_not().nonzero()[:1, 0]  # of the rest: what is not finite in w makes it NaN
            found = inner_products(x[torch.cat([one, kept])], w.T)
            return found[:1].repeat(len(x), 1).index_copy_(0, kept, found[1:])
    return inner_products(x, w.T)


def _onednn(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """Return x wᵀ + bias, from copies of rows with gaps: those fall to a reference loop, a thousand times slower."""
    if not w.is_contiguous() and not w.T.is_contiguous():
        w = w.contiguous()
    return _first(torch.ops.mkldnn._linear_pointwise(_filled(x).contiguous(), w, bias, "none", [], ""), len(x))


def _filled(x: Tensor) -> Tensor:
    """Return x, for oneDNN with rows of zeros below it, up to a multiple of `_MULTIPLE`.

    It makes a kernel for every number of rows it meets, 1 ms and 0.7 MiB each, and keeps a thousand; and odd numbers of
    rows take a tenth longer than this copy and the sums.
    """
    rows = len(x)
    if rows < _FEW or rows % _MULTIPLE == 0:
        return x
    filled = x.new_zeros(-(-rows // _MULTIPLE) * _MULTIPLE, x.shape[1])
    filled[:rows] = x
    return filled


def _first(x: Tensor, rows: int) -> Tensor:
    return x if len(x) == rows else x[:rows]


def _is_half(x: Tensor) -> bool:
    """Whether oneDNN multiplies it without being asked to."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu"
