"""K += x yᵀ against float64, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from ntk_kernels import fold as folding
from ntk_kernels import naive, runtime
from ntk_kernels import syrk as module
from ntk_kernels.planes import Planes, aligned, split
from ntk_kernels.syrk import syrk

from ntkengine.gram.transforms import signed
from tests.kernels.common import DEVICE, close, randn

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(1, 1), (1, 1000), (63, 129), (129, 63), (1000, 30)]
NAN = float("nan")


def lower_of(x, y=None, **options):
    """Return K's lower triangle; what lies above must stay as it was."""
    other = x if y is None else y
    K = torch.full((x.shape[0], other.shape[0]), NAN, dtype=torch.float64, device=DEVICE).triu(1)
    syrk(x, K, y, **options)
    assert torch.equal(K.triu(1).isnan(), torch.ones_like(K).triu(1).bool())
    return K.tril().nan_to_num(0.0) if bool(K.triu(1).isnan().any()) else K


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "p"), SIZES)
def test_the_lower_triangle(N, p, dtype):
    x = randn(N, p, dtype=dtype)
    close(lower_of(x), naive.syrk(x).tril(), dtype, p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype):
    wide = randn(70, 301, dtype=dtype)
    for x in (wide[:, 3:260], wide[::2, 5:], wide.T, wide.T[7:, ::3]):
        close(lower_of(x), naive.syrk(x).tril(), dtype, x.shape[1])
    K = torch.ones(2 * 70, 3 * 70, dtype=torch.float64, device=DEVICE)
    syrk(wide, K.T[::3, ::2], lower=False)
    close(K.T[::3, ::2] - 1, naive.syrk(wide), dtype, 301)
    assert bool((K.T[1::3] == 1).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_columns(dtype):
    x, y = randn(150, 100, dtype=dtype), randn(70, 100, dtype=dtype, seed=1)
    K = torch.ones(150, 70, dtype=torch.float64, device=DEVICE)
    syrk(x, K, y)
    close(K - 1, x.double() @ y.double().T, dtype, 100)
    K = torch.zeros(150, 70, dtype=torch.float64, device=DEVICE)
    syrk(x, K, y, lower=True)  # rows of further samples below a square
    close(K, (x.double() @ y.double().T).tril(), dtype, 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_many_runs_tiles_and_slabs(monkeypatch, dtype):
    monkeypatch.setattr(module, "RUN", {"half": 128, "planes": 128})
    monkeypatch.setattr(folding, "SLAB_BYTES", 1)
    monkeypatch.setattr(module, "PANEL_BYTES", 300 * 4 * 128)
    x = randn(140, 500, dtype=dtype)
    close(lower_of(x), naive.syrk(x).tril(), dtype)


def test_without_descriptors(monkeypatch):
    ampere = dataclasses.replace(runtime.limits(DEVICE), family=80)
    monkeypatch.setattr(module, "require", lambda device: ampere)
    for dtype in (torch.float32, torch.float16):
        for p in (64, 61):
            x = randn(65, p, dtype=dtype)
            close(lower_of(x), naive.syrk(x).tril(), dtype, p)


def test_the_same_bits_every_time():
    x = randn(130, 300)
    assert torch.equal(lower_of(x), lower_of(x))


def test_rows_and_entries_of_very_different_size():
    x = randn(40, 400) * torch.logspace(-12, 12, 40, device=DEVICE)[:, None]
    x *= torch.logspace(0, -4, 400, device=DEVICE)
    x[7] = 0
    truth = naive.syrk(x).tril()
    size = truth.diagonal().sqrt()
    error = (lower_of(x) - truth).abs() / (size[:, None] * size).clamp_min(1e-300)
    assert float(error.max()) < 2e-6


def test_positive_semidefinite_with_its_rounding():
    x = randn(100, 40)
    K = lower_of(x)
    values = torch.linalg.eigvalsh(K + K.tril(-1).T)
    assert float(values[0]) > -3e-7 * float(values[-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sign", ["both", "columns"])
def test_signs(sign, dtype):
    x = randn(66, 130, dtype=dtype)
    x[3, 5:90] = 0
    floor = torch.full((66,), 0.3, device=DEVICE)
    for given in (None, floor):
        s = signed(x.float(), None if given is None else given[:, None])
        left = s if sign == "both" else x
        K = torch.zeros(66, 66, dtype=torch.float64, device=DEVICE)
        syrk(x, K, sign=sign, floor_M=given, lower=False)
        truth = left.double() @ s.double().T
        if sign == "both":
            assert torch.equal(K, truth)
        close(K, truth, dtype, 130)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_what_is_not_finite_stays_so(bad):
    for dtype in (torch.float32, torch.float16):
        x = randn(5, 20, dtype=dtype)
        x[2, 3] = bad
        for sign in (None, "both"):
            K = torch.zeros(5, 5, dtype=torch.float64, device=DEVICE)
            syrk(x, K, sign=sign)
            assert not torch.isfinite(K[2:, 2][[0, 1]]).any()
            assert torch.isfinite(K[:2]).all()


def test_planes_hold_float32():
    x = randn(9, 1000) * torch.logspace(-20, 20, 9, device=DEVICE)[:, None]
    planes = split(x)
    error = (planes.value().double() - x.double()).abs()
    assert bool((error <= 2.0**-22 * x.double().abs() + 2.0**-38 * x.double().abs().amax(1, keepdim=True)).all())
    part = planes.part(slice(2, 5), slice(10, 30))
    assert torch.equal(part.value(), planes.value()[2:5, 10:30])


def test_copies_only_what_is_not_aligned():
    x = torch.zeros(8, 64, dtype=torch.float16, device=DEVICE)
    assert aligned(x, whole=True) is x
    assert aligned(x[:, :63], whole=False).data_ptr() == x.data_ptr()
    for given in (x[:, 1:], x.T[:, :7]):
        assert aligned(given, whole=False).data_ptr() != given.data_ptr()
    assert aligned(x[:, :63], whole=True).shape == (8, 64)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((torch.zeros(3, 4), torch.zeros(3, 3)), "float64"),
        ((torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.float64)), r"expected \(3, 3\)"),
        ((torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)), "expected float32"),
        ((torch.zeros(3, 4), torch.zeros(3, 2, dtype=torch.float64), torch.zeros(2, 5)), "expected 4 features"),
        ((torch.zeros(3, 4), torch.zeros(3, 2, dtype=torch.float64), torch.zeros(2, 4).half()), "one dtype"),
        ((Planes(torch.zeros(3, 4)), torch.zeros(3, 2, dtype=torch.float64), torch.zeros(2, 4)), "both planes"),
    ],
)
def test_refusals(arguments, says):
    moved = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in arguments]
    with pytest.raises(ValueError, match=says):
        syrk(*moved)
