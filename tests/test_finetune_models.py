"""Fine-tuning as its models find it: left as they were but for what was trained, refused where it would be wrong."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import ntkengine as ntk
from ntkengine.descent import Descent
from tests.test_finetune import N, goals, lora, objective
from tests.test_linearize import Noisy, Tied


@pytest.mark.parametrize("training", [True, False])
def test_model_is_left_as_it_was_but_for_what_was_trained(training):
    model, inputs = lora()
    model.train(training)
    wanted = {n: p.requires_grad for n, p in model.named_parameters()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ntk.fine_tune(model, inputs, goals(), learning_rate=1e-2, params="*lora_B*", linear=True)
    assert model.training is training
    assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted
    assert all(p.grad is None for p in model.parameters())
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == {
        n for n in before if "lora_B" in n
    }


def test_frozen_parameters_can_be_selected_and_shared_ones_train_once():
    torch.manual_seed(0)
    model = Tied().double()
    truth = Tied().double()
    truth.load_state_dict(model.state_dict())
    for p in model.parameters():
        p.requires_grad_(False)
    x, y = torch.randn(N, 4).double(), goals()
    ntk.fine_tune(model, {"x": x}, y, learning_rate=0.1, optimizer="sgd", batch_size=0, params="all", linear=True)
    objective(truth(x), y, "squared").backward()
    assert model.down.weight is model.up.weight
    for p, q in zip(model.parameters(), truth.parameters(), strict=True):
        assert torch.allclose(p, q - 0.1 * q.grad, rtol=1e-10)
        assert not p.requires_grad


class Overflowing(nn.Module):
    """A finite output with a gradient that is not (at w = 0), or no finite output at all."""

    def __init__(self, start):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([start, 1.0]))

    def forward(self, x):
        return x * self.w[0].abs().sqrt() + x * self.w[1] / (self.w[1] - 1.0 if self.w[0] > 1 else 1.0)


@pytest.mark.parametrize(
    ("start", "message"),
    [(0.0, "gradient is not finite, before any training"), (2.0, "are not finite after 0 steps, before any training")],
)
def test_what_is_not_finite_stops_before_anything_changes(start, message):
    model = Overflowing(start)
    before = model.w.detach().clone()
    with pytest.raises(ntk.NonFinite, match=message):
        ntk.fine_tune(model, {"x": torch.ones(N, 1)}, goals(1), learning_rate=1.0)
    assert torch.equal(model.w, before)
    assert model.w.grad is None
    assert model.w.requires_grad


class Clamped(nn.Module):
    """An output that an infinite parameter leaves finite."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x * self.w.clamp(-1.0, 1.0)


@pytest.mark.parametrize(("kind", "message"), [("bert", "outputs"), ("clamped", "parameters")])
def test_diverged_training_gives_back_the_parameters_it_started_with(kind, message):
    model, inputs = lora(dtype=torch.float32) if kind == "bert" else (Clamped(), {"x": torch.full((N, 1), 1e10)})
    before, y = [p.detach().clone() for p in model.parameters()], goals() if kind == "bert" else np.full((N, 1), -1e10)
    with pytest.raises(ntk.NonFinite, match=rf"({message}|loss|gradient) .* a lower learning rate may help"):
        ntk.fine_tune(model, inputs, y, learning_rate=1e30, optimizer="sgd", epochs=5, batch_size=0)
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert not any(m.training for m in model.modules()) or kind == "clamped"


def test_gradients_that_the_caller_accumulates_are_kept():
    model, inputs = lora()
    model(**inputs).logits.sum().backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    ntk.fine_tune(model, inputs, goals(), learning_rate=1e-2)
    assert before
    assert all(torch.equal(p.grad, before[n]) for n, p in model.named_parameters() if n in before)


