"""Launch kernels as on a GPU of a family, up to the launch itself: arguments are bound and specialised, code compiled.

Run as a script in a process of its own: `python -m tests.kernels.dry_run 90` prints a line for each compilation, and
exits 1 if one spills registers or takes more shared memory than the family has.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"  # before the kernels are imported

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from ntk_kernels import fold, ghost, lookup, materialise, planes, runtime, signs, syrk
from ntk_kernels.factors import pack
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "scripts"))
from check_kernels import SHARED_BYTES, disassembled

DTYPES = (torch.bfloat16, torch.float32)


def main() -> int:
    """Launch, judge, return the exit code."""
    family = int(sys.argv[1])
    limit = runtime.Limits(family, 132, SHARED_BYTES[family], 50 << 20)
    properties = {"max_shared_mem": limit.shared_bytes}
    pretended = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", family, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda _device=None: 0,
        utils=SimpleNamespace(get_device_properties=lambda _device: properties),
    )
    driver.set_active(pretended)
    done = {}
    run = JITFunction.run

    def dry(self, *args, grid, warmup, **options):
        assert all(0 < n < 65_536 or i == 0 for i, n in enumerate(grid)), (self.__name__, grid)
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        done[kernel.hash] = self.__name__, kernel

    JITFunction.run = dry
    for room in (fold, ghost, lookup, materialise, planes, signs, syrk):
        if hasattr(room, "require"):
            room.require = lambda _device: limit
    for dtype in DTYPES:
        launches(dtype)
    bad = 0
    for name, kernel in done.values():
        usage, code = disassembled(kernel.asm["cubin"])
        spills = int(re.search(r"STACK:(\d+)", usage).group(1)) + len(re.findall(r"\b(?:LDL|STL)\b", code))
        shared = kernel.metadata.shared
        wrong = spills or shared > SHARED_BYTES[family]
        bad += bool(wrong)
        print(f"{name:<14} {shared / 1024:6.1f} KiB  {spills} spills{'   WRONG' if wrong else ''}")
    return 1 if bad else 0


def launches(dtype):
    """Launch every kernel on aligned factors and odd numbers of samples."""
    for N in (1, 200, 600):
        x = torch.randn(N, 512).to(dtype)
        K = torch.zeros(N, N, dtype=torch.float64)
        syrk.syrk(x, K)
        syrk.syrk(x, K, sign="columns")
    N, C, T, R, I = 5, 2, 9, 128, 256  # noqa: E741
    packed = pack([(torch.randn(N, T, I).to(dtype), torch.randn(N, C, T, R).to(dtype))])
    K = torch.zeros(N, N, dtype=torch.float64)
    ghost.ghost(packed, K)
    ghost.ghost(packed, torch.zeros(N * C, N * C, dtype=torch.float64), full=True, lower=True)
    for sign in (False, True):
        materialise.materialise(packed, (16, 80), (0, I), materialise.buffer(packed, 64 * I, sign=sign), sign=sign)
    ids = torch.randint(0, 9, (N, T))
    rows, sample, token = lookup.sum_rows(ids, torch.randn(N, 1, T, I).to(dtype))
    lookup.lookup(rows[:, 0], sample, token, K)


if __name__ == "__main__":
    sys.exit(main())
