"""The fitted head: ridge regression as scikit-learn does it; held-out outputs from heads that did not see them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tf
from sklearn.linear_model import Ridge

from ntkengine.errors import InputError
from ntkengine.finetune import fine_tune
from ntkengine.gram.engine import compute_gram
from ntkengine.gram.linear import tangent_factors
from ntkengine.inputs.heads import fit_head
from ntkengine.inputs.models import load_model
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
        (np.zeros((3, 2)), {"folds": 1}, "folds: expected an integer >= 2"),
        (np.zeros((3, 2)), {"ridge": -1.0}, "ridge: expected 'loo' or a number > 0, got -1.0"),
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


class Doubling(torch.nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


@pytest.mark.parametrize("wrap", [
    torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.parametrizations.orthogonal,
    torch.nn.utils.parametrizations.spectral_norm,
    lambda linear: Doubling(linear.in_features, linear.out_features),
])  # fmt: skip
def test_a_head_that_is_no_plain_linear_is_refused_and_left_as_it_was(wrap):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), wrap(torch.nn.Linear(6, 2)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    computed = isinstance(model[2], torch.nn.Linear) and torch.nn.utils.parametrize.is_parametrized(model[2])
    why = "the weight of 2 is computed" if computed else r"the model gives .* for example \d, and its features"
    with pytest.raises(InputError, match=f"{why}.*: it is no plain Linear"):
        fit_head(model, {"x": torch.randn(9, 4)}, np.eye(2)[np.arange(9) % 2])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


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