class Mean(nn.Module):
    """A classifier that averages over all columns, padding too."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(50, 6), nn.Linear(6, 2)
        self.config = {}

    def forward(self, input_ids, attention_mask=None):
        return self.out(torch.tanh(self.embed(input_ids)).mean(1))


def padded(n=24, width=40):
    torch.manual_seed(2)
    lengths = torch.tensor([width, 3, 17, 5] * (n // 4))
    mask = (torch.arange(width) < lengths[:, None]).long()
    return {"input_ids": torch.randint(5, 50, (n, width)) * mask, "attention_mask": mask}


def test_f_that_depends_on_padding_is_trained_on_the_inputs_as_given():
    torch.manual_seed(0)
    model, inputs = Mean().double(), padded()
    y = np.random.default_rng(0).choice([-1.0, 1.0], size=(24, 2))
    truth = copy.deepcopy(model)
    recipe = ntk.Recipe(learning_rate=0.5, optimizer="sgd", epochs=2, batch_size=4)
    run = ntk.fine_tune(model, inputs, y, recipe, linear=True)
    told = []
    for rows in recipe.batches(24):
        loss = objective(truth(inputs["input_ids"][rows]), y[rows], "squared")
        told.append(loss.item())
        with torch.no_grad():
            for p, g in zip(truth.parameters(), torch.autograd.grad(loss, list(truth.parameters())), strict=True):
                p -= 0.5 * g
    assert np.allclose(run.batch_losses, told, rtol=1e-10)
    assert np.allclose(run.outputs, truth(inputs["input_ids"]).detach(), rtol=1e-10)
    cut = truth(inputs["input_ids"][1:2, :3]).detach().numpy()
    assert np.abs(run.outputs[1] - cut).max() > 0.01


class Widened(Mean):
    """A classifier whose outputs grow with the columns, but of the shortest examples."""

    def forward(self, input_ids, attention_mask):
        h = (torch.tanh(self.embed(input_ids)) * attention_mask[..., None]).sum(1)
        return self.out(h) * torch.where(attention_mask.sum(1) > 5, 1.0 + input_ids.shape[1] / 10, 1.0)[:, None]


def test_padding_that_only_some_examples_read_is_not_cut():
    torch.manual_seed(0)
    model, inputs = Widened().double(), padded()
    f = model(**inputs).detach()
    run = ntk.fine_tune(model, inputs, torch.ones(24, 2), learning_rate=1e-20, optimizer="sgd", batch_size=4)
    assert np.allclose(run.outputs, f, rtol=1e-9)


class Mixing(nn.Module):
    """A layer that centres its batch."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        return self.out(x - x.mean(0))


@pytest.mark.parametrize("batch_size", [0, 2])
def test_f_that_depends_on_its_batch_is_refused(batch_size):
    torch.manual_seed(0)
    with pytest.raises(ntk.CheckFailed, match="f of example 0 depends on the other examples of its batch"):
        ntk.fine_tune(Mixing(), {"x": torch.randn(N, 4)}, goals(), learning_rate=0.1, batch_size=batch_size)


def test_f_that_is_drawn_is_refused():
    model = nn.Sequential(nn.Linear(4, 2), Noisy())
    with pytest.raises(ntk.CheckFailed, match="draws random numbers"):
        ntk.fine_tune(model, {"x": torch.randn(N, 4)}, goals(), learning_rate=0.1)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_elements_that_share_memory_are_not_written_to(optimizer):
    memory = torch.zeros(64)
    model = nn.Linear(8, 2, bias=False)
    model.weight = nn.Parameter(memory[:1].reshape(()).expand(2, 8))
    with pytest.raises(ntk.InputError, match=r"elements of weight share memory \(strides \(0, 0\)\)"):
        ntk.fine_tune(model, {"x": torch.ones(N, 8)}, goals(), learning_rate=0.1, optimizer=optimizer)
    with pytest.raises(ntk.InputError, match=r"a parameter of shape \(2, 8\) share memory"):
        Descent(ntk.Recipe(learning_rate=0.1, optimizer=optimizer), [model.weight])
    for apart in (memory.view(8, 8).T, memory.view(4, 16)[:, ::2], memory[:1].expand(1), memory.view(2, 4, 8)[:, 1:3]):
        Descent(ntk.Recipe(learning_rate=0.1, optimizer=optimizer), [nn.Parameter(apart)])
    assert not memory.any()


def test_what_no_output_depends_on_is_not_trained():
    model, inputs = lora()
    model.merge_adapter()
    with pytest.raises(ntk.InputError, match="f depends on none of the selected ones: is an adapter merged"):
        ntk.fine_tune(model, inputs, goals(), learning_rate=1e-2)
    model.unmerge_adapter()
    with torch.inference_mode(), pytest.raises(ntk.InputError, match="inside torch.inference_mode"):
        ntk.fine_tune(model, inputs, goals(), learning_rate=1e-2)


