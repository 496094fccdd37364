"""Numbers after the Gram on odd but legal input: types that change a meaning, sets that do not belong together."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import ntkengine as ntk
from ntkengine import losses
from ntkengine.errors import InputError
from ntkengine.forecast.scores import hits
from ntkengine.report.selection import selection_section
from ntkengine.targets import refuse_bits


class Net(nn.Module):
    def __init__(self, seed=0, outputs=1):
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.classifier = nn.Linear(3, 4), nn.Linear(4, outputs)

    def forward(self, x):
        return self.classifier(torch.tanh(self.body(x)))


X = torch.randn(6, 3, generator=torch.Generator().manual_seed(5))
X_EVAL = torch.randn(4, 3, generator=torch.Generator().manual_seed(6))
Y = np.array([1.0, -1, 1, -1, 1, -1])
RECIPE = {"learning_rate": 0.01}


def test_error_bounds_of_a_bfloat16_tensor_hold():
    rng = np.random.default_rng(0)
    A = rng.standard_normal((8, 12)) * np.linspace(1, 9, 8)[:, None]
    K = A @ A.T
    stored = torch.from_numpy(K).to(torch.bfloat16)
    noise = 0.5 * 2.0**-7 * np.linalg.norm(stored.double().numpy())
    assert ntk.eigsh(stored, k=8).values.shape == (8,)
    for gram in (stored, SimpleNamespace(values=stored)):
        found = ntk.eigsh(gram, k=8)
        off = np.abs(np.sort(found.values) - np.linalg.eigvalsh(K))
        assert (off <= np.sort(found.bounds).max()).all()
        condition = ntk.condition_number(gram)
        true = np.linalg.eigvalsh(K)
        assert condition.lower <= true[-1] / true[0] <= (condition.upper or np.inf)
        d = ntk.effective_dimension(gram, 3.0)
        assert abs(d - (true / (true + 3.0)).sum()) <= d.error
        assert ntk.spectrum.noise_of(gram) == pytest.approx(noise, rel=1e-6)


def test_small_unsigned_positions_are_positions_and_no_mask():
    factors = ntk.tangent_factors(Net(), X, X_EVAL, params="*.weight")
    rows = np.array([1, 0, 1, 1, 0, 1, 5, 4, 3, 1])[:6]
    same = [ntk.rehearse(factors, Y, RECIPE, rows=rows.astype(t)).train_losses for t in (np.int64, np.uint8, np.int8)]
    assert np.array_equal(same[0], same[1])
    assert np.array_equal(same[0], same[2])
    columns = ntk.Landmarks(Net(), X)
    index = np.array([1, 0, 1, 1, 0, 1])
    assert np.array_equal(columns(index.astype(np.uint8)), columns(index))
    for bad in ([6], [-1], [1.5], [True, False], "a", [[1]]):
        with pytest.raises(InputError, match="index: expected"):
            columns(np.array(bad))


def test_an_output_of_zero_is_a_miss_everywhere():
    f, y = np.zeros((4, 1)), np.array([[1.0], [-1], [1], [-1]])
    assert not hits(f, y).any()
    assert not losses.correct(torch.from_numpy(f), torch.from_numpy(y)).any()
    assert not losses.correct(torch.from_numpy(f), torch.tensor([1, 0, 1, 0])).any()


@pytest.mark.parametrize("optimizer", [torch.optim.RAdam, torch.optim.NAdam])
def test_states_of_optimisers_with_another_step_are_refused(optimizer):
    model = Net()
    stepped = optimizer(model.parameters(), lr=1e-3)
    model(X).sum().backward()
    stepped.step()
    with pytest.raises(InputError, match="optimizer state: expected that of Adam or AdamW, whose groups tell amsgrad"):
        ntk.Preconditioner.from_optimizer(stepped.state_dict(), model)


def test_products_take_finite_real_numbers_only():
    products = ntk.TangentProducts(Net(), {"x": X}, params="all")
    ones = np.ones((6, 1))
    want = products(ones)
    assert np.array_equal(products(ones.tolist()), want)
    assert np.array_equal(products(torch.ones(6, 1)), want)
    for bad, message in (
        (1j * ones, "X: expected real numbers"),
        (np.where(np.arange(6)[:, None] == 4, np.nan, 1.0), "X: expected finite numbers"),
        ("ab", "X: expected numbers"),
        (np.ones((5, 1)), r"X: expected shape \(6, k\)"),
    ):
        with pytest.raises(InputError, match=message):
            products(bad)


def test_the_effective_rank_of_what_is_no_gram_is_refused():
    with pytest.raises(InputError, match="expected no negative eigenvalue"):
        ntk.effective_rank(np.diag([1.0, -1.0]))
    assert ntk.effective_rank(np.outer(Y, Y)) == pytest.approx(1.0)


def test_sets_that_do_not_belong_together_are_refused():
    factors = ntk.tangent_factors(Net(), X, X_EVAL, params="*.weight")
    call = {"eval_inputs": X_EVAL, "per_module": True}
    own = ntk.compute_gram(Net(), X, params="*.weight", **call)
    ranked = {"recipe": RECIPE, "factors": factors, "eval_targets": Y[:4]}
    ntk.rank_subsets(own, Y, "single", **ranked)
    other = ntk.compute_gram(Net(1), X, params="*.weight", **call)
    with pytest.raises(InputError, match="factors: expected those of the Gram's model and examples"):
        ntk.rank_subsets(other, Y, "single", **ranked)
    part = ntk.compute_gram(Net(), X, params="body.weight", **call)
    with pytest.raises(InputError, match="every map of the factors among its modules, classifier is not there"):
        ntk.rank_subsets(part, Y, "single", **ranked)
    with pytest.raises(InputError, match="which: expected an integer from 0"):
        ntk.rank_subsets(own, Y, "single", **ranked).peft(99)


def test_a_cross_fit_of_other_examples_or_shapes_is_refused():
    model, y = Net(), Y[:, None]
    head = ntk.fit_head(model, X, y)
    gram = ntk.compute_gram(model, X, params="body.*")
    fit = ntk.cross_fit(model, X, head, params="body.*")
    ntk.forecast(gram, y, cross_fit=fit)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    again = copy.deepcopy(model)
    moved = ntk.cross_fit(again, X[order], ntk.fit_head(again, X[order], y[order]), params="body.*")
    with pytest.raises(InputError, match=r"cross_fit: expected the Gram's examples in its order"):
        ntk.forecast(gram, y, cross_fit=moved)
    bare = {"fold": fit.fold, "grams": fit.grams, "outputs": fit.outputs}
    assert ntk.forecast(gram, y, cross_fit=ntk.CrossFit(**bare)).loo == ntk.forecast(gram, y, cross_fit=fit).loo
    assert ntk.forecast(gram, y, cross_fit=ntk.CrossFit(**bare | {"fold": fit.fold.tolist()})).loo
    for change in ({"fold": fit.fold.astype(float)}, {"fold": fit.fold[:5]}, {"grams": None}, {"outputs": None}):
        with pytest.raises(InputError, match="cross_fit: expected"):
            ntk.forecast(gram, y, cross_fit=ntk.CrossFit(**bare | change))


def test_folds_with_larger_kernels_than_the_gram_have_ridges_too():
    rng = np.random.default_rng(1)
    A = rng.standard_normal((6, 3))
    K, y = A @ A.T, Y[:, None]
    grams = np.stack([1e6 * K, 1e6 * K])
    grams[0] -= 1e-4 * np.eye(6)  # rounding of the larger one
    gram = SimpleNamespace(values=K, noise=1e-12, contraction="trace", outputs=np.zeros((6, 1)))
    fit = ntk.CrossFit(np.arange(6) % 2, grams, np.zeros((2, 6, 1)))
    assert np.isfinite(ntk.forecast(gram, y, cross_fit=fit).loo_mse).all()


def test_ratings_whose_part_is_all_zeros_and_ones_are_no_classes():
    ratings, part = np.array([[0.0], [1], [2], [3]]), np.array([[0.0], [1], [1]])
    refuse_bits("eval_targets", part, ratings)
    for classes in (np.array([[-1.0], [1]]), part):
        with pytest.raises(InputError, match="eval_targets: expected -1 and [+]1"):
            refuse_bits("eval_targets", part, classes)
    gram = ntk.compute_gram(Net(), X, eval_inputs=X_EVAL, params="all")
    y = np.array([0.0, 3, 1, 5, 2, 4])
    assert ntk.forecast(gram, y, eval_targets=np.array([0.0, 1, 1, 0])).eval_mse is not None
    run = ntk.fine_tune(Net(), X, y, RECIPE, eval_inputs=X_EVAL, eval_targets=[0.0, 1, 1, 0], params="all")
    assert run.history[-1].eval_loss is not None
    with pytest.raises(InputError, match="eval_targets: expected -1 and"):
        ntk.forecast(gram, Y, eval_targets=np.array([0.0, 1, 1, 0]))


def test_a_ranking_without_accuracies_makes_a_report(tmp_path):
    factors = ntk.tangent_factors(Net(), X, X_EVAL, params="*.weight")
    found = ntk.rank_subsets(None, Y * np.arange(1, 7), recipe=RECIPE, factors=factors, eval_targets=Y[:4] * 2.5)
    assert found.choices[0].outcome.eval_accuracy is None
    path = tmp_path / "r.json"
    path.write_text(json.dumps(found.to_dict()))
    assert selection_section(path).tables[0].rows[0][3] == ""


def test_an_unchecked_gram_says_why_it_has_no_errors():
    gram = ntk.compute_gram(Net(), X, params="all", check=False)
    for call in (ntk.condition_number, lambda g: ntk.eigsh(g, k=2), lambda g: ntk.forecast(g, Y)):
        with pytest.raises(InputError, match="gram: its noise is not known, as it was computed with check=False"):
            call(gram)
    assert ntk.condition_number(gram.values).lambda_max > 0
    gram.meta["checked"] = True
    with pytest.raises(InputError, match="is not known, as its model does not run in float64; give its `values` alone"):
        ntk.condition_number(gram)


def test_the_ridge_of_a_forecast_is_that_of_a_share_of_the_kernel():
    gram = ntk.compute_gram(Net(outputs=2), X, params="all", precision="exact")
    y = np.stack([Y, -Y], 1)
    found = ntk.forecast(gram, y, ridge=0.5)
    fit = ntk.KernelRidge(ridge=1.0).fit(gram, y, offset=gram.outputs)
    assert found.loo[0] == pytest.approx(np.mean(fit.loo_residuals_**2))
    assert dict(found.table())["contraction"] == "trace, K/2 for each output"


def test_a_model_that_is_one_linear_map_has_factors():
    torch.manual_seed(0)
    assert set(ntk.tangent_factors(nn.Linear(3, 1), X).maps) == {"weight"}


def test_numbers_of_numpy_count_and_words_do_not():
    y = Y[:, None]
    for ridge in (np.float32(2), np.int64(2), 2):
        assert ntk.fit_head(Net(), X, y, ridge=ridge).ridge == 2.0
    fit = ntk.fit_head(Net(), X, y, folds=3)
    assert ntk.LinearityCallback(X, every=np.int64(10)).every == 10
    recipe = ntk.Recipe(0.1, schedule="linear")
    linear, factors = ntk.linearize(Net(), params="all"), ntk.tangent_factors(Net(), X)
    for call, message in [
        (lambda: ntk.fit_head(Net(), X, y, ridge=True), "ridge: expected 'loo' or a number > 0, got True"),
        (lambda: ntk.fit_head(Net(), X, y, seed=-1), "seed: expected an integer from 0 to"),
        (lambda: fit.write(Net(), 3), "fold: expected an integer from -1 to 2, got 3"),
        (lambda: fit.write(Net(), -2), "fold: expected an integer from -1 to 2, got -2"),
        (lambda: ntk.LinearityCallback(X, threshold="0.5"), "threshold: expected a number > 0"),
        (lambda: ntk.LinearityCallback(X, params=5), "params: expected a list of globs"),
        (lambda: ntk.tangent_factors(Net(), X, progress=1), "progress: expected a function"),
        (lambda: ntk.rehearse(factors, Y, RECIPE, rank=10**400), "rank: expected an integer from 1 to"),
        (lambda: ntk.rank_subsets(None, Y, recipe=RECIPE, factors=1, eval_targets=Y), "factors: expected those of"),
        (lambda: linear({"x": None}), "inputs: expected a mapping of tensors"),
        (lambda: linear.compare({}), "inputs: expected a mapping of tensors"),
        (lambda: list(recipe.batches(0)), "n: expected an integer >= 1"),
        (lambda: list(recipe.batches(4, -1)), "seed: expected an integer >= 0"),
        (lambda: recipe.steps(-3), "n: expected an integer >= 1"),
        (lambda: recipe.rate(100, 10), "step: expected an integer from 0 to 0"),
        (lambda: ntk.simulate(np.array(2), y, RECIPE, offset=0 * y), "grams: expected at least one matrix"),
        (lambda: ntk.simulate([np.eye(6)], y, RECIPE, offset=0 * y, sizes=np.array(2)), "sizes: expected the param"),
        (
            lambda: ntk.KernelLogistic(class_weight={"a": 2.0}).fit(np.eye(6), list("bcbcbc")),
            "class_weight: expected weights of classes among y, got one of 'a'",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            call()
