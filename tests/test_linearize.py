"""The linearised model: f0 + J δ against brute-force autograd, and what it refuses."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import ntkengine as ntk
from tests.brute import gradients, relative_error, tiny_inputs, tiny_model, with_lora

TARGETS = {
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "v_proj"],
}
LENGTHS = [5, 9, 3, 7]
ROUNDING = {"llama": 1e-6}  # its norms compute in float32; all else is in float64


def rounding(name):
    return ROUNDING.get(name.partition("-")[0], 1e-10)


class Norm(nn.Module):
    """Rows through a batch norm, whose statistics are buffers."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2.0)

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x))))


class Tied(nn.Module):
    """One weight, used twice."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.down.weight = self.up.weight
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        return self.out(torch.tanh(self.down(torch.tanh(self.up(x)))))


def case(name):
    """Return a float64 model, its inputs, and the selection."""
    torch.manual_seed(0)
    if name in ("norm", "tied"):
        return (Norm() if name == "norm" else Tied()).double(), {"x": torch.randn(4, 4).double()}, "all"
    model = tiny_model(name.partition("-")[0])
    if name.endswith("-lora"):
        model = with_lora(model, TARGETS[name.partition("-")[0]], away_from_start=True)
    return model.double(), tiny_inputs(model, LENGTHS, 9), "trainable"


def displaced(linear, scale, seed=3):
    """Draw a displacement; return it flat."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for d in linear.displacement:
            d.copy_(scale * torch.randn_like(d))
    return torch.cat([d.detach().reshape(-1) for d in linear.displacement]).numpy()


CASES = [*TARGETS, *(f"{k}-lora" for k in TARGETS), "norm", "tied"]


@pytest.mark.parametrize("name", CASES)
def test_linear_model_and_its_gradient_are_the_first_order_expansion(name):
    model, inputs, params = case(name)
    linear = ntk.linearize(model, params)
    delta = displaced(linear, 0.3)
    J = gradients(model, inputs, linear.names)
    with torch.no_grad():
        out = model.eval()(**inputs).logits if hasattr(model, "config") else model.eval()(*inputs.values())
    f = linear(inputs)
    assert max(relative_error(f.detach(), out.numpy() + J @ delta)) < rounding(name)
    weight = torch.randn_like(f)
    found = torch.autograd.grad((f * weight).sum(), list(linear.displacement))
    flat = torch.cat([g.reshape(-1) for g in found])
    assert max(relative_error(flat, np.einsum("nc,ncp->p", weight.numpy(), J))) < rounding(name)


def test_expansion_stays_where_it_was_made_while_the_selected_parameters_move():
    model, inputs, _ = case("bert-lora")
    linear = ntk.linearize(model)
    displaced(linear, 0.1)
    before = linear(inputs).detach()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1.0)
    assert torch.equal(linear(inputs).detach(), before)


def test_expansion_keeps_its_batch_statistics():
    model, inputs, _ = case("norm")
    linear = ntk.linearize(model, "all")
    before = linear(inputs).detach()
    model.train()(inputs["x"])
    assert torch.equal(linear(inputs).detach(), before)


@pytest.mark.parametrize("how", ["written", "replaced"])
def test_changed_frozen_parameter_is_refused(how):
    model, inputs, _ = case("tied")
    linear = ntk.linearize(model, "up.weight")
    linear(inputs)
    with torch.no_grad():
        if how == "written":
            model.out.bias.add_(1)
        else:
            model.out.bias = nn.Parameter(model.out.bias + 1)
    with pytest.raises(ntk.InputError, match=r"out\.bias of the model has changed"):
        linear(inputs)


def test_model_is_left_as_it_was():
    model, inputs, _ = case("bert-lora")
    model.train()
    wanted = [p.requires_grad for p in model.parameters()]
    linear = ntk.linearize(model)
    linear(inputs).sum().backward()
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert all(d.grad is not None for d in linear.displacement)
    assert not set(map(id, linear.parameters())) & set(map(id, model.parameters()))


def test_readout_and_selection_are_those_of_the_gram():
    model, inputs, _ = case("bert")
    names = ["*.layer.1.*weight"]
    linear = ntk.linearize(model, names, readout=lambda out, _: out.logits[:, :2] * 2.0)
    gram = ntk.compute_gram(model, inputs, params=names, precision="exact")
    J = gradients(model, inputs, linear.names)
    assert max(relative_error(np.asarray(gram), np.einsum("ncp,mcp->nm", J, J))) < 1e-9
    delta = displaced(linear, 0.2)
    moved = linear(inputs).detach().numpy()
    assert max(relative_error(moved, 2.0 * (gram.outputs + J @ delta)[:, :2])) < 1e-10
    with pytest.raises(ntk.InputError, match="matches no parameter"):
        ntk.linearize(model, "nothing")


