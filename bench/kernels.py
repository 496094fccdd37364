"""Kernels on one GPU: error against float64, time against the best torch formulation, share of the roofline.

Ceilings are measured in the same run: a bfloat16 product of 8,192³ and a copy. Inputs are normal numbers, larger than
the cache. Without a GPU, with TRITON_INTERPRET=1, the same code runs on tiny inputs and records nothing.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from ntk_kernels import syrk as syrk_module
from ntk_kernels.factors import pack
from ntk_kernels.ghost import ghost
from ntk_kernels.lookup import lookup, sum_rows
from ntk_kernels.materialise import buffer, materialise
from ntk_kernels.planes import split
from ntk_kernels.runtime import Launch
from ntk_kernels.syrk import syrk
from torch import Tensor

from bench.record import record
from bench.timing import percentiles, timed
from ntkengine.gram.kernels import tile_shape

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SYRK_SIZES = [(8192, 16_384), (4096, 65_536), (2048, 65_536), (1024, 131_072), (512, 262_144), (64, 1_048_576)]
FLOAT32_SIZES = [(8192, 8192), (2048, 32_768), (1024, 65_536)]
ERROR_SIZES = [1, 2, 63, 64, 129, 513, 1000, 2048, 8192]
HALF_BOUND = 1e-4  # exact products summed within runs in tensor cores, which cut off
TILE_MIB = (16, 32, 64, 128, 256, 512)
if not GPU:
    SYRK_SIZES, FLOAT32_SIZES, ERROR_SIZES, TILE_MIB = [(40, 100)], [(40, 100)], [1, 63], (1,)


def main() -> int:
    """Run everything; exit 1 where an error is above its bound."""
    torch.manual_seed(time.time_ns() % 2**31)  # fresh inputs every time
    torch.backends.cuda.matmul.allow_tf32 = False
    ceiling = ceilings()
    bad = 0
    wrong: set[str] = set()
    for section, kernels in SECTIONS:
        name = section.__name__
        if wrong & kernels:  # what is wrong is not timed
            print(f"# {name}: left out, {', '.join(sorted(wrong & kernels))} is wrong", file=sys.stderr, flush=True)
            continue
        start = time.perf_counter()
        try:
            found = section(ceiling)
        except Exception:  # noqa: BLE001 - the other sections are worth running
            traceback.print_exc()
            note("failed", {"section": name}, {"error": traceback.format_exc(limit=-1)[-300:]})
            found = 1
        bad += bool(found)
        wrong |= found if isinstance(found, set) else set()
        print(f"# {name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    return 1 if bad else 0


def note(case: str, config: dict[str, Any], values: dict[str, Any]) -> None:
    """Print a line, and record it if it was measured on a GPU."""
    line = {"case": case, **config, **values}
    if GPU:
        record("kernels", {"case": case, **config}, values, gpu=True)
    short = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in line.items()}
    print(json.dumps(short), flush=True)


def seconds(run: Callable[[], object], most: float = 0.4) -> tuple[float, float, float]:
    """Return the median, 20th and 80th percentile of a call's seconds."""
    found = timed(run, repeats=100 if GPU else 1, least=5 if GPU else 1, most_s=most, device=DEVICE)
    return found.seconds, *percentiles(found.times)


def times(name: str, found: tuple[float, float, float]) -> dict[str, float]:
    """Return the three figures by name."""
    return {f"{name}_s": found[0], f"{name}_s_p20": found[1], f"{name}_s_p80": found[2]}


def ceilings() -> dict[str, float]:
    """Return measured flop/s of a large bfloat16 product and bytes/s of a copy."""
    n = 8192 if GPU else 64
    a, b = (torch.randn(n, n, device=DEVICE).bfloat16() for _ in range(2))
    rate = 2.0 * n**3 / seconds(lambda: a @ b)[0]
    source = torch.empty((1 << 30) if GPU else 1 << 16, dtype=torch.float32, device=DEVICE).normal_()
    target = torch.empty_like(source)
    copy = 2.0 * 4 * source.numel() / seconds(lambda: target.copy_(source))[0]
    note("ceilings", {}, {"bf16_flops": rate, "copy_bytes_per_s": copy})
    return {"flops": rate, "bytes": copy}


