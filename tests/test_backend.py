"""The same Grams from Triton kernels: in the interpreter where there is no GPU."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from ntk_kernels import runtime

from ntkengine.errors import InputError
from ntkengine.gram import backend, kernels
from ntkengine.gram.engine import compute_gram
from ntkengine.gram.frame import Frame
from ntkengine.gram.strategies import contract
from ntkengine.gram.tiles import Accumulator
from ntkengine.gram.transforms import Preconditioner
from ntkengine.tangents.factors import Lookup, Outer, ParameterFactors
from tests.brute import relative_error, tiny_inputs, tiny_model
from tests.kernels.common import DEVICE

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
CONTRACTIONS = ("trace", "full", "per-output", "sum-of-outputs")


def small(kind, layers=1):
    """Return a tiny model of fewer layers, which the interpreter gets through in seconds."""
    model = tiny_model(kind, num_labels=2)
    base = getattr(model, model.base_model_prefix)
    if kind == "llama":
        base.layers = base.layers[:layers]
    else:
        base.encoder.layer = base.encoder.layer[:layers]
    return model.to(DEVICE)


def both(model, *, tolerance, **options):
    inputs, more = tiny_inputs(model, [5, 2], 5), tiny_inputs(model, [3], 5, seed=1)
    inputs, more = ({k: v.to(DEVICE) for k, v in group.items()} for group in (inputs, more))
    options = {"params": "all", "check": False, "eval_inputs": more} | options
    fast, slow = (compute_gram(model, inputs, backend=name, **options) for name in ("triton", "torch"))
    assert (fast.meta["backend"], slow.meta["backend"]) == ("triton", "torch")
    for got, truth in ((fast.values, slow.values), (fast.cross, slow.cross)):
        assert max(relative_error(got, truth)) < tolerance
    return fast


@pytest.mark.parametrize("contraction", CONTRACTIONS)
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_equal_to_torch(kind, contraction):
    both(small(kind), contraction=contraction, tolerance=2e-6)


@pytest.mark.parametrize("transform", ["sign", "asymmetric-sign"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_signs_equal_torch(kind, transform):
    # An entry that is all rounding may take either sign.
    both(small(kind), transform=transform, tolerance=1e-3)


def test_a_preconditioner_and_modules_equal_torch():
    model = small("bert")
    scale = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    fast = both(model, transform=Preconditioner(scale), per_module=True, tolerance=2e-6)
    assert np.allclose(sum(fast.modules.values()), fast.values, rtol=1e-12, atol=1e-12)


def test_checked_against_autograd_with_its_noise():
    model = small("bert")
    inputs = {k: v.to(DEVICE) for k, v in tiny_inputs(model, [5, 2], 5).items()}
    gram = compute_gram(model, inputs, params="all", backend="triton")
    assert gram.meta["noise_relative"] < 2e-6


def test_bfloat16_equals_torch_to_its_rounding():
    both(small("bert"), precision="fast", tolerance=2e-2)


@pytest.mark.parametrize("transform", ["sgd", "sign", "asymmetric-sign"])
@pytest.mark.parametrize("contraction", CONTRACTIONS)
@pytest.mark.parametrize("strategy", ["ghost", "materialise", "lookup"])
def test_every_frame(monkeypatch, strategy, contraction, transform):
    if strategy == "ghost" and transform != "sgd":
        pytest.skip("signs need whole gradients")
    monkeypatch.setattr(kernels, "FEATURE_BYTES", 1)  # several tiles
    monkeypatch.setattr(kernels, "BLOCK", 16)
    generator = torch.Generator().manual_seed(0)
    sizes, C, R, I = [1, 3], 2, 21, 17  # noqa: E741
    if contraction == "sum-of-outputs":
        C = 1
    chunks = []
    for n, T in zip(sizes, [2, 3], strict=True):
        d = torch.randn(n, C, T, I if strategy == "lookup" else R, generator=generator).to(DEVICE)
        if strategy == "lookup":
            chunks.append([Lookup(torch.randint(0, 5, (n, T), generator=generator).to(DEVICE), d)])
        else:
            chunks.append([Outer(torch.randn(n, T, I, generator=generator).to(DEVICE), d)])
    chunks.append([])  # samples whose gradient is zero
    factors = ParameterFactors("w", (R, I), [*sizes, 1], chunks)
    for rows, columns in (((0, 5), (0, 3)), ((1, 5), (0, 4)), ((1, 4), (1, 4))):
        frame = Frame(rows, columns, C, contraction, transform)
        totals = [Accumulator(frame, DEVICE, kernels=on) for on in (True, False)]
        for total in totals:
            contract(factors, strategy, total)
        got, truth = (total.finish().cpu().numpy() for total in totals)
        assert max(relative_error(got, truth)) < 2e-6


def test_a_request_that_cannot_be_met_fails(monkeypatch):
    model = tiny_model("bert")
    inputs = tiny_inputs(model, [3, 4], 5)
    with pytest.raises(InputError, match="float64"):
        compute_gram(model, inputs, params="all", backend="triton", precision="exact")
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="backend='triton': kernels need a CUDA device, got cpu"):
        compute_gram(model, inputs, params="all", backend="triton")
    monkeypatch.setattr(runtime, "triton", None)
    with pytest.raises(InputError, match=r"pip install triton"):
        compute_gram(model, inputs, params="all", backend="triton")


def test_auto_says_once_what_it_takes(monkeypatch, caplog):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(backend, "_logged", set())
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    monkeypatch.setattr(runtime, "why_not", lambda device: None)
    caplog.set_level(logging.INFO, "ntkengine")
    assert not backend.uses_kernels("auto", torch.device("cpu"), torch.float32)
    for _ in range(2):
        assert backend.uses_kernels("auto", gpu, torch.float32)
        assert not backend.uses_kernels("auto", gpu, torch.float64)
    assert not backend.uses_kernels("torch", gpu, torch.float32)
    assert [r.getMessage() for r in caplog.records] == [
        "backend='auto' takes triton: kernels run on this GPU",
        "backend='auto' takes torch: kernels take float32 and bfloat16, this job runs in float64",
    ]


@pytest.mark.parametrize(("R", "I"), [(3072, 768), (768, 3072), (50, 40_000), (2, 768), (4096, 11_008)])
@pytest.mark.parametrize("entries", [1, 40_000, 1 << 20, 1 << 40])
def test_tiles_have_whole_blocks_and_stay_within_bounds(R, I, entries):  # noqa: E741
    high, wide = kernels.tile_shape(R, I, entries)
    assert 0 < high <= R
    assert 0 < wide <= I
    assert high in (R, high // kernels.BLOCK * kernels.BLOCK)
    assert wide in (I, wide // kernels.BLOCK * kernels.BLOCK)
    assert high * wide <= max(entries, min(R, kernels.BLOCK) * min(I, kernels.BLOCK))


def test_a_sketch_equals_torch():
    both(small("bert"), sketch=256, check=True, tolerance=2e-6)
