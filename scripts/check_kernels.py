#!/usr/bin/env python3
"""Compile every kernel in every launch configuration ahead of time, without a GPU, and read the machine code.

For sm_80, sm_90 and sm_100 it prints registers, spills, shared memory and the matrix instruction used, and exits 1 on a
register spill, on shared memory over the limit, or on a matrix kernel without tensor-core instructions: `HGMMA` (wgmma)
on sm_90, `UTCHMMA` (tcgen05) on sm_100, `HMMA` on sm_80.

    scripts/check_kernels.py [--arch 90] [--match syrk]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before the kernels are imported
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))

WIDE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


@dataclass(frozen=True)
class Row:
    """One compiled kernel.

    Attributes:
        name: kernel and variant.
        arch: compute capability, times 10.
        launch: its configuration, in words.
        registers: of a thread.
        spills: bytes of stack and instructions that touch local memory.
        shared: bytes of shared memory.
        matrix: the matrix instructions found, with their number.
        wrong: what must not be; empty when all is well.
    """

    name: str
    arch: int
    launch: str
    registers: int
    spills: int
    shared: int
    matrix: str
    wrong: str


def check(case) -> Row:  # noqa: ANN001
    """Compile one case and judge it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = case.constants | case.launch.blocks
    names = case.kernel.arg_names
    types = case.signature | dict.fromkeys(constants, "constexpr")
    pointers = {n for n, t in case.signature.items() if t.startswith("*")}
    even = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in pointers or n in case.aligned}
    source = ASTSource(case.kernel, {n: types[n] for n in names}, constants, even)
    options = {k: v for k, v in case.launch.options().items() if k not in case.launch.blocks}
    done = triton.compile(source, target=GPUTarget("cuda", case.family, 32), options=options)
    usage, code = disassembled(done.asm["cubin"])
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage).group(1)) for word in ("REG", "STACK"))
    count = Counter(re.findall(r"\b(HGMMA|UTCHMMA|HMMA|LDL|STL)\b", code))
    spills = stack + count["LDL"] + count["STL"]
    shared = done.metadata.shared
    matrix = " ".join(f"{k}×{count[k]}" for k in ("HGMMA", "UTCHMMA", "HMMA") if count[k])
    wide = count[WIDE[case.family]] if case.matrix == "wide" else bool(matrix) or not case.matrix
    faults = [
        (spills > 0, "spills"),
        (shared > SHARED_BYTES[case.family], "shared memory"),
        (not wide, f"no {WIDE[case.family] if case.matrix == 'wide' else 'matrix instruction'}"),
    ]
    blocks = "×".join(map(str, case.launch.blocks.values()))
    launch = f"{blocks} w{case.launch.warps} s{case.launch.stages}"
    wrong = ", ".join(text for hit, text in faults if hit)
    return Row(case.name, case.family, launch, registers, spills, shared, matrix, wrong)


def disassembled(cubin: bytes) -> tuple[str, str]:
    """Return what `cuobjdump` says of resource usage, and the machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    return usage, code


def cases(families: tuple[int, ...], match: str) -> list:
    """Return what the launchers launch, on these families, with this text in its name."""
    from ntk_kernels import fold, ghost, lookup, materialise, planes, signs, syrk

    rooms = (syrk, fold, ghost, lookup, materialise, planes, signs)
    return [c for family in families for room in rooms for c in room.compilations(family) if match in c.name]


def main() -> int:
    """Check, print a table, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, choices=sorted(WIDE), action="append")
    parser.add_argument("--match", default="")
    given = parser.parse_args()
    print(f"{'kernel':<26} {'sm':>4} {'launch':<20} {'regs':>4} {'spill':>5} {'KiB':>6}  matrix")
    bad = 0
    for case in cases(tuple(given.arch or sorted(WIDE)), given.match):
        row = check(case)
        bad += bool(row.wrong)
        tail = f"{row.matrix}{'   WRONG: ' + row.wrong if row.wrong else ''}"
        print(
            f"{row.name:<26} {row.arch:>4} {row.launch:<20} {row.registers:>4} {row.spills:>5} "
            f"{row.shared / 1024:>6.1f}  {tail}",
            flush=True,
        )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
