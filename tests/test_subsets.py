"""The ranking of module subsets, and the expected LoRA kernel it rests on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from scipy.stats import t as student

import ntkengine as ntk
from ntkengine.errors import InputError, NonFinite
from ntkengine.forecast.outcome import outcome
from ntkengine.forecast.simulate import simulate
from ntkengine.forecast.subsets import rank_subsets
from ntkengine.gram.linear import tangent_factors
from ntkengine.recipe import Recipe
from tests.brute import relative_error, tiny_inputs, tiny_model

PARAMS = ["*query.weight", "*key.weight", "*intermediate.dense.weight"]
RECIPE = Recipe(3e-3, epochs=3, batch_size=4)


@pytest.fixture(scope="module")
def job():
    model = tiny_model("bert", 1)
    inputs, held = tiny_inputs(model, list(range(3, 15)), 16), tiny_inputs(model, list(range(4, 12)), 16, seed=1)
    rng = np.random.default_rng(0)
    y, y_held = rng.choice([-1.0, 1.0], (12, 1)), rng.choice([-1.0, 1.0], (8, 1))
    gram = ntk.compute_gram(model, inputs, eval_inputs=held, params=PARAMS, per_module=True, eval_targets=y_held)
    return model, inputs, held, y, y_held, gram, tangent_factors(model, inputs, held, params=PARAMS)


def test_expected_kernel_of_lora(job):
    """The mean over starts of real LoRA Grams, at α/r = 2, is the full kernel times (α/r)² r / (3 d_in)."""
    _, inputs, *_, gram, _ = job
    name = next(iter(gram.modules))
    total, draws, r = 0.0, 24, 8
    for seed in range(draws):
        base = tiny_model("bert", 1)
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(base, peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=[name]))
        total = total + np.asarray(ntk.compute_gram(adapted, inputs, check=False).values)
    expected = 4.0 * r / (3.0 * 32) * np.asarray(gram.modules[name])
    # Each draw projects 32 inputs to 8; the mean of 24 is off by about √(2/(24·8)) of an entry's own size.
    assert relative_error(total / draws, expected)[0] < 0.1


def test_by_gram_is_the_simulation(job):
    *_, y, y_held, gram, _ = job
    found = rank_subsets(gram, y, "types", recipe=RECIPE, eval_targets=y_held, rank=4)
    assert [c.name for c in found.choices] != []
    names = [n for n in gram.modules if n.endswith("query")]
    factor = 4.0 * 4 / (3 * 32)
    truth = simulate(
        [np.asarray(gram.modules[n]) * factor for n in names], y, RECIPE, offset=gram.outputs, sizes=[4 * 32] * 3,
        crosses=[np.asarray(gram.cross_modules[n]) * factor for n in names], eval_targets=y_held,
        eval_offset=gram.eval_outputs,
    )  # fmt: skip
    choice = next(c for c in found.choices if c.name == "attention.self.query")
    assert choice.outcome.eval_loss[0] == pytest.approx(truth.eval_losses.mean(), rel=1e-9)
    values = np.linalg.eigvalsh(sum(np.asarray(gram.modules[n]) * factor for n in names))
    assert choice.weyl[0] <= values[0] + 1e-9 * values[-1]
    assert values[-1] <= choice.weyl[1] * (1 + 1e-9)
    assert choice.trace == pytest.approx(values.sum(), rel=1e-9)


@pytest.mark.parametrize(
    "subsets", ["single", "layers", "types", "all", "greedy", {"first": ["*layer.0.*"], "all": "*"}]
)
def test_rankings(job, subsets):
    *_, y, y_held, gram, factors = job
    found = rank_subsets(gram, y, subsets, recipe=RECIPE, factors=factors, eval_targets=y_held, rank=2, repeats=1)
    losses = [c.outcome.eval_loss[0] for c in found.choices]
    assert losses == sorted(losses)
    expected = {"single": 9, "layers": 3, "types": 3, "all": 49}
    if isinstance(subsets, str) and subsets in expected:
        assert len(found.choices) == expected[subsets]
    rows = found.table()
    assert len(rows) == len(found.choices) + 2
    assert {len(row) for row in rows} == {7}
    every = {c.name: c.outcome.eval_loss[0] for c in found.choices}
    if subsets == "greedy":
        singles = rank_subsets(None, y, "all", recipe=RECIPE, factors=factors, eval_targets=y_held, rank=2, repeats=1)
        assert min(every.values()) <= max(c.outcome.eval_loss[0] for c in singles.choices)


def test_order_of_modules_and_a_gram_beside_the_factors_change_no_forecast(job):
    *_, y, y_held, gram, factors = job
    names = list(factors.maps)
    told = [
        rank_subsets(g, y, {"set": order}, recipe=RECIPE, factors=factors, eval_targets=y_held, rank=2)
        .choices[0]
        .outcome
        for g, order in ((None, names), (None, names[::-1]), (gram, names))
    ]
    assert told[1:] == told[:1] * 2


def test_a_subset_that_diverges_is_named(job):
    *_, y, y_held, _, factors = job
    with pytest.raises(NonFinite, match="subset '.+': rehearse: the loss is not finite"):
        rank_subsets(
            None, y, "types", recipe=Recipe(1e30, epochs=3, batch_size=4), factors=factors, eval_targets=y_held
        )


def test_classes_are_aligned_as_classes_not_as_numbers():
    model, classes = tiny_model("bert", 3), np.array([0, 1, 2, 0, 1, 2])
    inputs, held = tiny_inputs(model, [4, 9, 6, 3, 7, 5], 10), tiny_inputs(model, [5, 3, 6], 10, seed=1)
    gram = ntk.compute_gram(model, inputs, eval_inputs=held, params=PARAMS[:1], per_module=True, check=False)
    found = []
    for named in (classes, (classes + 1) % 3, np.eye(3)[classes]):
        ranked = rank_subsets(
            gram, named, "types", recipe={"learning_rate": 1e-3, "loss": "cross-entropy"}, eval_targets=classes[:3]
        )
        found.append(ranked.choices[0].alignment)
    assert found == pytest.approx([found[0]] * 3, rel=1e-12)


def test_the_best_is_a_lora_config(job):
    *_, y, y_held, _, factors = job
    found = rank_subsets(None, y, "layers", recipe=RECIPE, factors=factors, eval_targets=y_held, rank=2, repeats=1)
    best = found.choices[0]
    assert best.condition is None
    adapted = peft.get_peft_model(tiny_model("bert", 1), peft.LoraConfig(**{**found.peft(), "lora_alpha": 4}))
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == best.parameters


def test_what_cannot_be_ranked_is_refused(job):
    model, inputs, _, y, y_held, gram, factors = job
    with pytest.raises(InputError, match="expected a Gram with per_module, or factors"):
        rank_subsets(None, y, recipe=RECIPE)
    whole = ntk.compute_gram(model, inputs, params=PARAMS, check=False)
    with pytest.raises(InputError, match="per_module=True"):
        rank_subsets(whole, y, recipe=RECIPE)
    fold = np.arange(12) % 2
    for given, fold_of, match in (
        ([factors, factors], None, "fold: expected the fold of each example"),
        (factors, fold, "factors: expected one for each fold"),
        (None, fold, "factors: expected one for each fold"),
    ):
        with pytest.raises(InputError, match=match):
            rank_subsets(gram, y, recipe=RECIPE, factors=given, fold=fold_of)
    with pytest.raises(InputError, match="eval_targets: expected held-out examples"):
        rank_subsets(None, y, recipe=RECIPE, factors=factors)
    with pytest.raises(InputError, match="subsets: expected single"):
        rank_subsets(gram, y, "best", recipe=RECIPE)
    with pytest.raises(InputError, match="matches no linear map"):
        rank_subsets(gram, y, {"x": ["*nothing*"]}, recipe=RECIPE)
    for given in (3, [3]):
        with pytest.raises(InputError, match="subsets 'x': expected names or globs"):
            rank_subsets(gram, y, {"x": given}, recipe=RECIPE)
    for size in (0, -1, "2"):
        with pytest.raises(InputError, match="size: expected an integer >= 1"):
            rank_subsets(gram, y, "greedy", recipe=RECIPE, eval_targets=y_held, size=size)
    each = ntk.compute_gram(model, inputs, params=PARAMS, per_module=True, contraction="per-output", check=False)
    with pytest.raises(InputError, match="contraction 'trace' or 'full', got 'per-output'"):
        rank_subsets(each, y, recipe=RECIPE, factors=factors, eval_targets=y_held)
    alone = ntk.compute_gram(model, inputs, params=PARAMS, per_module=True, check=False)
    with pytest.raises(InputError, match="cross Grams by module"):
        rank_subsets(alone, y, recipe=RECIPE, eval_targets=y_held)


def test_kernels_of_another_inner_product_are_refused(job):
    model, inputs, held, y, y_held, _, factors = job
    gram = ntk.compute_gram(
        model, inputs, eval_inputs=held, params=PARAMS, per_module=True, eval_targets=y_held, transform="sign"
    )
    for given in (None, factors):
        with pytest.raises(InputError, match="gram: expected the plain inner product, transform 'sgd', got 'sign'"):
            rank_subsets(gram, y, "types", recipe=RECIPE, factors=given, eval_targets=y_held)
    with pytest.raises(InputError, match=r"gram: expected the plain inner product .* got 'sign'"):
        ntk.forecast(gram, y, recipe=RECIPE)


@pytest.mark.parametrize("rehearsed", [False, True])
def test_the_start_is_where_training_that_does_nothing_ends(job, rehearsed):
    *_, y, y_held, gram, factors = job
    still = replace(RECIPE, learning_rate=1e-14)
    given = factors if rehearsed else None
    found = rank_subsets(gram, y, "types", recipe=still, factors=given, eval_targets=y_held, repeats=1)
    end = found.choices[0].outcome
    assert found.start.eval_loss == pytest.approx(end.eval_loss, rel=1e-6)
    assert found.start.eval_accuracy == pytest.approx(end.eval_accuracy, rel=1e-6)
    assert found.start.train_loss == pytest.approx(end.train_loss, rel=1e-6)
    assert found.table()[-1][:2] == ("before training", "0")
    assert found.to_dict()["start"]["eval_loss"] == list(found.start.eval_loss)


def test_training_that_makes_the_model_worse_is_told_first(job):
    *_, y, y_held, gram, factors = job
    worse = []
    for sign in (-1.0, 1.0):  # what training gains on one of them it loses on the other, and half its square besides
        held = gram.eval_outputs + sign * y_held
        found = rank_subsets(None, y, {"all": "*"}, recipe=RECIPE, factors=factors, eval_targets=held, repeats=1)
        (end, low, high), start = found.choices[0].outcome.eval_loss, found.start.eval_loss[0]
        first = found.assumptions[0]
        assert start == pytest.approx(0.5)
        worse.append(end >= start)
        assert first.startswith("No candidate is forecast to do better than the model before") is worse[-1]
        assert ("not told apart from no training" in first) is (end < start <= high)
        assert "(0.5)" in first or start > high > low
    assert any(worse)


def test_progress_counts_the_work_of_each_subset(job):
    *_, y, y_held, gram, factors = job
    call = {"recipe": RECIPE, "factors": factors, "eval_targets": y_held, "repeats": 1}
    seen = []
    found = rank_subsets(None, y, "types", **call, progress=lambda *now: seen.append(now))
    total = seen[0][1]
    assert [done for done, *_ in seen] == sorted(done for done, *_ in seen)
    assert [stage for *_, stage in seen] == [f"rehearsing {i} of 3" for i in (1, 2, 3)] + ["done"]
    assert (seen[0][0], seen[-1][0]) == (0.0, total)
    tokens = sum(range(3, 15))
    most = 6.0 * sum(c.parameters for c in found.choices) * tokens * RECIPE.epochs
    assert 0.5 * most < total < most  # of the last queries the first token counts alone
    seen.clear()
    rank_subsets(None, y, "greedy", **call, size=1, progress=lambda *now: seen.append(now))
    assert all(stage.startswith("rehearsing ") and total <= 1 for _, total, stage in seen)
    with pytest.raises(InputError, match="progress: expected a function"):
        rank_subsets(None, y, "types", **call, progress=3)


def test_a_bound_knows_the_noise_of_its_kernels(job):
    *_, y, y_held, gram, _ = job
    found = rank_subsets(gram, y, "types", recipe=RECIPE, eval_targets=y_held)
    noisy = rank_subsets(
        replace(gram, noise=10 * float(np.trace(gram.values))), y, "types", recipe=RECIPE, eval_targets=y_held
    )
    for one, other in zip(found.choices, noisy.choices, strict=True):
        assert other.weyl[0] == 0.0 <= one.weyl[0]
        assert one.weyl[1] < other.weyl[1]
    assert all(row[-1] == "∞" for row in noisy.table()[1:-1])


def test_numbers_that_are_no_classes_have_no_accuracy(job):
    *_, gram, factors = job
    y, y_held = np.linspace(1.5, 5.0, 12)[:, None], np.linspace(2.0, 4.0, 8)[:, None]
    for given in (None, factors):
        found = rank_subsets(gram, y, "types", recipe=RECIPE, factors=given, eval_targets=y_held)
        assert all(c.outcome.eval_accuracy is None and c.outcome.eval_loss is not None for c in found.choices)
        assert found.table()[1][3] == ""
    rows = dict(ntk.forecast(gram, y, eval_targets=y_held, recipe=RECIPE).table())
    assert "eval loss after it (90%)" in rows
    assert "eval accuracy after it (90%)" not in rows


@pytest.mark.parametrize(("p", "count"), [(0.95, 20), (0.98, 50), (0.7, 100)])
def test_an_interval_of_hits_covers_the_next_draw(p, count):
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        hit = rng.random((1, count)) < p
        _, low, high = outcome(np.ones((1, 3)), np.ones((1, count)), hit, 0.0).eval_accuracy
        covered += low - 1e-12 <= (rng.random(count) < p).mean() <= high + 1e-12
    assert covered > 860


def share_covered(repeats, examples, between, own, draws):
    """Return how often the interval of R repeats holds the next run's mean over as many other examples."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(draws):
        runs = 1000.0 + between * rng.standard_normal((repeats + 1, 1))
        seen, later = rng.standard_normal((2, examples))
        losses = runs[:-1] + seen + own * rng.standard_normal((repeats, examples))
        _, low, high = outcome(losses, losses, None, 0.0).eval_loss
        covered += low <= runs[-1, 0] + (later + own * rng.standard_normal(examples)).mean() <= high
    return covered / draws


