"""Products sent to oneDNN are those of torch.mm; here on any CPU that has it, whatever the rule says."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ntkengine import products

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    monkeypatch.setattr(products, "prefers_onednn", lambda: True)
    monkeypatch.setattr(products, "_SMALLEST", 0)


def error(got, truth):
    assert torch.isfinite(got).all()
    return float((got.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize(("m", "k", "n"), [(8, 1, 8), (63, 129, 17), (64, 5000, 64), (9, 384, 1000)])
def test_inner_products(m, k, n):
    torch.manual_seed(0)
    x, y = torch.randn(m, k), torch.randn(n, k)
    truth = x.double() @ y.double().T
    wide_x, wide_y = torch.randn(m, 2 * k), torch.randn(n, k + 3)
    wide_x[:, ::2], wide_y[:, 1 : k + 1] = x, y
    for a in (x, wide_x[:, ::2], x.T.contiguous().T):
        for b in (y, wide_y[:, 1 : k + 1], y.T.contiguous().T):
            assert error(products.inner_products(a, b), truth) < 2e-6


def test_long_sums_keep_their_digits():
    x = torch.rand(64, 65_536, generator=torch.Generator().manual_seed(0))
    assert error(products.inner_products(x, x), x.double() @ x.double().T) < 1e-6


@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_backward_passes(bias):
    torch.manual_seed(0)
    layer = torch.nn.Linear(48, 40, bias=bias)
    x = torch.randn(16, 9, 48, requires_grad=True)
    v = torch.randn(16, 9, 40)
    wanted = [x, layer.weight]
    found = []
    for routed in (False, True):
        calls = []
        original = products._onednn
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(products, "_onednn", lambda *args: calls.append(args) or original(*args))  # noqa: B023
            if routed:
                with products.full_rate(), products.full_rate():
                    y = layer(x)
                    grads = torch.autograd.grad(y, wanted, v)
            else:
                y = layer(x)
                grads = torch.autograd.grad(y, wanted, v)
        assert len(calls) == (3 if routed else 0)
        found.append([y, *grads])
    for plain, routed in zip(*found, strict=True):
        assert error(routed.detach(), plain.detach().double()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_zeros_are_left_out(monkeypatch, dtype):
    torch.manual_seed(0)
    x, w = torch.randn(700, 40).to(dtype), torch.randn(40, 30).to(dtype)
    x[100:] = 0
    x[:50, 0] = 0
    rows = []
    original = products.inner_products
    monkeypatch.setattr(products, "inner_products", lambda a, b: rows.append(len(a)) or original(a, b))
    with products.full_rate():
        found = x @ w
        w[3, 7] = float("inf")
        unbounded = x @ w
        full = x.flip(0).clone().fill_(1) @ w[:, :7]
    assert rows == [101, 101, 700]
    truth = (x.double() @ w.nan_to_num(posinf=0).double())[:, 8:]
    assert error(found[:, 8:], truth) < (1e-6 if dtype == torch.float32 else 1e-2)
    assert not found[100:].any()
    assert unbounded[100:, 7].isnan().all()
    assert not unbounded[100:, :7].any()
    assert full.isfinite().all()


@pytest.mark.parametrize("tokens", [5, 300])
def test_backward_pass_of_bfloat16_attention(tokens):
    torch.manual_seed(0)
    q, k, v, up = (torch.randn(2, 3, tokens, 16) for _ in range(4))
    exact = [x.double().requires_grad_(True) for x in (q, k, v)]
    truth = torch.autograd.grad(scaled_dot_product_attention(*exact), exact, up.double())
    half = [x.bfloat16().requires_grad_(True) for x in (q, k, v)]
    with products.full_rate():
        found = torch.autograd.grad(scaled_dot_product_attention(*half), half, up.bfloat16())
    assert {g.dtype for g in found} == {torch.bfloat16}
    assert max(error(g, t) for g, t in zip(found, truth, strict=True)) < 2e-2


def test_other_dtypes_and_shapes_are_left_alone(monkeypatch):
    monkeypatch.setattr(products, "_onednn", lambda *_: pytest.fail("sent to oneDNN"))
    with products.full_rate():
        torch.randn(9, 9, dtype=torch.float64) @ torch.randn(9, 9, dtype=torch.float64)
        torch.randn(9, 9) @ torch.randn(9)
        torch.addmm(torch.zeros(9, 9), torch.randn(9, 9), torch.randn(9, 9))
        torch.addmm(torch.zeros(9), torch.randn(9, 9), torch.randn(9, 9), beta=2)
        torch.bmm(torch.randn(2, 9, 9), torch.randn(2, 9, 9))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("rows", [255, 256, 257, 319, 320])
def test_few_kinds_of_row_counts_reach_onednn(monkeypatch, rows, dtype, bound):
    seen = []
    original = products._filled
    monkeypatch.setattr(products, "_filled", lambda x: seen.append(original(x)) or seen[-1])
    torch.manual_seed(0)
    x, w, b = torch.randn(rows, 96).to(dtype), torch.randn(40, 96).to(dtype), torch.randn(40).to(dtype)
    truth = x.double() @ w.double().T
    found = [products.inner_products(x, w)]
    with products.full_rate():
        found += [torch.mm(x, w.T), torch.addmm(b, x, w.T) - b]
    assert [len(s) for s in seen] == [rows if rows < 256 else -(-rows // 64) * 64] * 3
    for got in found:
        assert got.shape == (rows, 40)
        assert error(got, truth) < bound
