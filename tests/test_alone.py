"""Products with K against each example alone: what is refused, what is told of the rest, and the noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import ntkengine as ntk
from ntkengine.errors import CheckFailed

N, D = 12, 6


class Plain(nn.Module):
    def __init__(self, outputs=1):
        super().__init__()
        self.inner, self.out = nn.Linear(D, 16), nn.Linear(16, outputs)

    def forward(self, x):
        return self.out(torch.tanh(self.inner(x)))


class Expert(Plain):
    """An expert that takes the first two of a batch that ask for it; the others pass it by."""

    def __init__(self):
        super().__init__()
        self.expert = nn.Linear(D, 16)

    def forward(self, x):
        asks = x[:, 0] > 0
        taken = (asks & (asks.long().cumsum(0) <= 2)).to(x.dtype)[:, None]
        return self.out(torch.tanh(self.inner(x) + taken * self.expert(x)))


class Mixing(Plain):
    """Values that are each example's own, gradients that are not."""

    def forward(self, x):
        f = super().forward(x)
        mean = f.mean(0, keepdim=True)
        return f + 0.5 * (mean - mean.detach())


class Scale(torch.autograd.Function):
    """x·w with a backward pass that cannot be differentiated."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        g = g.detach()
        return g * w, (g * x).sum().reshape(1)


class Beside(Plain):
    """Such a function beside a path that can be, for `only` one example if so."""

    def __init__(self, share, only=None):
        super().__init__()
        self.w, self.share, self.only = nn.Parameter(torch.ones(1)), share, only

    def forward(self, x):
        chosen = x[:, :1] if self.only is None else x[:, :1] * (x[:, :1] == self.only)
        return super().forward(x) + self.share * Scale.apply(chosen.sin(), self.w)


def jacobian(model, x):
    model = model.double()
    rows = []
    for i in range(len(x)):
        f = model(x[i : i + 1].double())[0]
        for c in range(len(f)):
            found = torch.autograd.grad(f[c], list(model.parameters()), retain_graph=True)
            rows.append(torch.cat([g.reshape(-1) for g in found]))
    return torch.stack(rows).numpy()


def dense(products):
    return products(np.eye(products.rows))


@pytest.mark.parametrize("precision", ["exact", "high"])
@pytest.mark.parametrize("contraction", ["full", "trace"])
def test_examples_that_depend_on_their_batch_are_refused(precision, contraction):
    torch.manual_seed(0)
    x = torch.randn(N, D)
    x[:, 0] = -x[:, 0].abs()
    x[[1, 3, 4, 8], 0] *= -1  # neither the first, the middle nor the last ask
    options = {"contraction": contraction, "precision": precision}
    with pytest.raises(CheckFailed, match="f of example [48] depends on the other examples"):
        ntk.TangentProducts(Expert(), {"x": x}, **options)
    with pytest.raises(CheckFailed, match=r"gradients mix the examples of a batch: that of \w+\.\w+ is off"):
        ntk.TangentProducts(Mixing(), {"x": x}, **options)


@pytest.mark.parametrize("precision", ["exact", "high"])
@pytest.mark.parametrize("share", [1.0, 0.1])
def test_a_missing_path_is_refused_whatever_the_vectors(share, precision):
    torch.manual_seed(1)
    x = torch.randn(N, D)
    for only in (None, float(x[5, 0])):
        model = Beside(share, only)
        for seed in range(10):
            with pytest.raises(CheckFailed, match="derivative of its backward pass is not its Jacobian"):
                ntk.TangentProducts(model, {"x": x}, precision=precision, seed=seed)


@pytest.mark.parametrize(("share", "only"), [(1e-4, False), (1e-5, False), (1e-3, True), (1e-4, True)])
def test_what_is_too_small_to_refuse_is_told(share, only):
    torch.manual_seed(1)
    x = torch.randn(N, D)
    model = Beside(share, float(x[5, 0]) if only else None)
    products = [ntk.TangentProducts(model, {"x": x}, seed=seed) for seed in range(10)]
    J = jacobian(model, x)
    K = J @ J.T
    off = np.linalg.norm(dense(products[0]) - K, 2) / np.linalg.norm(K, 2)
    assert off > 1e-13
    assert all(off <= p.rounding < 1e-4 for p in products)


def test_single_precision_that_is_another_model_is_refused():
    class Other(Plain):
        def forward(self, x):
            return super().forward(x) * (1.1 if x.dtype == torch.float32 else 1.0)

    torch.manual_seed(0)
    ntk.TangentProducts(Other(), {"x": torch.randn(N, D)})
    with pytest.raises(CheckFailed, match=r"differ from float32 ones by a relative 2\.\de-01"):
        ntk.TangentProducts(Other(), {"x": torch.randn(N, D)}, precision="high")


def test_models_of_one_own_example_each_are_right_to_rounding():
    torch.manual_seed(2)
    for contraction in ("full", "trace"):
        x = torch.randn(N, D)
        model = Plain(3)
        products = ntk.TangentProducts(model, {"x": x}, contraction=contraction)
        J = jacobian(model, x).reshape(N, 3, -1)
        K = np.einsum("icp,jcp->ij", J, J) if contraction == "trace" else J.reshape(3 * N, -1) @ J.reshape(3 * N, -1).T
        assert np.linalg.norm(dense(products) - K, 2) <= 1e-14 * np.linalg.norm(K, 2)
        assert products.rounding == 1e-14


def test_parameters_that_no_output_depends_on_give_zero():
    class Passing(Plain):
        def forward(self, x):
            return x[:, :2]

    products = ntk.TangentProducts(Passing(), {"x": torch.randn(N, D)})
    assert not dense(products).any()


@pytest.mark.parametrize("case", ["ordinary", "one large", "alike", "one example"])
def test_the_noise_is_a_bound(case):
    """Errors of rank one are where the mean of ‖E z‖ is below ‖E‖₂."""
    torch.manual_seed(0)
    x = torch.randn(N, D)
    if case == "one large":
        x[3] *= 100
    if case == "alike":
        x = x[:1] + 1e-2 * x
    if case == "one example":
        x = x[:1]
    model = Plain(1)
    products = [ntk.TangentProducts(model, {"x": x}, precision="high", seed=seed) for seed in range(40)]
    error = np.linalg.norm(dense(products[0]) - dense(ntk.TangentProducts(model, {"x": x})), 2)
    assert all(p.noise >= error for p in products)
    assert np.median([p.noise for p in products]) < 12 * np.sqrt(len(x)) * error
