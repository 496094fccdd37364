"""Modules beyond a plain transformer, tied weights, routed experts: against brute force, and left as they were."""

from __future__ import annotations

import pytest
import torch

from ntkengine.errors import CheckFailed
from ntkengine.gram.engine import compute_gram
from ntkengine.inputs.batches import Samples
from ntkengine.tangents.probe import probe
from ntkengine.tangents.sweep import Sweep
from tests.brute import contracted, gradients, relative_error, tiny_inputs, tiny_model

LENGTHS = [11, 3, 5, 7, 2, 9, 5]


TOLERANCE = {"exact": 1e-9, "high": 1e-5}


def test_tied_embeddings_and_language_model_head():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_embd=16, n_layer=2, n_head=2, n_positions=32, pad_token_id=0)
    ).eval()
    inputs = tiny_inputs(model, LENGTHS, 12)

    def words(out, one):
        last = one["attention_mask"].sum(1) - 1
        return out.logits[torch.arange(len(last)), last][:, [5, 9]]

    names = {name for name, _ in model.named_parameters()}
    G = gradients(model, inputs, names, words)
    gram = compute_gram(model, inputs, params="all", precision="exact", readout=words)
    assert max(relative_error(gram.values, contracted(G, G, "trace"))) < 1e-9
    assert "mixed" not in {row.strategy for row in gram.plan.parameters}


class Odd(torch.nn.Module):
    """Raw parameters, a branch, reuse, routed rows, a broadcast table, in-place writes."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.randn(8))
        self.first, self.again = torch.nn.Linear(6, 8), torch.nn.Linear(8, 8)
        self.experts = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(2)])
        self.table = torch.nn.Embedding(5, 8)
        self.unused = torch.nn.Linear(3, 3)
        self.head = torch.nn.Linear(8, 2)

    def forward(self, x):
        h = torch.relu(self.first(x)) * self.scale
        h = self.again(self.again(h)) + self.table(torch.arange(x.shape[1]))[None]
        rows = h.reshape(-1, 8)
        out = torch.zeros_like(rows)
        chosen = (rows[:, 0] > 0).long()
        for i, expert in enumerate(self.experts):
            index = (chosen == i).nonzero()[:, 0]
            out[index] = expert(rows[index])
        out.add_(1.0)
        return self.head(out.view_as(h).mean(1))


def test_any_torch_module():
    torch.manual_seed(0)
    model = Odd()
    x = torch.randn(6, 4, 6)
    double = Odd().double()
    double.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    rows = []
    for i in range(6):
        f = double(x[i : i + 1].double())
        for c in range(2):
            grads = torch.autograd.grad(f[0, c], list(double.parameters()), retain_graph=True, allow_unused=True)
            rows.append(
                torch.cat(
                    [
                        (torch.zeros_like(p) if g is None else g).reshape(-1)
                        for p, g in zip(double.parameters(), grads, strict=True)
                    ]
                )
            )
    G = torch.stack(rows).view(6, 2, -1).numpy()
    for precision, contraction in (("exact", "trace"), ("high", "trace"), ("exact", "full")):
        gram = compute_gram(
            model, {"x": x}, params="all", readout=lambda out, _: out, precision=precision, contraction=contraction
        )
        assert max(relative_error(gram.values, contracted(G, G, contraction))) < TOLERANCE[precision]
    assert gram.meta["unused_parameters"] == ["unused.weight", "unused.bias"]
    assert gram.meta["one_by_one"]


class Routed(torch.nn.Module):
    """An expert that few samples reach."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(2, 4)
        self.expert = torch.nn.Linear(4, 4)
        self.bonus = torch.nn.Parameter(torch.randn(4))
        self.head = torch.nn.Linear(4, 2)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        index = (x[:, 0] > 5).nonzero()[:, 0]
        if len(index):
            h = h.index_add(0, index, self.expert(h[index]) * self.bonus)
        return self.head(h)


def test_parameters_that_only_some_samples_reach():
    torch.manual_seed(0)
    model = Routed()
    x = torch.rand(12, 2)
    x[[3, 8], 0] = 7.0
    double = Routed().double()
    double.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    rows = []
    for i in range(12):
        for c in range(2):
            grads = torch.autograd.grad(
                double(x[i : i + 1].double())[0, c], list(double.parameters()), allow_unused=True
            )
            pairs = zip(double.parameters(), grads, strict=True)
            rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in pairs]))
    G = torch.stack(rows).view(12, 2, -1).numpy()
    for check in (True, False):
        gram = compute_gram(model, {"x": x}, params="all", readout=lambda out, _: out, precision="exact", check=check)
        assert max(relative_error(gram.values, contracted(G, G, "trace"))) < 1e-9
    start = [name for name, _ in model.named_parameters()].index("expert.weight")
    begin = sum(p.numel() for p in list(model.parameters())[:start])
    G = G[..., begin : begin + 20]  # of the expert: no drawn sample need reach it
    for seed in range(4):
        gram = compute_gram(
            model, {"x": x}, params="expert.*", readout=lambda out, _: out, precision="exact", seed=seed
        )
        assert max(relative_error(gram.values, contracted(G, G, "trace"))) < 1e-9


def test_one_routed_row_of_several_samples_is_refused_by_name():
    torch.manual_seed(0)
    model, x = Routed().double(), torch.rand(12, 2, dtype=torch.float64)
    x[[0, 6, 11, 3], 0] = 7.0  # all that are probed, and one sample of the second microbatch
    selected = {name: p for name, p in model.named_parameters() if name.startswith("expert")}
    samples = Samples([{"x": x}], microbatch=3)
    structure = probe(model, selected, samples, lambda out, _: out)
    with pytest.raises(CheckFailed, match="expert.weight.*no leading axis of 3 samples, unlike on the probed"):
        list(Sweep(model, selected, structure, samples, lambda out, _: out).segments())


def test_model_is_left_as_found():
    model = tiny_model("bert").train()
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    compute_gram(model, tiny_inputs(model, [3, 4], 5), params="trainable")
    assert model.training
    assert model.bert.encoder.layer[0].training
    assert not model.bert.embeddings.word_embeddings.weight.requires_grad
    assert model.classifier.weight.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