def test_a_fused_optimiser_that_leaves_no_trace_is_noticed():
    model, inputs, _ = case("tied")
    model.float()
    inputs = {"x": inputs["x"].float()}
    linear = ntk.linearize(model, "up.weight")
    optimizer = torch.optim.AdamW([model.out.weight], lr=1e-6, fused=True)
    model.out.weight.grad = torch.ones_like(model.out.weight)
    linear(inputs)
    optimizer.step()
    with pytest.raises(ntk.InputError, match=r"out\.weight of the model has changed"):
        linear(inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("change", [
    lambda w: w.neg(), lambda w: w.flip(0), lambda w: w.flip(1), lambda w: w.roll(1, 1), lambda w: w * (1 + 3e-7),
])  # fmt: skip
def test_a_change_that_keeps_the_bits_but_not_their_places_or_signs_is_noticed(change, dtype):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2)).to(dtype)
    x = {"x": torch.randn(5, 4, dtype=dtype)}
    expansion = ntk.linearize(model, params="2.*")
    expansion(x)
    with torch.no_grad():
        model[0].weight.copy_(change(model[0].weight))
    with pytest.raises(ntk.InputError, match=r"0.weight of the model has changed"):
        expansion(x)


class Tripled(torch.autograd.Function):
    """The identity, with three times its derivative in reverse mode."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(_ctx, grad):
        return 3 * grad

    @staticmethod
    def jvp(_ctx, tangent):
        return tangent.clone()


class Rounded(nn.Module):
    """A layer whose weight is rounded in one of the ways in which that is made straight-through."""

    def __init__(self, how):
        super().__init__()
        self.how, self.first, self.last = how, nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        w = self.first.weight
        if self.how == "no_grad":
            with torch.no_grad():
                step = (w * 8).round() / 8 - w
            w = w + step
        elif self.how == "detach":
            w = w + ((w * 8).round() / 8 - w).detach()
        h = torch.tanh(x @ w.T + self.first.bias)
        if self.how == "hook" and h.requires_grad:
            h.register_hook(lambda g: 3 * g)
        return self.last(Tripled.apply(h) if self.how == "function" else h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", ["no_grad", "hook", "function", "dropout"])
def test_another_derivative_in_forward_mode_is_refused(how, dtype):
    torch.manual_seed(0)
    model, x = Rounded(how).to(dtype), {"x": torch.randn(5, 4, dtype=dtype)}
    if how == "dropout":
        model = nn.Sequential(Noisy(), model)
    message = "gives another output on the same input" if how == "dropout" else "another derivative in forward mode"
    with pytest.raises(ntk.CheckFailed, match=message):
        ntk.linearize(model)(x)
    if how != "dropout":
        with pytest.raises(ntk.CheckFailed, match="another derivative in forward mode"):
            ntk.fine_tune(model, x, torch.ones(5, 2), learning_rate=1e-3, linear=True)


class Noisy(nn.Module):
    """Dropout that eval mode does not switch off."""

    def forward(self, x):
        return nn.functional.dropout(x, 0.5, training=True)


def test_rounding_that_both_modes_see_alike_is_not_refused():
    torch.manual_seed(0)
    model, x = Rounded("detach").double(), {"x": torch.randn(5, 4).double()}
    linear = ntk.linearize(model)
    delta = displaced(linear, 0.3)
    J = gradients(model, x, linear.names)
    assert max(relative_error(linear(x).detach(), model(x["x"]).detach().numpy() + J @ delta)) < 1e-12


def adapters():
    model, inputs, _ = case("bert-lora")
    model.add_adapter("other", copy.copy(model.peft_config["default"]))
    return model.double(), inputs


@pytest.mark.parametrize("change", [
    lambda m: m.set_adapter("other"),
    lambda m: m.base_model.disable_adapter_layers(),
    lambda m: m.base_model.model.bert.encoder.layer[0].attention.self.query.scaling.update(default=9.0),
    lambda m: setattr(m.base_model.model.bert.encoder.layer[0].attention.self, "scaling", 2.0),
    lambda m: m.merge_adapter(),
])  # fmt: skip
def test_changed_setting_is_refused(change):
    model, inputs = adapters()
    linear = ntk.linearize(model)
    before = linear(inputs).detach()
    assert torch.equal(linear(inputs).detach(), before)
    change(model)
    with pytest.raises(ntk.InputError, match="of the model has changed since"):
        linear(inputs)


def test_settings_that_are_put_back_and_training_mode_change_nothing():
    model, inputs = adapters()
    linear = ntk.linearize(model)
    before = linear(inputs).detach()
    with model.disable_adapter(), pytest.raises(ntk.InputError, match="has changed since"):
        linear(inputs)
    model.set_adapter("other")
    model.set_adapter("default")
    model.train()
    assert torch.equal(linear(inputs).detach(), before)