def relative(got: Tensor, truth: Tensor) -> float:
    """Return the relative Frobenius error; NaN never passes."""
    return float((got - truth).norm() / truth.norm())


def errors(_ceiling: dict[str, float]) -> set[str]:
    """Every kernel in bfloat16, float16 and float32 grade against float64, at many sizes; return what is wrong."""
    bad: set[str] = set()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        found: dict[str, float] = {}
        for N in ERROR_SIZES:
            p = (4096 if N < 8192 else 2048) if GPU else 100
            x = torch.randn(N, p + 8, device=DEVICE).to(dtype)[:, 3 : 3 + p]  # not aligned
            K = torch.full((N, N), float("nan"), dtype=torch.float64, device=DEVICE)
            K.tril_().nan_to_num_(0.0)
            syrk(x, K)
            truth = (x.double() @ x.double().T).tril()
            found["syrk"] = max(found.get("syrk", 0.0), relative(K.tril(), truth))
            T, R, I = (9, 520, 264) if GPU and N <= 2048 else (2, 70, 40)  # noqa: E741
            a, d = (torch.randn(N, *s, device=DEVICE).to(dtype) for s in ((T, I), (2, T, R)))
            packed = pack([(a, d)])
            if N <= 2048:
                G = torch.einsum("ncto,nti->ncoi", d.double(), a.double()).reshape(N, -1) if N <= 129 else None
                K = torch.zeros(N, N, dtype=torch.float64, device=DEVICE)
                ghost(packed, K)
                A, D = (v.reshape(N * T, -1).double() for v in (a, d.transpose(1, 2)))
                truth = ((A @ A.T) * (D @ D.T)).view(N, T, N, T).sum((1, 3))
                found["ghost"] = max(found.get("ghost", 0.0), relative(K, truth))
                if G is not None:
                    phi = materialise(packed, (0, R), (0, I), buffer(packed, R * I)).value().double()
                    found["materialise"] = max(found.get("materialise", 0.0), relative(phi, G))
            ids = torch.randint(0, 50, (N, T), device=DEVICE)
            K = torch.zeros(N, N, dtype=torch.float64, device=DEVICE)
            rows, sample, token = sum_rows(ids, d)
            lookup(rows.view(len(rows), -1), sample, token, K)
            if N <= 2048:
                one_hot = torch.nn.functional.one_hot(ids, 50).double()
                Z = torch.einsum("ntv,ncti->ncvi", one_hot, d.double()).reshape(N, -1)
                found["lookup"] = max(found.get("lookup", 0.0), relative(K, Z @ Z.T))
        bound = {"syrk": 1e-6, "ghost": 1e-6, "lookup": 1e-6, "materialise": 1e-6}
        if dtype != torch.float32:  # exact products, sums in tensor cores; features rounded once
            bound |= {"syrk": HALF_BOUND, "ghost": HALF_BOUND, "materialise": 4e-3}
        wrong = [k for k, v in found.items() if not v <= bound[k]]
        bad |= set(wrong)
        note("errors", {"dtype": str(dtype), "N": ERROR_SIZES}, found | {"above_bound": wrong})
    return bad


def sampled_error(x: Tensor, K: Tensor) -> float:
    """Return the relative error of 64 rows of a lower triangle."""
    rows = torch.randperm(len(x), device=DEVICE)[:64]
    truth = torch.zeros(len(rows), len(x), dtype=torch.float64, device=DEVICE)
    for part in x.split(8192, 1):
        truth += part[rows].double() @ part.double().T
    below = torch.arange(len(x), device=DEVICE)[None, :] <= rows[:, None]
    return relative(K[rows] * below, truth * below)


