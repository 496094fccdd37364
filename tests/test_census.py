"""What a census over model classes and ways to call them met: right, told, or refused by name."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn

import ntkengine as ntk
from ntkengine.errors import InputError
from tests.brute import relative_error

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def brute(model, inputs, f_of, parameters=None) -> np.ndarray:
    """Return the trace kernel of a float64 model by autograd, one example and output at a time."""
    ps = list(model.parameters()) if parameters is None else parameters
    rows = []
    for i in range(len(next(iter(inputs.values())))):
        f = f_of(model, {k: v[i : i + 1] for k, v in inputs.items()})
        for c in range(f.shape[1]):
            grads = torch.autograd.grad(f[0, c], ps, retain_graph=True, allow_unused=True)
            rows.append(
                torch.cat(
                    [
                        torch.zeros(p.numel()).double() if g is None else g.flatten()
                        for p, g in zip(ps, grads, strict=True)
                    ]
                )
            )
    G = torch.stack(rows).numpy().reshape(-1, f.shape[1], rows[0].numel())
    return np.einsum("ncp,mcp->nm", G, G)


def bert(**more):
    torch.manual_seed(0)
    return tf.BertModel(tf.BertConfig(**SMALL, **more), add_pooling_layer=False).eval()


IDS = {
    "input_ids": torch.randint(1, 50, (6, 7), generator=torch.Generator().manual_seed(1)),
    "attention_mask": torch.ones(6, 7, dtype=torch.long),
}


@pytest.mark.parametrize("case", ["first and last", "first alone", "second"])
@pytest.mark.parametrize("check", [True, False])
def test_readouts_of_hidden_states(case, check):
    def readout(out, _inputs):
        hidden = {"first and last": out.hidden_states[0] + out.hidden_states[-1], "first alone": out.hidden_states[0],
                  "second": out.hidden_states[1]}[case]  # fmt: skip
        return hidden.mean(1)[:, :2]

    model = bert(output_hidden_states=True)
    wanted = brute(copy.deepcopy(model).double(), IDS, lambda m, x: readout(m(**x), x))
    found = ntk.compute_gram(model, IDS, readout=readout, params="all", check=check)
    assert max(relative_error(found.values, wanted)) < 1e-5


class Gated(nn.Module):
    """Its activation reads a parameter of the module it was written in."""

    def __init__(self):
        super().__init__()
        self.a, self.h, self.gate = nn.Linear(5, 8), nn.Linear(8, 2), nn.Parameter(torch.randn(8))
        self.act = lambda z: torch.tanh(z) * self.gate

    def forward(self, x):
        return self.h(self.act(self.a(x)))


def tied():
    model = bert()
    return model, IDS, lambda out, _inputs: (out.last_hidden_state[:, 0] @ model.get_input_embeddings().weight.T)[:, :3]


def gated():
    torch.manual_seed(0)
    return Gated(), {"x": torch.randn(6, 5)}, "logits"


def hooked():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
    model[0].register_forward_hook(lambda _module, _args, out: out + model[2].weight.sum(0))
    return model, {"x": torch.randn(6, 5)}, "logits"


@pytest.mark.parametrize("make", [tied, gated, hooked])
def test_a_function_that_names_its_model_is_not_computed_with_another(make, caplog):
    model, inputs, readout = make()
    for check in (True, False):
        with pytest.raises(InputError, match="reads it from the model it was written for"):
            ntk.compute_gram(model, inputs, readout=readout, params="all", precision="exact", check=check)
    with pytest.raises(InputError, match="reads it from the model|must have the same dtype"):
        ntk.compute_gram(model, inputs, readout=readout, params="all", precision="fast", check=False)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    found = ntk.compute_gram(model, inputs, readout=readout, params="all")  # no copy: right, its noise not known
    assert np.isnan(found.noise)
    assert "noise of this Gram is unknown" in caplog.text
    double, same, of = make()
    double.double()
    args = {k: v.double() if v.is_floating_point() else v for k, v in same.items()}
    wanted = brute(double, args, lambda m, x: of(m(**x), x) if callable(of) else m(*x.values()))
    assert max(relative_error(found.values, wanted)) < 1e-5


class Towers(nn.Module):
    """One of two inputs."""

    def __init__(self):
        super().__init__()
        self.q, self.d = nn.Linear(4, 2), nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, query=None, doc=None):
        return self.q(query) if query is not None else self.d(doc)


def test_a_single_input_goes_where_its_name_says():
    torch.manual_seed(0)
    model, x = Towers().double(), torch.randn(5, 4, dtype=torch.float64)
    for name in ("query", "doc"):
        found = ntk.compute_gram(model, {name: x}, params="all")
        wanted = brute(model, {name: x}, lambda m, given: m(**given))
        assert max(relative_error(found.values, wanted)) < 1e-10
        np.testing.assert_allclose(found.outputs, model(**{name: x}).detach(), rtol=1e-12)
    plain = nn.Sequential(nn.Linear(4, 2)).double()
    assert ntk.compute_gram(plain, {"whatever": x}, params="all").values.shape == (5, 5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_weights_made_in_every_call_are_no_cache():
    torch.manual_seed(0)
    with pytest.warns(FutureWarning, match="weight_norm"):
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.utils.weight_norm(nn.Linear(6, 3))).double()
    x = {"x": torch.randn(5, 4, dtype=torch.float64)}
    found = ntk.compute_gram(model, x, params="all")
    assert max(relative_error(found.values, brute(model, x, lambda m, given: m(given["x"])))) < 1e-10


def test_exact_of_a_model_that_makes_float32_tables():
    torch.manual_seed(0)
    config = tf.XGLMConfig(
        vocab_size=50, d_model=16, ffn_dim=32, num_layers=2, attention_heads=2, max_position_embeddings=32
    )
    model = tf.XGLMForCausalLM(config).eval()
    readout = ntk.LabelWords([3, 5])
    found = ntk.compute_gram(model, IDS, readout=readout, params="all", precision="exact")
    near = ntk.compute_gram(model, IDS, readout=readout, params="all")
    assert max(relative_error(near.values, found.values)) < 1e-5
    assert found.noise < 1e-10 * np.linalg.norm(found.values, 2)


class Tagger(nn.Module):
    """Reads its padding from the right."""

    def __init__(self):
        super().__init__()
        self.e, self.l, self.h = (
            nn.Embedding(50, 8),
            nn.LSTM(8, 8, batch_first=True, bidirectional=True),
            nn.Linear(16, 50),
        )

    def forward(self, input_ids, attention_mask):
        return self.h(self.l(self.e(input_ids))[0])


@pytest.mark.parametrize("labels", [False, True])
def test_padding_that_changes_f_is_told_whatever_else_is_given(labels, caplog):
    torch.manual_seed(0)
    lengths = torch.tensor([9, 4, 6, 5, 8, 3])
    mask = (torch.arange(9) < lengths[:, None]).long()
    inputs = {"input_ids": torch.randint(1, 50, (6, 9)) * mask, "attention_mask": mask}
    readout = ntk.SequenceLoss(shift=False) if labels else lambda out, _inputs: out[:, 0, :2]
    if labels:
        inputs["labels"] = inputs["input_ids"].masked_fill(mask == 0, -100)
    with caplog.at_level(logging.WARNING):
        ntk.compute_gram(Tagger(), inputs, readout=readout, params="all")
    assert "padding changes f" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):  # a model that masks it
        model = tf.BertForMaskedLM(tf.BertConfig(**SMALL)).eval()
        loss = ntk.SequenceLoss(shift=False) if labels else ntk.LabelWords([3, 5], position=0)
        ntk.compute_gram(model, inputs, readout=loss, params="all")
    assert "padding changes f" not in caplog.text
