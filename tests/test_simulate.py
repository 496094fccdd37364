"""Training simulated on Grams against the linearised model trained, and against plain gradient features."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import ntkengine as ntk
from ntkengine.errors import InputError, NonFinite
from ntkengine.finetune import fine_tune
from ntkengine.forecast.simulate import simulate
from ntkengine.losses import as_targets
from ntkengine.recipe import Recipe
from tests.brute import gradients, tiny_inputs, tiny_model

LENGTHS, HELD = [4, 9, 6, 3, 7, 5, 8], [5, 3, 6]
PARAMS = ["*query.weight", "*intermediate.dense.weight"]


def problem(outputs: int, kind: str = "bert"):
    model = tiny_model(kind, outputs).double()
    inputs, held = tiny_inputs(model, LENGTHS, 10), tiny_inputs(model, HELD, 10, seed=1)
    rng = np.random.default_rng(0)
    return model, inputs, held, rng.standard_normal((len(LENGTHS), outputs)), rng.standard_normal((len(HELD), outputs))


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch_size": 0},
        {"momentum": 0.9, "schedule": "linear"},
        {"proximal": 3.0},
        {"proximal": 30.0, "selective": True},
        {"loss": "cross-entropy"},
    ],
    ids=lambda c: "-".join(map(str, c)) or "plain",
)
def test_sgd_is_the_linearised_model_trained(outputs, changes):
    model, inputs, held, y, y_held = problem(outputs)
    y, y_held = (np.sign(v) if outputs == 1 else 2.0 * (v == v.max(1, keepdims=True)) - 1 for v in (y, y_held))
    recipe = replace(Recipe(0.3, epochs=4, batch_size=3, optimizer="sgd", seed=5), **changes)
    call = {"contraction": "full", "precision": "exact", "check": False}
    gram = ntk.compute_gram(model, inputs, eval_inputs=held, params=PARAMS, **call)
    found = simulate(
        [gram.values], y, recipe, offset=gram.outputs, crosses=[gram.cross], eval_offset=gram.eval_outputs,
        eval_targets=y_held,
    )  # fmt: skip
    run = fine_tune(
        copy.deepcopy(model), inputs, y, recipe, params=PARAMS, eval_inputs=held, eval_targets=y_held, linear=True
    )
    last = run.history[-1]
    start = float(np.mean(np.linalg.norm(gram.outputs, axis=1)))
    assert np.abs(found.outputs - gram.outputs).max() > 1e-2 * start  # it did move
    np.testing.assert_allclose(found.train_losses.mean(), last.linear_train_loss, rtol=1e-9)
    np.testing.assert_allclose(found.eval_losses.mean(), last.linear_eval_loss, rtol=1e-9)
    np.testing.assert_allclose(found.displacement, last.linear_displacement, rtol=1e-8)
    assert found.eval_correct.mean() == last.linear_eval_accuracy
    assert len(found.batch_losses) == recipe.steps(len(LENGTHS))


@pytest.mark.parametrize("proximal", [0.0, 2.0])
def test_adam_has_one_second_moment_a_module(proximal):
    model, inputs, held, y, _ = problem(2)
    recipe = Recipe(0.01, epochs=5, batch_size=2, proximal=proximal, seed=1)
    gram = ntk.compute_gram(
        model, inputs, eval_inputs=held, params=PARAMS, contraction="full", precision="exact", per_module=True
    )
    names = list(gram.modules)
    sizes = [model.get_submodule(n).weight.numel() for n in names]
    found = simulate(
        [gram.modules[n] for n in names], y, recipe, offset=gram.outputs, sizes=sizes,
        crosses=[gram.cross_modules[n] for n in names], eval_offset=gram.eval_outputs,
    )  # fmt: skip
    J = [gradients(model, inputs, [f"{n}.weight"]) for n in names]
    X = [gradients(model, held, [f"{n}.weight"]) for n in names]
    theta = [np.zeros(G.shape[2]) for G in J]
    m, v = [np.zeros_like(t) for t in theta], [0.0 for _ in theta]
    for step, rows in enumerate(recipe.batches(len(y))):
        f = gram.outputs + sum(G @ t for G, t in zip(J, theta, strict=True))
        for i, G in enumerate(J):
            g = np.einsum("ncp,nc->p", G[rows], (f - y)[rows]) / len(rows) + proximal * theta[i]
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * np.mean(g**2)
            theta[i] = theta[i] - 0.01 * m[i] / (1 - 0.9 ** (step + 1)) / (
                np.sqrt(v[i] / (1 - 0.999 ** (step + 1))) + 1e-8
            )
    after = gram.outputs + sum(G @ t for G, t in zip(J, theta, strict=True))
    seen = gram.eval_outputs + sum(G @ t for G, t in zip(X, theta, strict=True))
    np.testing.assert_allclose(found.outputs, after, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(found.eval_outputs, seen, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(found.displacement, np.sqrt(sum((t**2).sum() for t in theta)), rtol=1e-8)


def test_what_cannot_be_simulated_is_refused():
    K, y, f0 = np.eye(4), np.ones(4), np.zeros((4, 1))
    with pytest.raises(InputError, match="sizes: expected the parameters of each of 1 modules"):
        simulate([K], y, {"learning_rate": 1.0}, offset=f0)
    with pytest.raises(InputError, match=r"grams: expected shape \(4, 4\)"):
        simulate([np.eye(3)], y, Recipe(1.0, optimizer="sgd"), offset=f0)
    with pytest.raises(InputError, match="grams: expected at least one"):
        simulate([], y, Recipe(1.0, optimizer="sgd"), offset=f0)
    with pytest.raises(InputError, match=r"targets: expected \(4, 1\)"):
        simulate([K], np.ones(5), Recipe(1.0, optimizer="sgd"), offset=f0)
    with pytest.raises(NonFinite, match="not finite at step"):
        simulate([1e60 * K], y, Recipe(1.0, epochs=9, optimizer="sgd"), offset=f0)
    sgd = Recipe(1.0, optimizer="sgd", batch_size=0)
    held = {"crosses": [np.ones((3, 4))], "eval_offset": np.zeros((3, 1)), "eval_targets": np.ones(3)}
    for grams, given, match in (
        ([K], {"offset": np.zeros(4)}, r"offset: expected \(N, C\) numbers, got shape \(4,\)"),
        ([K], held | {"eval_offset": np.zeros(3)}, r"eval_offset: expected \(M, 1\) numbers, got shape \(3,\)"),
        ([K, K], held, "crosses: expected one for each of 2 grams, got 1"),
        ([K], held | {"eval_offset": None}, "eval_offset: expected together with crosses"),
        ([K], {"eval_targets": np.ones(3)}, "eval_offset: expected together with crosses"),
    ):
        with pytest.raises(InputError, match=match):
            simulate(grams, y, sgd, **{"offset": f0, **given})
    with pytest.raises(InputError, match="grams: expected matrices of one shape"):
        simulate([np.eye(4), np.eye(8)], np.ones((4, 2)), sgd, offset=np.zeros((4, 2)))
    for name, grams, given in (
        ("grams", np.nan * K, {}),
        ("crosses", K, held | {"crosses": [np.full((3, 4), np.nan)]}),
    ):
        with pytest.raises(InputError, match=f"{name}: expected finite numbers"):
            simulate([grams], y, sgd, **{"offset": f0, **given})
    far = Recipe(1e30, epochs=6, optimizer="sgd", loss="cross-entropy", proximal=1e30, batch_size=0)
    with np.errstate(all="ignore"), pytest.raises(NonFinite, match="not finite after the last step"):
        simulate([1e-60 * K], np.array([1.0, -1.0, 1.0, -1.0]), far, offset=f0)


def test_scores_of_one_sign_name_no_classes():
    for y in ([0.1, 0.4, 0.6, 0.9], [1.0, 1.0, 2.0, 2.0]):
        with pytest.raises(InputError, match="targets: expected 0 and 1, or scores of both signs"):
            as_targets("targets", np.array(y), "cross-entropy", 4, 1)
    for y in ([0.0, 1.0, 1.0, 0.0], [-0.3, 2.0, 1.0, -1.0]):
        assert as_targets("targets", np.array(y), "cross-entropy", 4, 1).tolist() == [0, 1, 1, 0]


def test_recipes_are_checked():
    for fields, match in (
        ({"learning_rate": 0.0}, "learning_rate: out of range"),
        ({"learning_rate": float("nan")}, "learning_rate: out of range"),
        ({"learning_rate": 10**400}, "learning_rate: expected a number"),
        (3, "recipe: expected a Recipe or a mapping of its fields, got int"),
        ({"learning_rate": 1.0, "epochs": 0}, "epochs: expected an integer >= 1"),
        ({"learning_rate": 1.0, "optimizer": "lion"}, "optimizer: expected one of adam, sgd"),
        ({"learning_rate": 1.0, "momentum": 0.9}, "momentum: belongs to optimizer 'sgd'"),
        ({"learning_rate": 1.0, "betas": [0.9]}, "betas: expected two numbers"),
        ({"learning_rate": 1.0, "lr": 2.0}, "recipe: no field 'lr'"),
        ({"epochs": 2}, "recipe: needs learning_rate"),
    ):
        with pytest.raises(InputError, match=match):
            Recipe.of(fields)
    given = Recipe(np.float32(0.5), epochs=np.int64(2), batch_size=np.int32(8))
    assert given == Recipe(0.5, epochs=2, batch_size=8)
    assert Recipe.of({"learning_rate": 0.5, "betas": np.array([0.9, 0.99]), "selective": np.False_}) == Recipe(
        0.5, betas=(0.9, 0.99)
    )
    assert [type(x) for x in (given.learning_rate, given.epochs, given.batch_size)] == [float, int, int]


def test_every_example_once_an_epoch():
    recipe = Recipe(1.0, epochs=3, batch_size=4, seed=2)
    rows = list(recipe.batches(10))
    assert len(rows) == recipe.steps(10) == 9
    for epoch in range(3):
        assert sorted(np.concatenate(rows[3 * epoch : 3 * epoch + 3])) == list(range(10))
    assert [Recipe(1.0, schedule="linear", batch_size=5, epochs=2).rate(s, 10) for s in range(4)] == [
        1,
        0.75,
        0.5,
        0.25,
    ]
    assert not np.array_equal(rows[0], next(recipe.batches(10, seed=3)))
    assert torch.equal(torch.as_tensor(rows[0]), torch.as_tensor(next(recipe.batches(10))))