def syrks(ceiling: dict[str, float]) -> int:
    """Products Φ Φᵀ: bfloat16 against `torch.mm`, float32 grade against `torch.mm` without TF32."""
    bad = 0
    for dtype, sizes in ((torch.bfloat16, SYRK_SIZES), (torch.float32, FLOAT32_SIZES)):
        for N, p in sizes:
            x = torch.randn(N, p, device=DEVICE).to(dtype)
            K = torch.zeros(N, N, dtype=torch.float64, device=DEVICE)
            syrk(x, K)
            error = sampled_error(x, K)
            bad += not error <= (HALF_BOUND if dtype == torch.bfloat16 else 1e-6)
            ours, theirs = seconds(lambda x=x, K=K: syrk(x, K)), seconds(lambda x=x: torch.mm(x, x.T))
            passes = 1 if dtype == torch.bfloat16 else 3
            flops = passes * float(N) * (N + 1) * p
            values = times("syrk", ours) | times("torch_mm", theirs)
            values |= {"ratio": theirs[0] / ours[0], "error": error, "roofline": flops / ours[0] / ceiling["flops"]}
            if dtype == torch.float32:
                planes = split(x)
                values |= times("from_planes", seconds(lambda q=planes, K=K: syrk(q, K)))
                values["ratio_from_planes"] = theirs[0] / values["from_planes_s"]
            note("syrk", {"dtype": str(dtype), "N": N, "p": p}, values)
    return bad


