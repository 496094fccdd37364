"""The contraction alone against the machine's rate for one large product: a BERT layer's six matrices.

Rates count the full product, both triangles, and the flops that fill the tangent features; the ceilings, of torch.mm
and of the engine's own product, are those of 2048³ in the same run.
"""

from __future__ import annotations

import json

import torch

from bench.record import record
from bench.timing import Timed, gate, timed
from ntkengine.gram.frame import Frame
from ntkengine.gram.strategies import choose, contract
from ntkengine.gram.tiles import Accumulator
from ntkengine.products import full_rate, inner_products
from ntkengine.tangents.factors import Outer, ParameterFactors

MATRICES = [(384, 384)] * 4 + [(1536, 384), (384, 1536)]
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # bfloat16: features are rounded to it
JOBS = [(64, 2, 32), (256, 2, 32), (512, 2, 32), (1024, 1, 32)]  # N, C, T


def main() -> int:
    """Time every job in float32 and bfloat16, print, and record a line each."""
    for dtype in (torch.float32, torch.bfloat16):
        mm, own = _ceilings(dtype)
        for N, C, T in JOBS:
            found, chosen = _contraction(dtype, N, C, T)
            seconds = found.seconds
            flops = sum(2.0 * N * C * (T + N) * R * width for R, width in MATRICES)
            config = {"matrices": MATRICES, "N": N, "C": C, "T": T, "dtype": str(dtype)[6:], "contraction": "trace"}
            values = {
                **found.values(),
                "gflops_per_second": flops / seconds / 1e9,
                "ceiling_gflops_per_second": max(mm, own) / 1e9,
                "share": flops / seconds / max(mm, own),
                "torch_mm_gflops_per_second": mm / 1e9,
                "share_of_torch_mm": flops / seconds / mm,
                "strategies": chosen,
            }
            print(json.dumps(record("contraction", config, values)))
    return 0


def _ceilings(dtype: torch.dtype) -> tuple[float, float]:
    """Return the flop/s of one large product: torch.mm's and the engine's."""
    x = torch.randn(2048, 2048).to(dtype)
    runs = (lambda: x @ x.T, lambda: inner_products(x, x))
    mm, own = (2.0 * 2048**3 / timed(run, repeats=9).seconds for run in runs)
    return mm, own


def _contraction(dtype: torch.dtype, N: int, C: int, T: int) -> tuple[Timed, list[str]]:
    """Return the time of the six matrices' contraction, and the strategy of each."""
    torch.manual_seed(0)
    factors = []
    for R, width in MATRICES:
        d = torch.randn(N, T, C, R).to(dtype).transpose(1, 2)  # token by token, as a sweep hands it over
        factors.append(ParameterFactors("w", (R, width), [N], [[Outer(torch.randn(N, T, width).to(dtype), d)]]))
    frame = Frame((0, N), (0, N), C, "trace")
    chosen = [choose("outer", f.shape, T, N, frame)[0] for f in factors]
    total = Accumulator(frame, torch.device("cpu"))

    def run() -> torch.Tensor:
        with full_rate():
            for f, strategy in zip(factors, chosen, strict=True):
                contract(f, strategy, total)
        return total.K[0]

    def judge(K: torch.Tensor) -> None:
        parts = [f.chunks[0][0] for f in factors]
        few = [torch.einsum("ncto,nti->ncoi", u.d[:4].double(), u.a[:4].double()).flatten(1) for u in parts]
        truth = sum(G @ G.T for G in few).tril()
        gate(float((K[:4, :4].tril() - truth).norm() / truth.norm()), BOUND[dtype], f"{dtype}, N = {N}")

    return timed(run, judge=judge, repeats=5), chosen
