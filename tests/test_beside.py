"""Grams and outputs under heads that did not see an example: alone, side by side, and when it must be alone."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch

from ntkengine.errors import InputError
from ntkengine.forecast import cross_fit, forecast
from ntkengine.gram import engine, heldout
from ntkengine.gram.beside import Beside
from ntkengine.gram.engine import compute_gram
from ntkengine.inputs.heads import fit_head
from ntkengine.inputs.readout import resolve_readout
from tests.brute import KINDS, tiny_inputs, tiny_model


def test_cross_fit_is_a_gram_under_each_held_out_head():
    model = tiny_model("bert", num_labels=2)
    inputs = tiny_inputs(model, [2 + i % 5 for i in range(9)], 12)
    head = fit_head(model, inputs, np.random.default_rng(1).normal(size=(9, 2)), folds=3)
    options = {"readout": "margin", "params": "*query*"}
    found = cross_fit(model, inputs, head, **options)
    weight = model.get_submodule(head.module).weight
    assert np.array_equal(weight.detach().numpy(), head.weights[-1][0].astype(np.float32))  # the fitted head is back
    for k in range(3):
        head.write(model, k)
        alone = compute_gram(model, inputs, **options)
        np.testing.assert_allclose(found.grams[k], alone.values, rtol=1e-6, atol=1e-7 * np.abs(alone.values).max())
        rounding = 1e-7 * np.abs(head.held_out).max()  # of a logit: a margin is the difference of two
        np.testing.assert_allclose(found.outputs[k], alone.outputs, rtol=1e-6, atol=rounding)
    y = np.where(np.arange(9) % 2, 1.0, -1.0)
    with pytest.raises(InputError, match="cross_fit: expected the Gram's examples .* under the head it was made with"):
        forecast(compute_gram(model, inputs, **options), y, cross_fit=found)  # with the last fold's head
    head.write(model, -1)
    assert forecast(compute_gram(model, inputs, **options), y, cross_fit=found).loo[0] > 0
    for other, said in [
        (
            {"params": "*value*"},
            "expected the params of the Gram, one of which has bert.*query.bias and the other has not",
        ),
        ({"contraction": "full"}, "expected the contraction of the Gram, got 'trace' and 'full'"),
    ]:
        with pytest.raises(InputError, match=said):
            forecast(compute_gram(model, inputs, **options | other), y, cross_fit=found)
    # Example n was scored by a head that did not see it: what fit_head itself foretold.
    np.testing.assert_allclose(found.held_out()[:, 0], head.held_out[:, 1] - head.held_out[:, 0], atol=1e-4)
    for wrong, said in [
        ({"inputs": {k: v[:8] for k, v in inputs.items()}}, "inputs: expected the 9 examples the head was fitted on"),
        ({"head": found}, "head: expected what fit_head returned, got CrossFit"),
        (
            {"model": tiny_model("bert", num_labels=3)},
            r"head: expected one fitted on this model, got one of classifier",
        ),
        ({"model": torch.nn.Linear(2, 2)}, "head: expected one fitted on this model"),
        ({"eval_inputs": inputs}, "eval_inputs: expected none"),
        ({"targets": np.ones((9, 1))}, "targets: expected none"),
    ]:
        with pytest.raises(InputError, match=said):
            cross_fit(**{"model": model, "inputs": inputs, "head": head, **options, **wrong})
    with pytest.raises(InputError, match="readout"):
        cross_fit(model, inputs, head, readout="none")
    turned = {k: v.flip(0) for k, v in inputs.items()}
    with pytest.raises(InputError, match="in their order; the outputs of example"):
        cross_fit(model, turned, head, **options)
    assert np.array_equal(weight.detach().numpy(), head.weights[-1][0].astype(np.float32))  # also after a refusal


class Doubtful(torch.nn.Module):
    """A head whose logits go on: by what every label has."""

    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)
        self.scale = torch.nn.Parameter(torch.tensor([1.0, 1.0]), requires_grad=False)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x))) * self.scale


class Scaled(torch.nn.Module):
    """A head whose logits go on: by a factor of one, which may be a parameter of the kernel."""

    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.head(torch.tanh(self.body(x))) * self.scale


@pytest.mark.parametrize(
    ("kind", "readout", "scaled"),
    [
        ("scaled", "logits", True),
        ("scaled", "margin", True),
        ("scaled", "logits", False),
        ("adapted", "margin", True),
        ("adapted", "logits", True),
    ],
)
def test_heads_with_parameters_beside_them_are_one_after_the_other(kind, readout, scaled, monkeypatch):
    torch.manual_seed(0)
    if kind == "scaled":
        model, inputs = Scaled().double(), {"x": torch.randn(6, 4).double()}
        params = ["body.*", "scale"] if scaled else ["body.*"]
    else:  # two heads of a margin have as many rows as the adapter of the head
        base = tiny_model("bert", num_labels=2).double()
        adapter = peft.LoraConfig(r=2, target_modules=["query", "classifier"], modules_to_save=[])
        model, params = peft.get_peft_model(base, adapter), "*lora_*"
        inputs = tiny_inputs(base, [2 + i % 5 for i in range(6)], 12)
    targets = np.random.default_rng(1).normal(size=(6, 2))
    head = fit_head(model, inputs, targets - targets.mean(1, keepdims=True), folds=2)
    options = {"readout": readout, "params": params, "precision": "exact"}
    found, want = cross_fit(model, inputs, head, **options), []
    for k in range(2):
        head.write(model, k)
        want.append(compute_gram(model, inputs, **options).values)
    head.write(model, -1)
    np.testing.assert_allclose(found.grams, want, rtol=1e-9, atol=1e-11 * np.abs(want).max())
    side = Beside(model, head, readout, params, "exact")
    assert side.rank == 1
    assert side.agrees(model, inputs, resolve_readout(readout, "trace"), 1 << 20) == (not scaled)
    assert not model.get_submodule(head.module)._forward_hooks


class Reading(torch.nn.Module):
    """A model that reads its head's weights, or shape, where that changes no output, but a gradient."""

    def __init__(self, what):
        super().__init__()
        self.what, self.body, self.head = what, torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)
        self.gate = torch.nn.Parameter(torch.zeros(()))
        if what == "table":
            self.table = torch.nn.Embedding(2, 6)
            self.head.weight = self.table.weight

    def forward(self, x):
        h, weight = torch.tanh(self.body(x)), self.head.weight
        if self.what == "norm":
            h = h * (1 + self.gate * weight.norm())
        if self.what == "shape":
            h = h * (1 + self.gate * self.head.out_features)
        if self.what in ("sum", "table"):
            h = h + weight.sum() - weight.detach().sum()
        return self.head(h)