class Routed(nn.Module):
    """Rows whose first entry is positive go another way, with parameters of its own."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        out = torch.zeros(len(x), 2)
        for way, on in ((self.left, x[:, 0] <= 0), (self.right, x[:, 0] > 0)):
            if bool(on.any()):
                out = out.index_put((on.nonzero()[:, 0],), way(x[on]))
        return out


def test_a_batch_that_meets_no_trained_parameter_is_a_step_of_nothing():
    torch.manual_seed(0)
    model, x = Routed(), -torch.rand(N, 4)
    x[N - 1, 0] = 1.0
    start = model.right.weight.detach().clone()
    y, recipe = goals(), ntk.Recipe(learning_rate=0.1, optimizer="sgd", batch_size=1)
    f = model(x).detach()
    ntk.fine_tune(model, {"x": x}, y, recipe, params="right.*", linear=True)
    slope = f[N - 1] - torch.as_tensor(y[N - 1]).float()
    assert torch.allclose(model.right.weight, start - 0.1 * slope[:, None] * x[N - 1], rtol=1e-5)


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
def test_true_and_false_are_targets_as_ones_and_zeros_are(loss):
    found = []
    for kind in (bool, int):
        model, inputs = lora()
        hot = (goals(1) * [1, -1] > 0).astype(kind)
        found.append(ntk.fine_tune(model, inputs, hot, learning_rate=1e-2, loss=loss).batch_losses)
    assert np.array_equal(*found)


BAD = {
    "recipe: needs learning_rate": {},
    "recipe: no field 'rate'": {"rate": 1.0, "learning_rate": 1.0},
    "recipe: expected a Recipe": {"recipe": 3},
    "optimizer: expected one of adam, sgd": {"learning_rate": 1.0, "optimizer": "lion"},
    "learning_rate: out of range, got -1": {"learning_rate": -1},
    "learning_rate: out of range, got nan": {"learning_rate": float("nan")},
    "learning_rate: expected a number": {"learning_rate": "fast"},
    "eps: out of range, got 0.0": {"learning_rate": 1.0, "eps": 0.0},
    "betas: out of range": {"learning_rate": 1.0, "betas": (0.9, 1.0)},
    "betas: expected two numbers": {"learning_rate": 1.0, "betas": 0.9},
    "epochs: expected an integer >= 1": {"learning_rate": 1.0, "epochs": 0},
    "selective: expected true or false": {"learning_rate": 1.0, "selective": "no"},
    "momentum: belongs to optimizer 'sgd'": {"learning_rate": 1.0, "momentum": 0.5},
    "eval_targets: expected together": {"learning_rate": 1.0, "eval_inputs": {"x": torch.ones(2, 4)}},
    "measure_every: expected": {"learning_rate": 1.0, "measure_every": 0},
    "matches no parameter": {"learning_rate": 1.0, "params": "nothing"},
    "targets: expected .6, 2. finite numbers, got shape .6, 3.": {"learning_rate": 1.0, "targets": np.ones((6, 3))},
    "targets: expected .6, 2. finite numbers, got NaN": {"learning_rate": 1.0, "targets": np.full((6, 2), np.nan)},
    "targets: expected .6, 2. finite numbers, got shape .6,.$": {"learning_rate": 1.0, "targets": np.ones(6)},
    "targets: expected real numbers": {"learning_rate": 1.0, "targets": np.full((6, 2), 1j)},
    "targets: expected one largest score a row, its class, row 0 has several": {
        "learning_rate": 1.0,
        "loss": "cross-entropy",
        "targets": np.ones((6, 2)),
    },
    "targets: expected numbers, got list": {"learning_rate": 1.0, "targets": ["a"] * 6},
    "targets: expected classes in 0..1": {"learning_rate": 1.0, "loss": "cross-entropy", "targets": [0, 1, 2, 0, 1, 1]},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line(message):
    torch.manual_seed(0)
    model = Tied()
    given = {"targets": goals(), **BAD[message]}
    with pytest.raises(ntk.InputError, match=message) as caught:
        ntk.fine_tune(model, {"x": torch.ones(N, 4)}, **given)
    assert "\n" not in str(caught.value)


def test_half_precision_parameters_are_not_trained():
    model = Tied().to(torch.bfloat16)
    with pytest.raises(ntk.InputError, match="float32 or float64 parameters to train"):
        ntk.fine_tune(model, {"x": torch.ones(N, 4)}, goals(), learning_rate=1.0)


def test_training_is_not_told_as_a_forward_pass_that_writes(caplog):
    model = torch.nn.Linear(3, 2)
    ntk.fine_tune(model, {"x": torch.randn(6, 3)}, torch.randn(6, 2), learning_rate=1e-2, optimizer="sgd")
    assert not caplog.records
