"""Where kernels run and how they are launched: Triton or its interpreter, what a device offers, checked arguments.

`TRITON_INTERPRET=1` in the environment before this package is imported makes every kernel run in Triton's interpreter,
on any device, slowly: numerics can be tested without a GPU. Without Triton the package imports; only a launch fails.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)
FAMILIES = (80, 90, 100)  # compute capabilities that launch tables are written for
COUNTS = ("M", "N", "S", "C", "T", "first", "splits", "row0", "column0", "output")
OPTIONS = {"enable_fp_fusion": True}  # for every launch; Triton warns where it is left open


class UnavailableError(RuntimeError):
    """Kernels cannot run; says why and what would help."""


@dataclass(frozen=True)
class Limits:
    """What a device offers.

    Attributes:
        family: the launch tables that apply, one of `FAMILIES`.
        processors: multiprocessors.
        shared_bytes: shared memory that one program may have.
        l2_bytes: second-level cache.
    """

    family: int
    processors: int
    shared_bytes: int
    l2_bytes: int

    @property
    def descriptors(self) -> bool:
        """Whether the device copies whole tiles by descriptor (TMA)."""
        return self.family >= 90


@dataclass(frozen=True)
class Launch:
    """One configuration of a kernel.

    Attributes:
        blocks: tile sizes, by the names of the kernel's constants.
        warps: of a program.
        stages: of its software pipeline.
        why: the reason.
    """

    blocks: dict[str, int]
    warps: int
    stages: int
    why: str = ""

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of a launch."""
        return {**self.blocks, **OPTIONS, "num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Compilation:
    """What `scripts/check_kernels.py` compiles ahead of time: one kernel in one of its configurations.

    Attributes:
        name: kernel and variant.
        kernel: the jitted function.
        family: of the target.
        signature: types of its arguments by name, Triton's spelling.
        constants: its constants by name, tile sizes left out.
        launch: the configuration.
        matrix: "wide" where it must use the widest matrix instruction of the family, "any" for any, "" for none.
        aligned: integer arguments that are multiples of 16; pointers always are.
    """

    name: str
    kernel: Any
    family: int
    signature: dict[str, str]
    constants: dict[str, Any]
    launch: Launch
    matrix: str = ""
    aligned: tuple[str, ...] = field(default=())


def jit(function: Callable[..., Any]) -> Any:
    """Return the function as a Triton kernel; without Triton, unchanged.

    Only integers that decide how wide loads may be get a compilation of their own when they are 1 or a multiple of 16:
    strides, and widths along contiguous entries. `COUNTS` do not.
    """
    if triton is None:
        return function
    counts = [name for name in inspect.signature(function).parameters if name in COUNTS]
    return triton.jit(do_not_specialize=counts)(function)


def why_not(device: torch.device) -> str | None:
    """Return why kernels cannot run on a device, and what would help; None where they can."""
    if triton is None:
        return "Triton is not installed; pip install triton"
    if INTERPRETED:
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"kernels need a CUDA device, got {device.type}; TRITON_INTERPRET=1 runs them on any, slowly, for tests"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"kernels need compute capability 8.0 or newer, got {capability[0]}.{capability[1]}"
    return None


def require(device: torch.device) -> Limits:
    """Return the device's limits.

    Raises:
        UnavailableError: kernels cannot run there.
    """
    reason = why_not(device)
    if reason is None and device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        reason = f"{device} is not the current device; use torch.cuda.device({device.index})"
    if reason is not None:
        raise UnavailableError(reason)
    return limits(device)


@lru_cache(maxsize=16)
def limits(device: torch.device) -> Limits:
    """Return what a CUDA device offers; in the interpreter, what an H100 does."""
    if device.type != "cuda":
        return Limits(90, 132, 227 << 10, 50 << 20)
    found = torch.cuda.get_device_properties(device)
    capability = 10 * found.major + found.minor
    family = max(f for f in FAMILIES if f <= max(80, capability))
    shared = getattr(found, "shared_memory_per_block_optin", 99 << 10)
    return Limits(family, found.multi_processor_count, shared, found.L2_cache_size)


def fitted(launch: Launch, stage_bytes: int, limit: Limits) -> Launch:
    """Return the launch with as many of its stages as fit in the device's shared memory.

    Args:
        launch: from a table written for the family's largest member.
        stage_bytes: shared memory of one stage.
        limit: the device's.
    """
    stages = min(launch.stages, max(1, (limit.shared_bytes - 1024) // stage_bytes))
    return launch if stages == launch.stages else Launch(launch.blocks, launch.warps, stages, launch.why)


@lru_cache(maxsize=64)
def tile_order(
    rows: int, columns: int, tile_rows: int, tile_columns: int, lower: bool, device: torch.device
) -> tuple[Tensor, int]:
    """Return (tiles, 2) int32 row and column numbers of the tiles to compute, and how many there are.

    Bands of about 2,048 rows, column by column within a band: programs that run together read few rows and columns.

    Args:
        rows: of the matrix.
        columns: of the matrix.
        tile_rows: of a tile.
        tile_columns: of a tile.
        lower: leave out tiles wholly above the diagonal.
        device: where the table lies.
    """
    high, wide = -(-rows // tile_rows), -(-columns // tile_columns)
    band = max(1, 2048 // tile_rows)
    order = [
        (i, j)
        for first in range(0, high, band)
        for j in range(wide)
        for i in range(first, min(first + band, high))
        if not lower or (i + 1) * tile_rows > j * tile_columns
    ]
    return torch.tensor(order, dtype=torch.int32, device=device), len(order)


def expect(condition: bool, message: str) -> None:
    """Refuse arguments.

    Raises:
        ValueError: the condition does not hold.
    """
    if not condition:
        raise ValueError(message)


def expect_gram(K: Tensor, rows: int, columns: int) -> None:
    """Refuse an accumulator that is not (rows, columns) float64.

    Raises:
        ValueError: it is not.
    """
    expect(
        tuple(K.shape) == (rows, columns) and K.dtype == torch.float64,
        f"K: expected ({rows}, {columns}) float64, got {tuple(K.shape)} {K.dtype}",
    )
