"""What a forward pass leaves in a model: taken away again, or refused where it would cost gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn

import ntkengine as ntk
from ntkengine.errors import InputError
from tests.brute import TwoLinears, gradients, relative_error

D = 5


class Net(TwoLinears):
    def __init__(self, forward):
        super().__init__(forward)
        self.held, self.table = None, {}
        self.register_buffer("seen", torch.zeros(()))


def lazily(net, x):
    if net.held is None:
        net.held = net.one.weight @ net.one.weight
    return net.two(x @ net.held)


def in_a_table(net, x):
    if "w" not in net.table:
        net.table["w"] = net.one.weight.exp()
    return net.two(x @ net.table["w"])


def constant(net, x):
    if net.held is None:
        net.held = torch.linspace(0.0, 1.0, D, dtype=x.dtype)
    return net.two(net.one(x) * net.held.to(x))


def replacing(net, x):
    net.seen = net.seen + 1
    net.last = h = net.one(x).tanh()
    net.table["h"] = h
    return net.two(h)


@pytest.mark.parametrize("forward", [lazily, in_a_table])
@pytest.mark.parametrize("call", [ntk.compute_gram, ntk.tangent_features, ntk.TangentProducts])
def test_a_product_of_parameters_kept_for_the_next_call_is_refused(forward, call):
    model = Net(forward)
    with pytest.raises(InputError, match=r"model: (held|table) keeps what one call computed from the parameters"):
        call(model, {"x": torch.randn(4, D)}, params="all")
    assert model.held is None
    assert not model.table


@pytest.mark.parametrize("forward", [constant, replacing])
@pytest.mark.parametrize("precision", ["exact", "high"])
def test_a_model_is_left_as_it_was(forward, precision):
    model, x = Net(forward), torch.randn(4, D)
    before, buffer = {k: v for k, v in vars(model).items() if not k.startswith("_")}, model.seen
    state = torch.random.get_rng_state()
    gram = ntk.compute_gram(model, {"x": x}, params="all", precision=precision)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {k: v for k, v in vars(model).items() if not k.startswith("_")} == before
    assert model.seen is buffer
    assert not model.table
    names = [n for n, _ in model.named_parameters()]
    G = gradients(model, {"x": x}, names)
    assert max(relative_error(gram.values, np.einsum("ncp,mcp->nm", G, G))) < 1e-6


@pytest.mark.parametrize("ran", [False, True])
def test_hooks_that_a_model_hangs_on_itself_are_taken_away(ran):
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = tf.BertForSequenceClassification(tf.BertConfig(vocab_size=97, output_hidden_states=True, **shape)).eval()
    inputs = {"input_ids": torch.randint(0, 97, (4, 6))}
    if ran:
        model(**inputs)
    before = [len(m._forward_hooks) for m in model.modules()]
    for _ in range(2):
        ntk.compute_gram(model, inputs, params="*query*")
    assert [len(m._forward_hooks) for m in model.modules()] == before
    assert len(model(**inputs).hidden_states) == 3


def test_a_model_that_merges_its_adapter_in_eval_mode():
    class Merging(nn.Module):
        """As loralib: eval() adds B A to the weight, train() takes it out again."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.merged = nn.Linear(D, 2), False
            self.A, self.B = nn.Parameter(torch.randn(1, D)), nn.Parameter(torch.randn(2, 1))

        def train(self, mode=True):
            super().train(mode)
            if mode == self.merged:
                self.inner.weight.data += (-1 if mode else 1) * (self.B @ self.A)
                self.merged = not mode
            return self

        def forward(self, x):
            return self.inner(x) if self.merged else self.inner(x) + x @ self.A.T @ self.B.T

    model = Merging()
    weight = model.inner.weight.detach().clone()
    gram = ntk.compute_gram(model, {"x": torch.randn(4, D)}, params=["A", "B"])
    assert not gram.meta["unused_parameters"]
    assert torch.equal(model.inner.weight, weight)
    assert not model.merged
    assert model.training


def test_what_cannot_be_taken_back_is_told(caplog):
    def writes(net, x):
        with torch.no_grad():
            net.two.bias.fill_(0.5)
        return net.two(net.one(x))

    ntk.compute_gram(Net(writes), {"x": torch.randn(4, D)}, params=["one.weight"], check=False)
    assert "its forward pass wrote to two.bias, which is left as it is now" in caplog.text


class Normed(nn.Module):
    """Spectral norms, whose power iterations take a step whenever a weight is read in train mode."""

    def __init__(self):
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm
        self.table = norm(nn.Embedding(11, 8))
        self.inner, self.head = norm(nn.Linear(8, 8)), nn.Linear(8, 2)
        self.config = type("Config", (), {})()

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids):
        return self.head(torch.tanh(self.inner(self.table(input_ids))).mean(1))


CALLS = {
    "compute_gram": lambda m, x: ntk.compute_gram(m, x, per_module=True),
    "plan_gram": ntk.plan_gram,
    "tangent_factors": ntk.tangent_factors,
    "linearize": lambda m, x: ntk.linearize(m)(x),
    "tokenize": lambda m, x: ntk.tokenize([{"input_ids": row.tolist()} for row in x["input_ids"]], m),
    "fit_head": lambda m, x: ntk.fit_head(m, x, np.eye(2)[np.arange(6) % 2]),
    "fine_tune": lambda m, x: ntk.fine_tune(m, x, np.eye(2)[np.arange(6) % 2], params="head.*", learning_rate=1e-2),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_spectral_norm_in_train_mode_is_left_as_it_was(call):
    torch.manual_seed(0)
    model, x = Normed().double(), {"input_ids": torch.randint(0, 11, (6, 4))}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    with torch.no_grad():
        outputs = model(**x)
    found = CALLS[call](model.train(), x)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert [name for name in changed if not name.startswith("head")] == []
    assert all(module.training for module in model.modules())
    if call == "compute_gram":
        np.testing.assert_allclose(found.outputs, outputs.numpy(), rtol=1e-12)