def syrk_sweep(ceiling: dict[str, float]) -> int:
    """Other launches of `syrk`, to choose the table by measurement."""
    N, p = SYRK_SIZES[0]
    for kind, passes in (("half", 1), ("planes", 3)):
        key = (kind, "large", syrk_module.require(DEVICE).family)
        usual = syrk_module.LAUNCHES[key]
        shapes = [(128, 256, 64, 8, s) for s in (3, 4)] + [(256, 128, 64, 8, s) for s in (3, 4)]
        shapes += [(128, 128, 64, w, s) for w in (4, 8) for s in (3, 4, 5)]
        shapes += [(128, 256, 128, 8, 2), (128, 128, 128, 8, 3)]  # half as many steps to wait for
        if kind == "planes":
            shapes = [(128, 128, 64, 8, 2), (128, 128, 64, 8, 3), (128, 128, 32, 8, 5), (128, 64, 64, 4, 3)]
            shapes += [(64, 128, 64, 4, 3), (128, 128, 64, 4, 3), (256, 64, 64, 8, 2)]
        x = torch.randn(N, p // passes // 64 * 64 or p, device=DEVICE)
        operand = split(x) if kind == "planes" else syrk_module.Planes(x.bfloat16() if GPU else x)
        K = torch.zeros(N, N, dtype=torch.float64, device=DEVICE)
        for bm, bn, bk, warps, stages in shapes if GPU else shapes[:1]:
            launch = Launch({"BM": bm, "BN": bn, "BK": bk}, warps, stages)
            syrk_module.LAUNCHES[key] = launch
            try:
                found = seconds(lambda q=operand, K=K: syrk(q, K), 0.1)
            except Exception as error:  # noqa: BLE001 - a launch that does not fit is a result
                note("syrk sweep", {"kind": kind, "launch": [bm, bn, bk, warps, stages]}, {"failed": str(error)[:100]})
                continue
            finally:
                syrk_module.LAUNCHES[key] = usual
            share = passes * float(N) * (N + 1) * x.shape[1] / found[0] / ceiling["flops"]
            config = {"kind": kind, "N": N, "p": x.shape[1], "launch": [bm, bn, bk, warps, stages]}
            note("syrk sweep", config, times("syrk", found) | {"roofline": share})
    return 0


def torch_ghost(a: Tensor, d: Tensor, panels: int) -> Tensor:
    """Token products panel by panel, one triangle; (N·T)² numbers in memory for one panel."""
    N, T, _ = a.shape
    K = torch.zeros(N, N, dtype=torch.float64, device=a.device)
    rows = -(-N // panels)
    A, D = a.reshape(N * T, -1), d.reshape(N * T, -1)
    half = {"out_dtype": torch.float32} if a.dtype != torch.float32 and GPU else {}
    for start in range(0, N, rows):
        stop = min(start + rows, N)
        part = slice(start * T, stop * T)
        values = torch.mm(A[part], A[: stop * T].T, **half).mul_(torch.mm(D[part], D[: stop * T].T, **half))
        K[start:stop, :stop] = values.view(stop - start, T, stop, T).sum((1, 3)).double()
    return K


def torch_features(a: Tensor, d: Tensor, rows: int) -> Tensor:
    """Gradients made and multiplied, `rows` of the parameter at a time."""
    N = len(a)
    K = torch.zeros(N, N, dtype=torch.float64, device=a.device)
    for part in d.split(rows, 2):
        phi = torch.bmm(part.transpose(1, 2), a).view(N, -1)
        K += torch.mm(phi, phi.T)
    return K


def ghosts(ceiling: dict[str, float]) -> int:
    """Ghost products at T = 16, d = 4,096 against the best of several torch formulations."""
    bad = 0
    N, T, width = (512, 16, 4096) if GPU else (6, 4, 20)
    for dtype in (torch.bfloat16, torch.float32):
        a, d = (torch.randn(N, T, width, device=DEVICE).to(dtype) for _ in range(2))
        packed = pack([(a, d[:, None])])
        K = torch.zeros(N, N, dtype=torch.float64, device=DEVICE)
        ghost(packed, K, lower=True)
        truth = torch_ghost(a.double(), d.double(), 8).tril()
        error = relative(K, truth)
        if not error <= (HALF_BOUND if dtype == torch.bfloat16 else 1e-6):
            note("ghost", {"dtype": str(dtype), "N": N}, {"error": error})
            bad += 1
            continue
        ours = seconds(lambda q=packed, K=K: ghost(q, K, lower=True))
        packing = seconds(lambda a=a, d=d: pack([(a, d[:, None])]))
        ways = {f"panels_{n}": lambda a=a, d=d, n=n: torch_ghost(a, d, n) for n in (1, 4, 8)}
        ways |= {f"features_{r}": lambda a=a, d=d, r=r: torch_features(a, d, r) for r in (16, 256)}
        ways = {name: seconds(run, 0.2)[0] for name, run in ways.items()}
        best = min(ways, key=ways.__getitem__)
        passes = 1 if dtype == torch.bfloat16 else 3
        flops = passes * N * (N + 1) / 2 * T * T * 4.0 * width
        values = times("ghost", ours) | times("pack", packing) | {f"torch_{k}_s": v for k, v in ways.items()}
        values |= {"best_torch": best, "ratio": ways[best] / ours[0]}
        values |= {"ratio_with_pack": ways[best] / (ours[0] + packing[0]), "error": error}
        values["roofline"] = flops / ours[0] / ceiling["flops"]
        note("ghost", {"dtype": str(dtype), "N": N, "T": T, "I": width, "R": width, "C": 1}, values)
    return bad


def lookups(ceiling: dict[str, float]) -> int:
    """The embedding Gram against a per-sample scatter over the tokens that occur, and matrix products."""
    N, T, V, D = (1024, 128, 50_265, 768) if GPU else (6, 8, 30, 20)
    weight = 1.0 / torch.arange(1, V + 1, dtype=torch.float64)  # Zipf's law
    ids = torch.multinomial(weight, N * T, replacement=True).view(N, T).to(DEVICE)
    ids[:, 0] = 0
    d = torch.randn(N, 1, T, D, device=DEVICE)

    def ours() -> Tensor:
        K = torch.zeros(N, N, dtype=torch.float64, device=DEVICE)
        rows, sample, token = sum_rows(ids, d)
        lookup(rows[:, 0], sample, token, K, lower=True)
        return K

    def scatter(dtype: torch.dtype = torch.float32) -> Tensor:
        K = torch.zeros(N, N, dtype=torch.float64, device=DEVICE)
        present, rank = torch.unique(ids, return_inverse=True)
        sample = torch.arange(N, device=DEVICE)[:, None].expand(N, T)
        for start in range(0, len(present), 512):
            mine = (rank >= start) & (rank < start + 512)
            Z = torch.zeros(N, 512, D, dtype=dtype, device=DEVICE)
            Z.index_put_((sample[mine], rank[mine] - start), d[:, 0][mine].to(dtype), accumulate=True)
            K += torch.mm(Z.view(N, -1), Z.view(N, -1).T)
        return K

    error = relative(ours(), scatter(torch.float64).tril())
    if not error <= 1e-6:
        note("lookup", {"N": N}, {"error": error})
        return 1
    fast, slow = seconds(ours), seconds(scatter, 0.1)
    shared = torch.unique(torch.stack([ids, torch.arange(N, device=DEVICE)[:, None].expand(N, T)]).view(2, -1), dim=1)
    counts = torch.unique(shared[0], return_counts=True)[1].double()
    flops = 6 * float((counts * (counts + 1) / 2 * 2 * D).sum())  # three passes of tf32, half bfloat16's rate
    values = times("lookup", fast) | times("scatter", slow) | {"ratio": slow[0] / fast[0], "error": error}
    values["roofline"] = max(flops / ceiling["flops"], 4.0 * d.numel() / ceiling["bytes"]) / fast[0]
    note("lookup", {"dtype": "torch.float32", "N": N, "T": T, "vocabulary": V, "D": D}, values)
    return 0


def tiles(ceiling: dict[str, float]) -> int:
    """One linear map's Gram, gradients made tile by tile: which tile size is fastest, against the flop floor."""
    N, T, R, I = (1024, 128, 3072, 768) if GPU else (6, 5, 16, 20)  # noqa: E741
    for dtype, passes in ((torch.bfloat16, 1), (torch.float32, 3)):
        a, d = torch.randn(N, T, I, device=DEVICE).to(dtype), torch.randn(N, 1, T, R, device=DEVICE).to(dtype)
        packed = pack([(a, d)])
        K = torch.zeros(N, N, dtype=torch.float64, device=DEVICE)
        entry = 2 if passes == 1 else 4
        for mib in TILE_MIB:
            high, wide = tile_shape(R, I, (mib << 20) // (N * entry))
            out = buffer(packed, high * wide)

            def run(high: int = high, wide: int = wide, out: Any = out, q: Any = packed, K: Tensor = K) -> None:
                for row in range(0, R, high):
                    for column in range(0, I, wide):
                        rows, columns = (row, min(row + high, R)), (column, min(column + wide, I))
                        syrk(materialise(q, rows, columns, out), K)

            whole = seconds(run)
            alone = seconds(lambda t=((0, high), (0, wide)), out=out, q=packed: materialise(q, *t, out))
            floor = passes * (2.0 * N * T * R * I + float(N) * (N + 1) * R * I) / ceiling["flops"]
            values = (
                times("gram", whole) | times("materialise", alone) | {"floor_s": floor, "of_floor": floor / whole[0]}
            )
            values["materialise_bytes_per_s"] = entry * N * high * wide / alone[0]
            config = {"dtype": str(dtype), "N": N, "T": T, "R": R, "I": I, "tile_mib": mib, "tile": [high, wide]}
            note("tiles", config, values)
    return 0


# What is run, and the kernels that each section needs right; what only chooses a table comes last.
SECTIONS: list[tuple[Callable[[dict[str, float]], int | set[str]], set[str]]] = [
    (errors, set()),
    (syrks, {"syrk"}),
    (ghosts, {"ghost"}),
    (lookups, {"lookup"}),
    (tiles, {"syrk", "materialise"}),
    (syrk_sweep, {"syrk"}),
]
