"""The sign transform: each entry's sign, taken once as the matrix is read, in the dtype that `syrk` multiplies.

Products of signs are exact in any dtype and their float32 sums are exact integers up to 2^24: one plane is enough, also
for float32 gradients. Signs taken inside the product would be taken again for every tile of K, by the threads that feed
the tensor cores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ntk_kernels.planes import HALF, padded
from ntk_kernels.runtime import INTERPRETED, Compilation, Launch, expect, jit, require, tl

_SIGNS = Launch({"BLOCK": 2048}, 4, 1, "one pass over memory")


@jit
def _signs(
    x: tl.tensor,  # (N, p)
    floor: tl.tensor,  # (N,) float32
    out: tl.tensor,  # (N, p)
    p: tl.tensor,
    stride_x: tl.int64,
    stride_out: tl.int64,
    FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < p
    value = tl.load(x + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
    least = tl.load(floor + row) if FLOOR else 0.0
    found = tl.where(value > least, 1.0, tl.where(value < -least, -1.0, 0.0))
    found += value - value  # NaN where the entry is not finite
    tl.store(out + row * stride_out + column, found.to(out.dtype.element_ty), mask=inside)


def signs(x_Np: Tensor, floor_N: Tensor | None = None, dtype: torch.dtype = torch.float16) -> Tensor:
    """Return (N, p) entries −1, 0 or 1: the signs of x; NaN where x is not finite.

    Args:
        x_Np: (N, p) float32, float16 or bfloat16.
        floor_N: (N,) magnitudes at or below which an entry of that row is rounding, and 0; default 0.
        dtype: of the signs, float16 or bfloat16 (in the interpreter bfloat16 becomes float32).

    Raises:
        ValueError: other dtypes or shapes.
    """
    N, p = x_Np.shape
    expect(x_Np.dtype in (*HALF, torch.float32), f"x: expected float32, float16 or bfloat16, got {x_Np.dtype}")
    expect(dtype in HALF, f"dtype: expected float16 or bfloat16, got {dtype}")
    require(x_Np.device)
    x = x_Np if x_Np.stride(1) == 1 else x_Np.contiguous()
    if INTERPRETED and torch.bfloat16 in (x.dtype, dtype):
        x, dtype = x.float(), torch.float32
    floor = x if floor_N is None else floor_N.reshape(-1).float().contiguous()
    expect(floor_N is None or len(floor) == N, f"floor: expected {N} values, got {len(floor)}")
    out = padded(N, p, dtype, x.device)
    for start in range(0, N if p else 0, 32_768):  # what a grid's second axis may have
        rows = slice(start, min(start + 32_768, N))
        grid = (-(-p // _SIGNS.blocks["BLOCK"]), rows.stop - rows.start)
        _signs[grid](
            x[rows],
            floor[rows],
            out[rows],
            p,
            x.stride(0),
            out.stride(0),
            FLOOR=floor_N is not None,
            **_SIGNS.options(),
        )
    return out


def compilations(family: int) -> list[Compilation]:
    """Return what this file's launchers launch."""
    found = []
    for dtype, to in (("fp32", "fp16"), ("bf16", "bf16"), ("fp16", "fp16")):
        signature = {"x": f"*{dtype}", "floor": "*fp32", "out": f"*{to}", "p": "i32"}
        signature |= {"stride_x": "i64", "stride_out": "i64"}
        aligned = ("p", "stride_x", "stride_out")
        found.append(Compilation(f"signs {dtype}", _signs, family, signature, {"FLOOR": True}, _SIGNS, aligned=aligned))
    return found
