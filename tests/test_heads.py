"""The fitted head: ridge regression as scikit-learn does it; held-out outputs from heads that did not see them."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
import transformers as tf
from sklearn.linear_model import Ridge

from ntkengine.errors import InputError
from ntkengine.finetune import fine_tune
from ntkengine.forecast import cross_fit, forecast
from ntkengine.gram import engine, heldout
from ntkengine.gram.beside import Beside
from ntkengine.gram.engine import compute_gram
from ntkengine.gram.linear import tangent_factors
from ntkengine.inputs.heads import fit_head
from ntkengine.inputs.models import load_model
from ntkengine.inputs.readout import resolve_readout
from tests.brute import KINDS, tiny_inputs, tiny_model
from tests.tiny import save_tiny

N = 23


@pytest.mark.parametrize("kind", KINDS)
def test_equals_refits(kind):
    model = tiny_model(kind, num_labels=2)
    inputs = tiny_inputs(model, [2 + i % 9 for i in range(N)], 12)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    targets = np.random.default_rng(0).normal(size=(N, 2))
    fit = fit_head(model, inputs, targets, ridge=0.7, folds=4)
    with torch.no_grad():
        logits = model(**inputs).logits.numpy()
    np.testing.assert_allclose(logits, fit.fitted, atol=1e-4)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed <= {f"{fit.module}.weight", f"{fit.module}.bias"}
    assert sorted(set(fit.fold)) == [0, 1, 2, 3]
    # The features, as the head sees them, give the same predictions when refitted without each fold.
    features = []
    hook = model.get_submodule(fit.module).register_forward_hook(lambda _m, args, _o: features.append(args[0]))
    with torch.no_grad():
        for i in range(N):
            length = int(inputs["attention_mask"][i].sum())
            model(**{k: v[i : i + 1, :length] for k, v in inputs.items()})
    hook.remove()
    X = np.stack([(x[0, -1] if x.ndim == 3 else x[0]).numpy() for x in features]).astype(np.float64)
    bias = model.get_submodule(fit.module).bias is not None
    for k in range(4):
        rest = fit.fold != k
        refit = Ridge(alpha=0.7, fit_intercept=bias).fit(X[rest], targets[rest])
        np.testing.assert_allclose(fit.held_out[~rest], refit.predict(X[~rest]), atol=1e-4)
    fit.write(model, 0)
    with torch.no_grad():
        logits = model(**inputs).logits.numpy()
    np.testing.assert_allclose(logits[fit.fold == 0], fit.held_out[fit.fold == 0], atol=1e-4)


def test_refusals():
    model = tiny_model("bert", num_labels=2)
    inputs = tiny_inputs(model, [3, 4, 5], 5)
    for targets, options, message in [
        (np.zeros((2, 2)), {}, r"targets: expected \(3, C\)"),
        (np.zeros((3, 3)), {}, "expected 2 columns"),
        (np.zeros((3, 2)), {"folds": 1}, "2 folds"),
        (np.zeros((3, 2)), {"ridge": -1.0}, "ridge: expected 'loo' or a positive number"),
    ]:
        with pytest.raises(InputError, match=message):
            fit_head(model, inputs, targets, **options)

    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(2, 2))

        def forward(self, x):
            return x @ self.w

    with pytest.raises(InputError, match="no nn.Linear of the model makes its logits"):
        fit_head(Odd(), {"x": torch.randn(3, 2)}, np.zeros((3, 2)))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_head_of_zeros_reads_the_same_features(kind):
    # Every token's output is then equal to the logits; the fit must still use the last token's features.
    model = tiny_model(kind, num_labels=2)
    inputs = tiny_inputs(model, [2 + i % 9 for i in range(N)], 12)
    targets = np.random.default_rng(0).normal(size=(N, 2))
    usual = fit_head(model, inputs, targets, ridge=0.7)
    with torch.no_grad():
        model.score.weight.zero_()
    zero = fit_head(model, inputs, targets, ridge=0.7)
    np.testing.assert_allclose(zero.fitted, usual.fitted, atol=1e-5)


def test_a_head_that_averages_tokens_is_refused():
    class Averaging(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.score = torch.nn.Linear(4, 2)

        def forward(self, x):
            return self.score(x).mean(1)

    torch.manual_seed(0)
    with pytest.raises(InputError, match="no nn.Linear of the model makes its logits"):
        fit_head(Averaging(), {"x": torch.randn(5, 3, 4)}, np.zeros((5, 2)))
    # Equal tokens have the mean as their output; what is fitted must still be what the logits come from.
    with pytest.raises(InputError, match="no nn.Linear of the model makes its logits"):
        fit_head(Averaging(), {"x": torch.ones(5, 2, 4)}, np.zeros((5, 2)))


def test_a_saved_classifier_inside_peft(tmp_path):
    lora = {"r": 2, "target_modules": ["query"], "modules_to_save": ["classifier"]}
    model = load_model(save_tiny(tmp_path / "m"), peft=lora)
    inputs = tiny_inputs(model, [2 + i % 9 for i in range(N)], 12)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fit = fit_head(model, inputs, np.random.default_rng(0).normal(size=(N, 2)), ridge=0.7)
    with torch.no_grad():
        np.testing.assert_allclose(model(**inputs).logits.numpy(), fit.fitted, atol=1e-4)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"{fit.module}.weight", f"{fit.module}.bias"}
    assert "modules_to_save" in fit.module


@pytest.mark.parametrize("kind", ["bert", "llama"])  # with a bias, and without
def test_penalty_is_the_best_leave_one_out(kind):
    model = tiny_model(kind, num_labels=2)
    inputs = tiny_inputs(model, [2 + i % 9 for i in range(N)], 12)
    with torch.no_grad():  # linear in the features, and noise: a best penalty inside the grid
        signal = model(**inputs).logits.double().numpy()
    targets = signal / signal.std() + np.random.default_rng(0).normal(size=(N, 2)) * 0.3
    fit = fit_head(model, inputs, targets, ridge="loo", folds=N)

    def leave_one_out(ridge):
        return np.mean((fit_head(model, inputs, targets, ridge=ridge, folds=N).held_out - targets) ** 2)

    best = leave_one_out(fit.ridge)
    assert best == pytest.approx(np.mean((fit.held_out - targets) ** 2))
    assert all(best <= leave_one_out(fit.ridge * factor) for factor in (0.1, 0.5, 2.0, 10.0))


def test_a_new_head_is_told_of_once_until_it_is_fitted(tmp_path, caplog):
    saved = save_tiny(tmp_path / "body", head=False)
    model = load_model(saved)
    inputs = tiny_inputs(model, [3, 4, 5, 6], 6)
    for _ in range(2):
        compute_gram(model, inputs, readout="margin", params="*.layer.*", check=False)
    assert [record.message for record in caplog.records] == [
        f"{saved}: its classification head is new, that is random, and so are the outputs; fit it on labels first "
        "(fit_head; commands do unless told not to), or train it"
    ]
    caplog.clear()
    other, third = load_model(saved), load_model(saved)
    fit_head(other, inputs, np.eye(2)[[0, 1, 0, 1]], folds=2)
    compute_gram(other, inputs, params="*.layer.*", check=False)
    compute_gram(third, inputs, readout=lambda out, _: out.logits, params="*.layer.*", check=False)
    fine_tune(third, inputs, np.eye(2)[[0, 1, 0, 1]], learning_rate=1e-3)
    compute_gram(third, inputs, params="*.layer.*", check=False)
    assert not caplog.records
    tangent_factors(load_model(saved), inputs, params="*.layer.*")
    adapted = load_model(saved, peft={"peft_type": "LORA", "r": 2, "target_modules": "query"})
    fine_tune(adapted, inputs, np.eye(2)[[0, 1, 0, 1]], learning_rate=1e-3)
    assert len(caplog.records) == 2


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
    head.write(model, -1)
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
    assert not model.get_submodule(head.module)._forward_pre_hooks


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


class Doubling(torch.nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


@pytest.mark.parametrize("wrap", [
    torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.parametrizations.orthogonal,
    lambda linear: Doubling(linear.in_features, linear.out_features),
])  # fmt: skip
def test_a_head_that_is_no_plain_linear_is_refused_and_left_as_it_was(wrap):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), wrap(torch.nn.Linear(6, 2)))
    before = model[2].weight.detach().clone()
    with pytest.raises(InputError, match=r"fitted weights of 2 the model gives .* for example \d, and its features"):
        fit_head(model, {"x": torch.randn(9, 4)}, np.eye(2)[np.arange(9) % 2])
    assert torch.equal(model[2].weight, before)


def test_what_is_told_of_a_head_is_what_the_model_gives():
    config = tf.XLNetConfig(vocab_size=97, d_model=16, n_layer=2, n_head=2, d_inner=24, num_labels=2)
    torch.manual_seed(0)
    model = tf.XLNetForSequenceClassification(config).eval()  # reads the last column, padding or not
    inputs = tiny_inputs(model, [2 + i % 6 for i in range(12)], 8)
    targets = np.where(np.arange(12)[:, None] % 2, 1.0, -1.0) * [-0.5, 0.5]
    head = fit_head(model, inputs, targets)
    with torch.no_grad():
        np.testing.assert_allclose(model(**inputs).logits.double(), head.fitted, atol=1e-5)
    small = torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.Tanh(), torch.nn.Linear(40, 2)).bfloat16()
    x = torch.randn(40, 30).bfloat16()
    head = fit_head(small, {"x": x}, np.eye(2)[np.arange(40) % 2], ridge=1e-6)
    with torch.no_grad():
        features = small[1](small[0](x)).double().numpy()
    W, b = small[2].weight.detach().double().numpy(), small[2].bias.detach().double().numpy()
    np.testing.assert_allclose(features @ W.T + b, head.fitted, rtol=1e-9, atol=1e-9)


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
    assert calls == (["trace"] * 3 if kind == "odd" else ["per-output"])
    assert kind == "odd" or ranks == [3 * rank]
    assert list(dict(model.named_parameters())) == names
    bounded = cross_fit(model, inputs, head, **options, memory_gib=0.5)
    monkeypatch.setattr(heldout, "_has_room", lambda *_: False)
    calls.clear()
    apart = cross_fit(model, inputs, head, **options)
    assert calls == ["trace"] * 3
    for found in (together, bounded):
        np.testing.assert_allclose(found.grams, apart.grams, rtol=1e-10, atol=1e-12 * np.abs(apart.grams).max())
        np.testing.assert_allclose(found.outputs, apart.outputs, rtol=1e-10, atol=1e-12)
        assert found.kind == apart.kind
