"""LoRA rehearsed on kept factors: against the same adapters on brute-force gradients, and against real fine-tuning."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch

import ntkengine as ntk
from ntkengine.errors import InputError, NonFinite
from ntkengine.finetune import fine_tune
from ntkengine.forecast.crossed import rehearse_folds
from ntkengine.forecast.lora import _Run, rehearse
from ntkengine.gram.linear import tangent_factors
from ntkengine.losses import losses
from ntkengine.recipe import Recipe
from tests.brute import gradients, tiny_inputs, tiny_model, with_lora
from tests.test_linearize import Tied

LENGTHS, HELD = [4, 9, 6, 3, 7, 5], [5, 3, 6]
MAPS = {
    "bert": ["*query.weight", "*output.dense.weight"],
    "roberta": ["*value.weight"],
    "llama": ["*q_proj.weight", "*down_proj.weight"],
    "gpt2": ["*c_attn.weight"],
}


def problem(kind: str, outputs: int):
    model = tiny_model(kind, outputs)
    inputs, held = tiny_inputs(model, LENGTHS, 10), tiny_inputs(model, HELD, 10, seed=1)
    rng = np.random.default_rng(0)
    return model, inputs, held, rng.standard_normal((len(LENGTHS), outputs)), rng.standard_normal((len(HELD), outputs))


@pytest.mark.parametrize("kind", MAPS)
def test_factors_are_the_gradients(kind):
    model, inputs, held, *_ = problem(kind, 2)
    told: list[tuple[float, float, str]] = []
    factors = tangent_factors(model, inputs, held, params=MAPS[kind], progress=lambda *found: told.append(found))
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert 1 < told[0][0] <= told[-1][0] == told[-1][1]
    assert factors.train == len(LENGTHS)
    for name, found in factors.maps.items():
        truth = np.concatenate([gradients(model, x, [f"{name}.weight"]) for x in (inputs, held)])
        for i, (a, b) in enumerate(zip(found.starts[:-1], found.starts[1:], strict=True)):
            G = torch.einsum("zcr,zi->cri", found.gradients[a:b].double(), found.inputs[a:b].double())
            G = G.transpose(1, 2) if kind == "gpt2" else G  # its weights are stored (in, out)
            np.testing.assert_allclose(G.reshape(2, -1), truth[i], rtol=1e-4, atol=1e-5 * np.abs(truth).max())
    if kind == "bert":  # query and key of a layer read the same inputs, which are kept once
        both = tangent_factors(model, inputs, held, params=["*query.weight", "*key.weight"])
        parts = [both.maps[f"bert.encoder.layer.1.attention.self.{name}"] for name in ("query", "key")]
        assert parts[0].inputs.data_ptr() == parts[1].inputs.data_ptr()
        every = sum(m.inputs.nbytes + m.gradients.nbytes for m in both.maps.values())
        assert both.nbytes == every - 2 * parts[0].inputs.nbytes  # in the last layer queries matter at one token alone


@pytest.mark.parametrize(("optimizer", "loss", "outputs"), [("adam", "squared", 1), ("sgd", "cross-entropy", 3)])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_equals_adapters_on_brute_force_gradients(kind, optimizer, loss, outputs):
    model, inputs, held, y, y_held = problem(kind, outputs)
    rate = 0.2 if optimizer == "adam" else 20.0
    recipe = Recipe(rate, epochs=4, batch_size=4, optimizer=optimizer, loss=loss, proximal=0.002, seed=3)
    factors = tangent_factors(model, inputs, held, params=MAPS[kind])
    found = rehearse(factors, y, recipe, rank=2, alpha=3.0, eval_targets=y_held, seed=7)

    shapes = {n: model.get_submodule(n).weight.shape for n in factors.maps}
    J = {n: torch.from_numpy(gradients(model, inputs, [f"{n}.weight"])) for n in shapes}
    X = {n: torch.from_numpy(gradients(model, held, [f"{n}.weight"])) for n in shapes}
    f0 = torch.from_numpy(factors.outputs)
    start = _Run(factors, list(shapes), 2, 1.5, recipe, f0, 7)
    A = [a.detach().double().requires_grad_() for a in start.A]
    B = [torch.zeros(s[0], 2, dtype=torch.float64, requires_grad=True) for s in shapes.values()]
    origin = [p.detach().clone() for p in (*A, *B)]

    def f(gradients_of, base, rows):
        delta = [1.5 * (b @ a).reshape(-1) for a, b in zip(A, B, strict=True)]
        return base[rows] + sum(G[rows] @ d for G, d in zip(gradients_of.values(), delta, strict=True))

    targets = torch.from_numpy(y) if loss == "squared" else torch.from_numpy(y).argmax(1)
    parameters = [*A, *B]
    stepper = torch.optim.Adam(parameters, lr=rate) if optimizer == "adam" else torch.optim.SGD(parameters, lr=rate)
    for rows in recipe.batches(len(y)):
        value = losses(f(J, f0, rows), targets[torch.from_numpy(rows)], loss).mean()
        value = value + 0.001 * sum(((p - o) ** 2).sum() for p, o in zip(parameters, origin, strict=True))
        stepper.zero_grad()
        value.backward()
        stepper.step()
    train = losses(f(J, f0, np.arange(len(y))), targets, loss)
    np.testing.assert_allclose(found.train_losses[0], train.detach().numpy(), rtol=2e-4, atol=1e-5)
    moved = f(X, f0[len(y) :], np.arange(len(y_held))).detach()
    held_targets = torch.from_numpy(y_held) if loss == "squared" else torch.from_numpy(y_held).argmax(1)
    np.testing.assert_allclose(found.eval_losses[0], losses(moved, held_targets, loss).numpy(), rtol=2e-4, atol=1e-5)
    assert float((moved - f0[len(y) :]).abs().max()) > 0.05
    distance = sum(float(((p.detach() - o) ** 2).sum()) for p, o in zip(parameters, origin, strict=True)) ** 0.5
    np.testing.assert_allclose(found.displacement[0], distance, rtol=1e-4)
    assert found.parameters == sum(p.numel() for p in parameters)


def test_small_training_is_forecast_exactly():
    """While ΔW is small the network is linear in it, and the real run ends where the rehearsal does."""
    model, inputs, held, y, y_held = problem("bert", 1)
    model = model.double()
    factors = tangent_factors(model.float(), inputs, held, params=["*query.weight"])
    errors, moves = [], []
    for rate in (300.0, 30.0):
        recipe = Recipe(rate, epochs=2, batch_size=3, optimizer="sgd")
        base = tiny_model("bert", 1).double()
        adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["query"]))
        run = _Run(factors, list(factors.maps), 2, 2.0, recipe, torch.from_numpy(factors.outputs), 7)
        with torch.no_grad():
            for name, a in zip(factors.maps, run.A, strict=True):
                adapted.get_submodule(f"base_model.model.{name}.lora_A.default").weight.copy_(a)
        real = fine_tune(adapted, inputs, y, recipe, eval_inputs=held, eval_targets=y_held)
        run.trained(np.arange(len(y)), torch.from_numpy(y), 0)
        f = run.outputs(np.arange(len(y))).numpy()
        errors.append(np.abs(f - real.outputs).max())
        moves.append(np.abs(real.outputs - factors.outputs[: len(y)]).max())
    assert errors[0] < 0.1 * moves[0]
    assert errors[1] < 1e-2 * moves[1]


def test_folds_and_other_starts():
    model, inputs, held, y, _ = problem("bert", 1)
    factors = tangent_factors(model, inputs, held, params=["*key.weight"])
    other = factors.outputs + 1.0
    rows, left = np.array([0, 2, 4]), np.array([1, 3, 5])
    recipe = Recipe(1e-3, epochs=2)
    found = rehearse(factors, y[rows], recipe, rows=rows, eval_rows=left, eval_targets=y[left], offset=other, repeats=2)
    assert found.eval_losses.shape == (2, 3)
    assert found.outcome.chance >= 0
    low, value, high = (found.outcome.eval_loss[i] for i in (1, 0, 2))
    assert low <= value <= high
    again = rehearse(factors, y[rows], recipe, rows=rows, eval_rows=left, eval_targets=y[left], offset=other, repeats=2)
    np.testing.assert_array_equal(found.eval_losses, again.eval_losses)
    assert not np.array_equal(found.eval_losses[0], found.eval_losses[1])


def test_folds_are_scored_by_runs_that_did_not_see_them():
    model, inputs, _, y, _ = problem("bert", 1)
    fit = ntk.fit_head(model, inputs, y, ridge=1.0, folds=3)
    parts = []
    for k in range(3):
        fit.write(model, k)
        parts.append(tangent_factors(model, inputs, params=["*key.weight"]))
    recipe = Recipe(1e-3, epochs=2, batch_size=2)
    found = rehearse_folds(parts, fit.fold, y, recipe, rank=2, repeats=2)
    assert found.eval_losses.shape == (2, len(y))
    rest, left = np.flatnonzero(fit.fold != 1), np.flatnonzero(fit.fold == 1)
    own = rehearse(
        parts[1], y[rest], recipe, rank=2, repeats=2, rows=rest, eval_rows=left, eval_targets=y[left]
    )  # fmt: skip
    np.testing.assert_array_equal(found.eval_losses[:, left], own.eval_losses)
    # The start each example is scored from is its held-out head's.
    np.testing.assert_allclose(parts[1].outputs[left], fit.held_out[left], rtol=1e-4, atol=1e-5)
    other = y.copy()
    other[left[0]] += 5.0  # what is scored in fold 1 is trained on in the others only
    again = rehearse_folds(parts, fit.fold, other, recipe, rank=2, repeats=2)
    np.testing.assert_array_equal(again.eval_losses[:, left[1:]], found.eval_losses[:, left[1:]])
    assert not np.array_equal(again.eval_losses, found.eval_losses)
    with pytest.raises(InputError, match="fold: expected 6 numbers"):
        rehearse_folds(parts, fit.fold[:4], y, recipe)


def test_a_weight_that_two_modules_share_is_left_out():
    """An adapter put on one of them would not see what the other does."""
    torch.manual_seed(0)
    model, x = Tied().double(), {"x": torch.randn(6, 4).double()}
    assert list(tangent_factors(model, x, params="all").maps) == ["out"]
    with pytest.raises(InputError, match="params: expected weights of linear maps"):
        tangent_factors(model, x, params="up.weight")
    model, inputs, *_ = problem("bert", 1)
    adapted = with_lora(model, ["query"], away_from_start=True)
    with pytest.raises(InputError, match=r"before adapters are put on, .*lora_A.default.weight is an adapter's"):
        tangent_factors(adapted, inputs, params="trainable")


def test_what_cannot_be_rehearsed_is_refused():
    model, inputs, held, y, y_held = problem("bert", 1)
    factors = tangent_factors(model, inputs, held, params="all")
    assert not any("embeddings" in name or "LayerNorm" in name for name in factors.maps)
    with pytest.raises(InputError, match="modules: expected some of bert"):
        rehearse(factors, y, Recipe(1e-3), ["nothing"])
    other = np.full((9, 1), np.nan)
    for given, match in (
        ({"rank": 0}, "rank: expected an integer from 1 to 1073741824, got 0"),
        ({"rank": 2.5}, "rank: expected an integer from 1 to 1073741824, got 2.5"),
        ({"repeats": "2"}, "repeats: expected an integer >= 1, got '2'"),
        ({"alpha": "x"}, "alpha: expected a number > 0, got 'x'"),
        ({"alpha": float("nan")}, "alpha: expected a number > 0, got nan"),
        ({"modules": [next(iter(factors.maps))] * 2}, "modules: expected each once, got bert.* twice"),
        ({"offset": np.zeros(3)}, r"offset: expected \(9, 1\) finite numbers, got shape \(3,\)"),
        ({"offset": other}, r"offset: expected \(9, 1\) finite numbers"),
        ({"rows": [-1, 0]}, r"rows: expected positions in 0\.\.8, got -1\.\.0"),  # not counted from the end
        ({"rows": [0, 9]}, r"rows: expected positions in 0\.\.8, got 0\.\.9"),
        ({"rows": []}, r"rows: expected a list of whole numbers, got shape \(0,\)"),
        ({"eval_rows": np.arange(9) < 6}, "eval_rows: expected a list of whole numbers, got shape .9,. of bool"),
        ({"recipe": None}, "recipe: expected a Recipe or a mapping of its fields, got NoneType"),
    ):
        with pytest.raises(InputError, match=match):
            rehearse(factors, y, **{"recipe": Recipe(1e-3), **given})
    with pytest.raises(InputError, match="eval_targets: expected factors with eval examples"):
        rehearse(tangent_factors(model, inputs, params="*query.weight"), y, Recipe(1e-3), eval_targets=y_held[:0])
    with pytest.raises(InputError, match=r"eval_targets: expected \(3, 1\)"):
        rehearse(factors, y, Recipe(1e-3), eval_targets=np.zeros(4))
    with pytest.raises(NonFinite, match="not finite at step"):
        rehearse(factors, y, Recipe(1e30, epochs=9, optimizer="sgd"))
    with pytest.raises(NonFinite, match="not finite after the last step"):
        rehearse(factors, y, Recipe(1e30, epochs=2, batch_size=0, optimizer="sgd"))
    with pytest.raises(InputError, match="eps: out of range, got 0.0"):  # A's gradient is 0 at the start: 0/0
        Recipe(1e-3, eps=0.0)
    with pytest.raises(InputError, match="memory_gib: expected room"):
        tangent_factors(model, inputs, held, params="all", memory_gib=1e-6)
    with pytest.raises(InputError, match="params: expected weights of linear maps"):
        tangent_factors(model, inputs, params="*LayerNorm.weight")
    with pytest.raises(AttributeError, match="no attribute"):
        _ = ntk.rehearsal
