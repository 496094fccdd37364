"""Every architecture, all parameters, against brute force."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ntkengine.errors import CheckFailed, InputError
from ntkengine.gram.engine import compute_gram
from tests import zoo
from tests.brute import contracted, gradients, relative_error


@pytest.mark.parametrize("name", zoo.MODELS)
def test_equals_brute_force(name):
    model = zoo.model(name)
    inputs, eval_inputs = (
        zoo.inputs(name, model, lengths, seed) for seed, lengths in enumerate((zoo.LENGTHS, zoo.EVAL_LENGTHS))
    )
    names = {n for n, _ in model.named_parameters()}
    readout = zoo.READOUTS.get(name)
    G, H = gradients(model, inputs, names, readout), gradients(model, eval_inputs, names, readout)
    for precision, contraction, tolerance in (("exact", "full", 1e-9), ("high", "trace", 1e-5)):
        gram = compute_gram(
            model,
            inputs,
            eval_inputs=eval_inputs,
            params="all",
            readout=readout or "logits",
            contraction=contraction,
            precision=precision,
        )
        assert max(relative_error(gram.values, contracted(G, G, contraction))) < tolerance
        assert max(relative_error(gram.cross, contracted(H, G, contraction))) < tolerance
        listed = {row.parameter for row in gram.plan.parameters} | set(gram.plan.unused)
        assert listed == names
        assert len(gram.plan.parameters) + len(gram.plan.unused) == len(names)


def test_a_model_that_casts_to_float32_inside():
    # MPT's attention is float32 whatever the weights are.
    config = {"vocab_size": 97, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "num_labels": 3}
    torch.manual_seed(0)
    model = zoo.other("MptForSequenceClassification", "Mpt", **config)().eval()
    inputs = zoo.inputs("mpt", model, zoo.LENGTHS)
    G = gradients(model, inputs, {n for n, _ in model.named_parameters()})
    gram = compute_gram(model, inputs, params="all", precision="exact")
    assert max(relative_error(gram.values, contracted(G, G, "trace"))) < 1e-13


class Stateful(nn.Module):
    """A block that counts its calls, as no frozen model may."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = []

    def forward(self, x):
        self.calls.append(1)
        return x + self.linear(x) * (1 + 0.5 * (len(self.calls) > 40))


class Blocks(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.layers = nn.ModuleList([block() for _ in range(3)])
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_a_block_with_a_state_is_refused(monkeypatch):
    torch.manual_seed(0)
    model, x = Blocks(Stateful).eval(), torch.randn(30, 4)
    from ntkengine.gram import computing, layout

    monkeypatch.setattr(layout, "KEEP_BYTES", 0)
    sweep = computing._sweep

    def turning(*args, **kwargs):  # between the forward pass and the replay
        for layer in model.layers:
            layer.calls = [1] * 39
        return sweep(*args, **kwargs)

    monkeypatch.setattr(computing, "_sweep", turning)
    with pytest.raises(CheckFailed, match=r"layers\.2: run again on the same input its output has norm"):
        compute_gram(model, {"x": x}, params="all", check=False)


class Undifferentiable(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        h = self.linear(x)
        y = torch.exp(h)
        y.add_(1.0)  # exp's backward needs the value that is overwritten here
        return y


def test_a_model_that_autograd_cannot_differentiate_is_refused():
    with pytest.raises(InputError, match="model: Undifferentiable cannot be differentiated: one of the variables"):
        compute_gram(Undifferentiable(), {"x": torch.randn(3, 4)}, params="all")