@pytest.mark.parametrize("repeats", [1, 2, 3, 4, 8])
def test_an_interval_of_few_repeats_covers_the_next_run(repeats):
    # Between runs no, some, as much, or nearly all of the variance; one run alone cannot tell.
    if repeats == 1:
        for examples in (2, 3, 5, 10, 50):
            assert share_covered(1, examples, 0.0, 0.3, 3000) > 0.88, examples
        return
    for examples, between in ((20, 0.0), (100, 0.07), (50, 0.2), (100, 0.45), (5, 2.0), (50, 30.0)):
        assert share_covered(repeats, examples, between, 0.3, 1500) > 0.88, (examples, between)


SKEWED = {
    "squared, about the target": lambda rng, n: 0.5 * rng.standard_normal((1, n)) ** 2,
    "squared, short of the target": lambda rng, n: 0.5 * (0.7 + 0.5 * rng.standard_normal((1, n))) ** 2,
    "cross-entropy": lambda rng, n: np.log1p(np.exp(-2 - 2 * rng.standard_normal((1, n)))),
}


@pytest.mark.parametrize("kind", SKEWED)
def test_an_interval_of_few_losses_covers_the_next_draw(kind):
    rng, draw = np.random.default_rng(0), SKEWED[kind]
    for count in (5, 10, 20):
        covered = 0
        for _ in range(2000):
            losses = draw(rng, count)
            _, low, high = outcome(losses, losses, None, 0.0).eval_loss
            covered += low <= draw(rng, count).mean() <= high
        assert covered > 1780, count