@pytest.mark.parametrize("params", ["all", ["all", "!head.*"]])
@pytest.mark.parametrize("what", ["norm", "shape", "sum", "table", "hook"])
def test_heads_that_a_model_reads_are_one_after_the_other(what, params):
    torch.manual_seed(0)
    model, inputs = Reading(what).double(), {"x": torch.randn(7, 4).double()}
    targets = np.where(np.arange(7)[:, None] % 2, 1.0, -1.0) * [-0.5, 0.5]
    head = fit_head(model, inputs, targets, folds=3)
    if what == "hook":
        model.head.register_full_backward_hook(lambda _, given, __: tuple(2 * g for g in given))
    found, want = cross_fit(model, inputs, head, params=params, check=False), []
    for k in range(3):
        head.write(model, k)
        want.append(compute_gram(model, inputs, params=params, check=False).values)
    np.testing.assert_allclose(found.grams, want, rtol=1e-9, atol=1e-11 * np.abs(want).max())


def test_cross_fit_of_a_model_that_is_its_head_and_of_folds_without_a_class():
    torch.manual_seed(0)
    model, inputs = torch.nn.Linear(4, 2), {"x": torch.randn(9, 4)}
    head = fit_head(model, inputs, np.eye(2)[np.arange(9) % 2], folds=3)
    assert cross_fit(model, inputs, head).grams.shape == (3, 9, 9)
    assert len(repr(head)) < 100
    model = tiny_model("bert", num_labels=3)
    inputs = tiny_inputs(model, [2 + i % 5 for i in range(6)], 12)
    fold = fit_head(model, inputs, np.zeros((6, 3)), folds=3).fold
    labels = np.where(fold == 0, 2, np.arange(6) % 2)  # without fold 0 there is no class 2
    head = fit_head(model, inputs, np.eye(3)[labels] * 2 - 1, folds=3)
    found = cross_fit(model, inputs, head, params="*query*")
    for k in range(3):
        head.write(model, k)
        alone = compute_gram(model, inputs, params="*query*").values
        np.testing.assert_allclose(found.grams[k], alone, rtol=1e-6, atol=1e-6 * np.abs(alone).max())


