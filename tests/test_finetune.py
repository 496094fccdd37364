"""Fine-tuning by a recipe: each step against a loop written by hand, the linear run against its closed form."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import ntkengine as ntk
from tests.brute import tiny_inputs, tiny_model, with_lora
from tests.test_linearize import TARGETS, rounding

LENGTHS = [5, 9, 3, 7, 4, 6]
N = len(LENGTHS)


def lora(kind="bert", outputs=2, dtype=torch.float64):
    model = with_lora(tiny_model(kind, outputs), TARGETS[kind], away_from_start=True).to(dtype)
    return model, tiny_inputs(model, LENGTHS, 9)


def goals(outputs=2, seed=0):
    return np.random.default_rng(seed).choice([-1.0, 1.0], size=(N, outputs))


def trained(model):
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def objective(f, y, loss):
    if loss == "squared":
        return 0.5 * (f - torch.as_tensor(y)).square().sum(1).mean()
    labels = torch.as_tensor(y)[:, 0] > 0 if f.shape[1] == 1 else torch.as_tensor(y).argmax(1)
    if f.shape[1] == 1:
        return functional.softplus(torch.where(labels, -f[:, 0], f[:, 0])).mean()
    return -functional.log_softmax(f, 1)[torch.arange(len(f)), labels].mean()


def by_hand(model, inputs, y, recipe):
    """Train with torch.optim alone; return the losses before each step and whether the penalty was on."""
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in parameters]
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=recipe.learning_rate, momentum=recipe.momentum)
    else:
        optimizer = torch.optim.Adam(parameters, lr=recipe.learning_rate, betas=recipe.betas, eps=recipe.eps)
    steps = recipe.steps(N)
    losses, on = [], []
    for k, rows in enumerate(recipe.batches(N)):
        optimizer.zero_grad()
        out = model(**{name: v[rows] for name, v in inputs.items()}).logits
        loss = objective(out, y[rows], recipe.loss)
        loss.backward()
        moved = [p.detach() - s for p, s in zip(parameters, start, strict=True)]
        pull = sum((p.grad * m).sum() for p, m in zip(parameters, moved, strict=True))
        on.append(not recipe.selective or float(pull) >= 0)
        if on[-1]:
            for p, m in zip(parameters, moved, strict=True):
                p.grad += recipe.proximal * m
        if recipe.schedule == "linear":
            optimizer.param_groups[0]["lr"] = recipe.learning_rate * (1 - k / steps)
        optimizer.step()
        losses.append(loss.item())
    optimizer.zero_grad()
    return losses, on


RECIPES = {
    "sgd": {"optimizer": "sgd", "learning_rate": 0.1},
    "momentum": {"optimizer": "sgd", "learning_rate": 0.05, "momentum": 0.9, "schedule": "linear"},
    "adam": {"learning_rate": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6},
    "linear": {"learning_rate": 1e-2, "schedule": "linear"},
    "proximal": {"optimizer": "sgd", "learning_rate": 0.1, "proximal": 2.0},
    "cross-entropy": {"learning_rate": 1e-2, "loss": "cross-entropy"},
}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("name", RECIPES)
def test_training_is_the_loop_written_by_hand(name, kind):
    recipe = ntk.Recipe(**RECIPES[name], epochs=3, batch_size=4)
    y = goals() if recipe.loss == "squared" else goals(1) * [1, -1]  # a class a row
    truth, inputs = lora(kind)
    losses, _ = by_hand(truth, inputs, y, recipe)
    model, inputs = lora(kind)
    start = trained(model)
    run = ntk.fine_tune(model, inputs, y, recipe)
    assert float((flat(trained(model)) - flat(start)).norm()) > 1e-3
    assert torch.allclose(flat(trained(model)), flat(trained(truth)), rtol=1e-9, atol=1e-12)
    assert np.allclose(run.batch_losses, losses, rtol=1e-9)
    assert run.history[-1].displacement == pytest.approx(float((flat(trained(model)) - flat(start)).norm()), rel=1e-9)


def test_cross_entropy_of_one_output_is_the_logistic_loss():
    recipe = ntk.Recipe(learning_rate=1e-2, loss="cross-entropy", epochs=2, batch_size=4)
    y = goals(1)
    truth, inputs = lora(outputs=1)
    losses, _ = by_hand(truth, inputs, y, recipe)
    model, _ = lora(outputs=1)
    run = ntk.fine_tune(model, inputs, (y[:, 0] > 0).astype(int), recipe)
    assert np.allclose(run.batch_losses, losses, rtol=1e-9)
    assert torch.allclose(flat(trained(model)), flat(trained(truth)), rtol=1e-9, atol=1e-12)


def test_selective_penalty_is_on_only_where_the_loss_pulls_back():
    recipe = ntk.Recipe(
        learning_rate=0.5, optimizer="sgd", proximal=0.5, selective=True, epochs=12, batch_size=2, seed=1
    )
    y = goals()
    truth, inputs = lora()
    losses, on = by_hand(truth, inputs, y, recipe)
    assert True in on[1:]
    assert False in on[1:]
    model, _ = lora()
    run = ntk.fine_tune(model, inputs, y, recipe)
    assert np.allclose(run.batch_losses, losses, rtol=1e-8)
    assert torch.allclose(flat(trained(model)), flat(trained(truth)), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", TARGETS)
def test_linear_run_is_the_closed_form_of_gradient_descent(kind):
    model, inputs = lora(kind)
    y = goals()
    gram = ntk.compute_gram(model, inputs, contraction="full", precision="exact")
    K, f0 = np.asarray(gram), gram.outputs.reshape(-1)
    rate, steps = 0.5 * N / np.linalg.eigvalsh(K)[-1], 17
    run = ntk.fine_tune(model, inputs, y, learning_rate=rate, optimizer="sgd", epochs=steps, batch_size=0, linear=True)
    close = max(1e-8, rounding(kind))
    residual = np.linalg.matrix_power(np.eye(len(K)) - rate * K / N, steps) @ (y.reshape(-1) - f0)
    loss = 0.5 * (residual**2).sum() / N
    assert run.history[-1].linear_train_loss == pytest.approx(loss, rel=close)
    moved = np.linalg.solve(K, y.reshape(-1) - f0 - residual)
    assert run.history[-1].linear_displacement == pytest.approx(np.sqrt(moved @ K @ moved), rel=1e-6)
    gap = np.linalg.norm(run.outputs.reshape(-1) - (y.reshape(-1) - residual))
    assert run.history[-1].gap == pytest.approx(gap, rel=close)
    away = np.linalg.norm(run.outputs.reshape(-1) - f0)
    assert run.history[-1].relative_gap == pytest.approx(gap / away, rel=close)


def test_proximal_linear_run_is_its_closed_form():
    model, inputs = lora()
    y, proximal = goals(), 3.0
    gram = ntk.compute_gram(model, inputs, contraction="full", precision="exact")
    K, f0 = np.asarray(gram), gram.outputs.reshape(-1)
    rate, steps = 0.3 / (np.linalg.eigvalsh(K)[-1] / N + proximal), 11
    run = ntk.fine_tune(
        model,
        inputs,
        y,
        learning_rate=rate,
        optimizer="sgd",
        epochs=steps,
        batch_size=0,
        linear=True,
        proximal=proximal,
    )
    dual = np.zeros(len(K))  # δ = Jᵀ dual
    for _ in range(steps):
        dual = (1 - rate * proximal) * dual - rate / N * (f0 + K @ dual - y.reshape(-1))
    assert run.history[-1].linear_displacement == pytest.approx(np.sqrt(dual @ K @ dual), rel=1e-9)
    loss = 0.5 * ((f0 + K @ dual - y.reshape(-1)) ** 2).sum() / N
    assert run.history[-1].linear_train_loss == pytest.approx(loss, rel=1e-9)


def test_linear_run_beside_it_does_not_touch_the_model():
    recipe = ntk.Recipe(learning_rate=1e-2, epochs=2, batch_size=4)
    y = goals()
    found = []
    for linear in (False, True):
        model, inputs = lora()
        ntk.fine_tune(model, inputs, y, recipe, linear=linear)
        found.append(flat(trained(model)))
    assert torch.equal(*found)


def test_small_steps_stay_linear():
    model, inputs = lora()
    run = ntk.fine_tune(model, inputs, goals(), learning_rate=1e-5, epochs=2, linear=True)
    last = run.history[-1]
    assert 0 < last.relative_gap < 1e-3
    assert last.divergence < 1e-8
    assert last.linear_displacement == pytest.approx(last.displacement, rel=1e-2)


def test_measurements():
    model, inputs = lora()
    y, y_eval = (np.where(given[:, :1] > 0, [1, -2], [-1, 2]) for given in (goals(), goals(seed=1)))  # a class a row
    f0 = model.eval()(**inputs).logits.detach().numpy()
    told = []
    run = ntk.fine_tune(
        model,
        inputs,
        y,
        learning_rate=1e-2,
        epochs=2,
        batch_size=4,
        linear=True,
        eval_inputs=inputs,
        eval_targets=y_eval,
        measure_every=3,
        progress=lambda *given: told.append(given),
    )
    assert [m.step for m in run.history] == [0, 3, 4]
    assert [m.epoch for m in run.history] == [0, pytest.approx(10 / 6), 2]
    assert [m.time for m in run.history] == pytest.approx([0, 0.03, 0.04])
    assert told == [(k, 4, "fine-tuning") for k in (1, 2, 3, 4)]
    first, last = run.history[0], run.history[-1]
    assert first.train_loss == pytest.approx(0.5 * ((f0 - y) ** 2).sum(1).mean(), rel=1e-10)
    assert first.eval_accuracy == (f0.argmax(1) == y_eval.argmax(1)).mean()
    assert (first.displacement, first.relative_gap) == (0, None)
    assert first.gap < 1e-14 * N  # attention runs in plain products in the one, fused in the other
    f = model(**inputs).logits.detach()
    assert np.allclose(run.outputs, f.numpy(), rtol=1e-10)
    assert last.eval_loss == pytest.approx(0.5 * ((f.numpy() - y_eval) ** 2).sum(1).mean(), rel=1e-10)
    assert last.eval_gap == pytest.approx(last.gap, rel=1e-10)
    assert last.eval_relative_gap == pytest.approx(last.relative_gap, rel=1e-10)
    table = run.table()
    assert len(table) == 4
    assert {len(row) for row in table} == {19}
    assert json.loads(json.dumps(run.to_dict()))["history"][1]["step"] == 3


def test_values_to_be_met_have_no_accuracy():
    model, inputs = lora(outputs=1)
    for y, told in ((np.linspace(-1.0, 2.0, N), False), (np.where(np.arange(N) % 2, 1.0, -1.0), True)):
        run = ntk.fine_tune(model, inputs, y, learning_rate=1e-3, epochs=1, eval_inputs=inputs, eval_targets=y)
        assert all((m.train_accuracy is not None) is (m.eval_accuracy is not None) is told for m in run.history)
        assert ("train_accuracy" in run.table()[0]) is told


def test_divergence_is_kl_between_the_two_models():
    model, inputs = lora(outputs=1)
    linear = ntk.linearize(model)
    run = ntk.fine_tune(
        model, inputs, goals(1), learning_rate=0.05, epochs=1, batch_size=0, optimizer="sgd", linear=True
    )
    rate = 0.05
    truth, _ = lora(outputs=1)
    f = truth(**inputs).logits
    grads = torch.autograd.grad(objective(f, goals(1), "squared"), [p for p in truth.parameters() if p.requires_grad])
    with torch.no_grad():
        for d, g in zip(linear.displacement, grads, strict=True):
            d.copy_(-rate * g)
        # the parameters moved, which the expansion's origin does not follow
        p, q = torch.sigmoid(torch.from_numpy(run.outputs)), torch.sigmoid(linear(inputs))
    kl = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    assert run.history[-1].divergence == pytest.approx(float(kl), rel=1e-6)


def test_every_epoch_takes_each_example_once():
    recipe = ntk.Recipe(learning_rate=1.0, epochs=3, batch_size=4, seed=5)
    rows = list(recipe.batches(10))
    assert [len(r) for r in rows] == [4, 4, 2] * 3
    epochs = np.concatenate(rows).reshape(3, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert (epochs[0] != epochs[1]).any()
    assert recipe.steps(10) == 9
    assert len(list(ntk.Recipe(learning_rate=1.0, batch_size=0, epochs=2).batches(10))) == 2


def test_dropout_does_not_make_runs_differ():
    found = []
    for seed in (0, 1):
        model, inputs = lora()
        torch.manual_seed(seed)
        run = ntk.fine_tune(model.train(), inputs, goals(), learning_rate=1e-2, batch_size=4, linear=True)
        assert any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
        found.append((run.history, flat(trained(model))))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