def test_one_repeat_says_nothing_of_chance():
    losses = np.random.default_rng(0).random((1, 40))
    found = outcome(losses, losses, None, 0.5)
    mean, t, model = losses.mean(), student.ppf(0.95, 39), 1.6448536 * 0.06 * 0.5
    drawn = np.sqrt(2 * losses.var(ddof=1) / 40) * t
    skewness = max(0.0, ((losses - mean) ** 3).mean()) / losses.var(ddof=1) * (1 + 2 * t**2) / 240
    above = mean * np.expm1((drawn + skewness) / mean)
    assert found.eval_loss[1] == pytest.approx(mean - np.hypot(drawn, model), rel=1e-6)
    assert found.eval_loss[2] == pytest.approx(mean + np.hypot(above, model), rel=1e-6)
    assert found.chance == 0.0


def test_kernels_of_more_than_weights_are_refused(job):
    model, inputs, held, y, y_held, *_ = job
    call = {"eval_inputs": held, "per_module": True, "eval_targets": y_held, "check": False}
    gram = ntk.compute_gram(model, inputs, params=["*.layer.*"], **call)
    with pytest.raises(InputError, match=r"gram: expected weights alone, bert\..* has others; compute it with params="):
        rank_subsets(gram, y, "types", recipe=RECIPE, eval_targets=y_held)
    adapted = peft.get_peft_model(tiny_model("bert", 1), peft.LoraConfig(r=2, target_modules=["query"]))
    gram = ntk.compute_gram(adapted, inputs, params="*lora_B*", **call)
    with pytest.raises(InputError, match=r"before adapters are put on, .*lora_B.default.weight is an adapter's"):
        rank_subsets(gram, y, "types", recipe=RECIPE, eval_targets=y_held)
