"""Features, their norms, columns by landmark, and products without a Gram: against the Gram."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import ntkengine as ntk
from ntkengine.errors import CheckFailed, InputError, NonFinite
from ntkengine.gram.features import Landmarks, tangent_features
from ntkengine.gram.jacobian import TangentProducts
from ntkengine.gram.linear import tangent_factors
from ntkengine.ridge import conjugate_gradients, random_cholesky
from ntkengine.spectrum import FactorOperator, ImplicitOperator
from tests.brute import tiny_inputs, tiny_model, with_lora
from tests.zoo import LENGTHS, READOUTS
from tests.zoo import inputs as zoo_inputs
from tests.zoo import model as zoo_model

LONG = [11, 3, 5, 7, 2, 9, 5, 4, 12, 6]


def lora():
    model = with_lora(tiny_model("llama"), ["q_proj", "v_proj"], away_from_start=True)
    return model, tiny_inputs(model, LONG, 12), "trainable"


def bert():
    model = tiny_model("bert")
    return model, tiny_inputs(model, LONG, 12), "all"


CASES = {"lora": lora, "bert": bert}


@pytest.mark.parametrize("contraction", ["full", "trace", "sum-of-outputs"])
@pytest.mark.parametrize("case", CASES)
def test_all_ways_give_the_gram(case, contraction):
    model, inputs, params = CASES[case]()
    options = {"params": params, "contraction": contraction, "precision": "exact"}
    gram = np.asarray(ntk.compute_gram(model, inputs, check=False, **options).values)
    features = tangent_features(model, inputs, **options)
    assert features.dtype == np.float64
    assert features.shape[0] == len(gram)
    np.testing.assert_allclose(features @ features.T, gram, rtol=1e-9, atol=1e-10 * gram.max())
    X = np.random.default_rng(0).standard_normal((len(gram), 3))
    products = TangentProducts(model, inputs, **options)
    assert (products.rows, products.noise) == (len(gram), 0.0)
    close = 1e-9
    for operator in (FactorOperator(features), ImplicitOperator.of(products)):
        np.testing.assert_allclose(operator @ X, gram @ X, atol=close * gram.max())
        np.testing.assert_allclose(operator @ X[:, 0], gram @ X[:, 0], atol=close * gram.max())
    assert products.rounding < 1e-12


def test_features_with_a_preconditioner_and_in_single_precision():
    model, inputs, _ = lora()
    diagonal = {n: torch.rand_like(p) for n, p in model.named_parameters() if p.requires_grad}
    transform = ntk.Preconditioner(diagonal)
    gram = ntk.compute_gram(model, inputs, contraction="full", transform=transform, precision="exact", check=False)
    features = tangent_features(model, inputs, transform=transform)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features @ features.T, gram.values, atol=1e-4 * gram.values.max())


def test_the_largest_eigenvalues_without_a_gram():
    model, inputs, params = bert()
    gram = ntk.compute_gram(model, inputs, params=params, contraction="full", precision="exact", check=False)
    exact = np.linalg.eigvalsh(gram.values)
    for precision in ("exact", "high"):
        products = TangentProducts(model, inputs, params=params, precision=precision)
        ritz = ntk.eigsh(products, k=4, tol=1e-6)
        assert (np.abs(ritz.values - exact[-4:]) <= ritz.bounds).all()
        assert ritz.bounds.max() < 1e-4 * exact[-1]
        np.testing.assert_allclose(products.outputs, gram.outputs, atol=1e-5)
    assert 0 < products.noise < 1e-5 * exact[-1]
    # The true error is no larger than what one random product shows, up to its spread.
    error = np.column_stack([products(e[:, None])[:, 0] for e in np.eye(len(exact))]) - gram.values
    assert np.linalg.norm(error, 2) <= 2.0 * products.noise
    y = np.cos(np.arange(len(exact))).reshape(products.outputs.shape)
    without = ntk.KernelRidge(ridge=0.1 * exact[-1], tol=1e-10).fit(
        TangentProducts(model, inputs, params=params), y, offset=products.outputs
    )
    within = ntk.KernelRidge(ridge=0.1 * exact[-1]).fit(gram, y, offset=products.outputs)
    np.testing.assert_allclose(without.dual_coef_, within.dual_coef_, atol=1e-9 * np.abs(within.dual_coef_).max())
    right = np.cos(np.arange(len(exact)))
    ridge = 1e-2 * exact[-1]
    found = conjugate_gradients(TangentProducts(model, inputs, params=params), right, ridge, tol=1e-10)
    expected = np.linalg.solve(gram.values + ridge * np.eye(len(exact)), right)
    np.testing.assert_allclose(found.solution, expected, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["cnn", "mlp", "deberta", "qwen3", "gemma3", "t5", "modernbert", "vit", "bert-mlm"])
def test_products_of_many_architectures(name):
    model = zoo_model(name)
    inputs = zoo_inputs(name, model, LENGTHS)
    options = {"params": "all", "readout": READOUTS.get(name, _logits if name in ("cnn", "mlp") else "logits")}
    gram = ntk.compute_gram(model, inputs, contraction="full", precision="exact", check=False, **options).values
    X = np.random.default_rng(0).standard_normal((len(gram), 2))
    before = [p.requires_grad for p in model.parameters()]
    products = TangentProducts(model, inputs, **options)
    casts = name in ("qwen3", "gemma3")
    np.testing.assert_allclose(products(X), gram @ X, atol=(1e-6 if casts else 1e-9) * np.abs(gram).max())
    assert [p.requires_grad for p in model.parameters()] == before


def _logits(out, _inputs):
    return out


@pytest.mark.parametrize("contraction", ["trace", "sum-of-outputs"])
def test_landmarks_give_columns_and_the_diagonal(contraction):
    model, inputs, params = bert()
    options = {"params": params, "contraction": contraction, "precision": "exact"}
    gram = np.asarray(ntk.compute_gram(model, inputs, check=False, **options).values)
    columns = Landmarks(model, inputs, **options)
    np.testing.assert_allclose(columns.diagonal, gram.diagonal(), rtol=1e-10)
    np.testing.assert_allclose(columns(np.array([1, 4, 8])), gram[:, [1, 4, 8]], rtol=1e-9, atol=1e-10 * gram.max())
    low = random_cholesky(columns, columns.diagonal, 6, block=3)
    np.testing.assert_allclose((low.factor @ low.factor.T)[:, low.pivots], gram[:, low.pivots], atol=1e-8 * gram.max())
    whole = random_cholesky(columns, columns.diagonal, 10, block=4)
    np.testing.assert_allclose(whole.factor @ whole.factor.T, gram, atol=1e-8 * gram.max())


def test_landmarks_in_bfloat16():
    model, inputs, params = bert()
    gram = np.asarray(ntk.compute_gram(model, inputs, params=params, precision="exact", check=False).values)
    columns = Landmarks(model, inputs, params=params, precision="fast")
    low = random_cholesky(columns, columns.diagonal, 6, block=3)
    np.testing.assert_allclose((low.factor @ low.factor.T)[:, low.pivots], gram[:, low.pivots], atol=0.02 * gram.max())


@pytest.mark.parametrize("shape", [(7, 1), (30,), (30, 0)])
def test_products_refuse_other_shapes(shape):
    model, inputs, params = bert()
    with pytest.raises(InputError, match=r"X: expected shape \(30, k\)"):
        TangentProducts(model, inputs, params=params)(np.ones(shape))


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (tangent_features, {"contraction": "per-output"}, "contraction: expected one of"),
        (tangent_features, {"precision": "fast"}, "precision: expected"),
        (tangent_features, {"transform": "sign"}, "transform: expected"),
        (TangentProducts, {"contraction": "per-output"}, "contraction: expected"),
        (TangentProducts, {"precision": "fast"}, "precision: expected"),
        (Landmarks, {"contraction": "full"}, "contraction: expected"),
        (Landmarks, {"out": "k.h5"}, "landmarks take no out"),
    ],
)
def test_refused(make, arguments, message):
    model, inputs, _ = lora()
    with pytest.raises(InputError, match=message):
        make(model, inputs, **arguments)


def test_a_gradient_that_is_not_finite_is_named():
    model = torch.nn.Sequential(torch.nn.Linear(2, 1))

    def root(out, _inputs):
        return out.clamp(min=0).sqrt()

    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.zero_()
    with pytest.raises(NonFinite, match="example"):
        TangentProducts(model, {"x": torch.tensor([[1.0, 1.0], [-1.0, -1.0]])}, readout=root, params="all")


@pytest.mark.parametrize("what", ["features", "factors", "landmarks"])
def test_a_model_that_answers_otherwise_among_others_is_refused(what):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            h = self.inner(x)
            return self.out(h * (2 if len(h) > 5 else 1))

    call = {
        "features": lambda *args, **options: tangent_features(*args, params="all", **options),
        "factors": lambda *args, **options: tangent_factors(*args, params="all", **options),
        "landmarks": lambda *args, **options: Landmarks(*args, params="all", **options),
    }[what]
    torch.manual_seed(0)
    given = Odd(), {"x": torch.randn(9, 4)}
    with pytest.raises(CheckFailed, match="differs from plain autograd"):
        call(*given)
    call(*given, check=False)