SIDES = [(kind, 2, "margin", "all", 1) for kind in [*KINDS, "odd"]] + [
    ("bert", 2, "margin", "body", 1),
    ("bert", 2, None, "all", 2),
    ("bert", 2, "logits", "body", 2),
    ("llama", 3, "logits", "all", 3),
    ("llama", 3, None, "body", 3),
    ("symmetric", 2, "logits", "body", 1),
    ("symmetric", 3, "logits", "body", 2),
    ("rounded", 3, "logits", "body", 3),
]


@pytest.mark.parametrize(("kind", "labels", "readout", "params", "rank"), SIDES)
def test_all_heads_side_by_side_are_one_after_the_other(kind, labels, readout, params, rank, monkeypatch):
    torch.manual_seed(0)
    model = Doubtful() if kind == "odd" else tiny_model(kind if kind in KINDS else "bert", num_labels=labels)
    if kind != "rounded":
        model = model.double()
    inputs = (
        {"x": torch.randn(7, 4).double()} if kind == "odd" else tiny_inputs(model, [2 + i % 5 for i in range(7)], 12)
    )
    targets = np.random.default_rng(1).normal(size=(7, labels))
    if kind in ("symmetric", "rounded"):  # as classes are: what one logit gains, the others lose
        targets -= targets.mean(1, keepdims=True)
    head = fit_head(model, inputs, targets, folds=3)
    names, calls = list(dict(model.named_parameters())), []

    def counted(*args, **options):
        calls.append(options.get("contraction", "trace"))
        found = compute_gram(*args, **options)
        ranks.append(np.asarray(found.outputs).shape[1])
        return found

    ranks: list[int] = []
    monkeypatch.setattr(engine, "compute_gram", counted)
    options = {"params": ["all", f"!{head.module}.*"] if params == "body" else "all", "precision": "exact"}
    options |= {} if readout is None else {"readout": readout, "contraction": "trace"}
    together = cross_fit(model, inputs, head, **options)
    few = ["trace"]  # of the Gram itself, to be compared with
    assert calls == (["trace"] * 3 if kind == "odd" else ["per-output"]) + few
    assert kind == "odd" or ranks[:1] == [3 * rank]
    assert list(dict(model.named_parameters())) == names
    bounded = cross_fit(model, inputs, head, **options, memory_gib=0.5)
    monkeypatch.setattr(heldout, "_has_room", lambda *_: False)
    calls.clear()
    apart = cross_fit(model, inputs, head, **options)
    assert calls == ["trace"] * 3 + few
    for found in (together, bounded):
        np.testing.assert_allclose(found.grams, apart.grams, rtol=1e-10, atol=1e-12 * np.abs(apart.grams).max())
        np.testing.assert_allclose(found.outputs, apart.outputs, rtol=1e-10, atol=1e-12)
        assert found.kind == apart.kind
