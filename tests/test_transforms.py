"""Signs and preconditioners against brute force on whole per-sample gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ntkengine as ntk
from ntkengine.errors import InputError, NonFinite
from ntkengine.gram import lookup, strategies
from ntkengine.gram.engine import compute_gram
from ntkengine.gram.foresight import plan_gram
from ntkengine.gram.transforms import Preconditioner, signed
from tests import zoo
from tests.brute import contracted, gradients, relative_error, tiny_inputs, tiny_model, with_lora

TOLERANCE = {"exact": 1e-9, "high": 1e-5}
CONTRACTIONS = ("trace", "full", "per-output")
SUM = "sum-of-outputs"


def summed(out, _inputs):
    return out.logits.sum(1, keepdim=True)


def above(model, G, names, relative):
    """Which entries of gradients (N, C, P) are above a share of their parameter's largest."""
    found = np.zeros_like(G)
    at = 0
    for name, p in model.named_parameters():
        if name in names:
            part = np.abs(G[:, :, at : at + p.numel()])
            found[:, :, at : at + p.numel()] = (part > relative * part.max(2, keepdims=True)) & (
                part.max() > 1e-13 * np.abs(G).max()
            )
            at += p.numel()
    return found


def signs(model, G, names):
    """Signs of gradients (N, C, P); an entry that is nothing but rounding has none."""
    return np.sign(G) * above(model, G, names, 1e-12)


@pytest.fixture(scope="module", params=["bert", "gpt2", "llama", "gpt2-lora"])
def case(request):
    kind, _, lora = request.param.partition("-")
    model = tiny_model(kind)
    if lora:
        model = with_lora(model, {"gpt2": ["c_attn"], "bert": ["query", "value"]}[kind], away_from_start=True)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    inputs, eval_inputs = tiny_inputs(model, zoo.LENGTHS, 12), tiny_inputs(model, zoo.EVAL_LENGTHS, 12, seed=1)
    truth = {f: [gradients(model, x, names, f) for x in (inputs, eval_inputs)] for f in (None, summed)}
    return model, names, inputs, eval_inputs, truth


@pytest.mark.parametrize("contraction", [*CONTRACTIONS, SUM])
@pytest.mark.parametrize("transform", ["sign", "asymmetric-sign"])
@pytest.mark.parametrize("precision", ["exact", "high"])
def test_signs_equal_brute_force(case, transform, contraction, precision):
    model, names, inputs, eval_inputs, truth = case
    G, H = truth[summed if contraction == SUM else None]
    SG, SH = (signs(model, x, names) for x in (G, H))
    left, right = (SG, SH) if transform == "sign" else (G, H)
    arguments = {"contraction": contraction, "transform": transform, "precision": precision}
    gram = compute_gram(model, inputs, eval_inputs=eval_inputs, **arguments)
    assert gram.transform == transform
    if transform == "sign":
        assert np.array_equal(np.asarray(gram.values), np.asarray(gram.values).swapaxes(-1, -2))
    two = compute_gram(model, eval_inputs, inputs, check=False, **arguments)
    for got, rows, raw in ((gram.values, left, G), (gram.cross, right, H), (two.values, right, H)):
        expected = contracted(rows, SG, contraction)
        # float32 cannot know the sign of an entry 3e-7 of the largest: there, and only there, it may be another.
        unsure_rows, unsure = (above(model, x, names, 1e-12) - above(model, x, names, 3e-7) for x in (raw, G))
        slack = 2 * contracted(np.abs(rows), unsure, contraction)
        if transform == "sign":
            slack += 2 * contracted(unsure_rows, np.abs(SG), contraction)
        slack *= precision == "high"
        assert unsure.mean() < 1e-3
        error = np.clip(np.abs(np.asarray(got) - expected) - slack, 0, None)
        assert np.isfinite(got).all()
        assert error.max() < TOLERANCE[precision] * np.abs(expected).max()
        assert np.linalg.norm(error) < TOLERANCE[precision] * np.linalg.norm(expected)


@pytest.mark.parametrize("contraction", [*CONTRACTIONS, SUM])
@pytest.mark.parametrize("precision", ["exact", "high"])
def test_a_preconditioner_equals_brute_force(case, contraction, precision):
    model, names, inputs, eval_inputs, truth = case
    G, H = truth[summed if contraction == SUM else None]
    torch.manual_seed(0)
    d = {n: torch.rand(p.shape, dtype=torch.float64).square() for n, p in model.named_parameters() if n in names}
    root = torch.cat([d[n].reshape(-1) for n, _ in model.named_parameters() if n in names]).sqrt().numpy()
    gram = compute_gram(
        model,
        inputs,
        eval_inputs=eval_inputs,
        transform=Preconditioner(d),
        contraction=contraction,
        precision=precision,
    )
    assert gram.transform == "preconditioner"
    assert max(relative_error(gram.values, contracted(G * root, G * root, contraction))) < TOLERANCE[precision]
    assert max(relative_error(gram.cross, contracted(H * root, G * root, contraction))) < TOLERANCE[precision]


@pytest.mark.parametrize("scale", [0.7, 1e3])
def test_the_noise_of_a_preconditioned_gram_counts_the_rounding_of_its_roots(scale):
    model = tiny_model("bert")
    inputs = tiny_inputs(model, [5, 7, 4, 6], 7)
    transform = Preconditioner({name: torch.full_like(p, scale) for name, p in model.named_parameters()})
    gram = compute_gram(model, inputs, params="all", transform=transform)
    J = gradients(model, inputs, [name for name, _ in model.named_parameters()])
    d = float(torch.tensor(scale))  # float32, as it was given
    error = np.linalg.norm(np.asarray(gram.values) - d * contracted(J, J, "trace"), 2)
    assert 0 < error <= 1.01 * gram.noise


@pytest.mark.parametrize("name", ["albert", "bert-mlm", "mixtral", "t5"])
def test_signs_of_shared_parameters_are_of_the_sum_over_uses(name):
    model = zoo.model(name)
    inputs = zoo.inputs(name, model, zoo.LENGTHS)
    names = {n for n, _ in model.named_parameters()}
    readout = zoo.READOUTS.get(name)
    S = signs(model, gradients(model, inputs, names, readout), names)
    gram = compute_gram(model, inputs, params="all", readout=readout or "logits", transform="sign", precision="exact")
    assert max(relative_error(gram.values, contracted(S, S, "trace"))) < 1e-9


def test_signs_do_not_depend_on_tiles(monkeypatch):
    model = tiny_model("gpt2")
    inputs = tiny_inputs(model, zoo.LENGTHS, 12)
    for transform in ("sign", "asymmetric-sign"):
        reference = compute_gram(model, inputs, params="all", precision="exact", transform=transform)
        with monkeypatch.context() as patch:
            patch.setattr(strategies, "TILE_PARAMETERS", 96)
            patch.setattr(strategies, "COLUMNS", 7)
            patch.setattr(lookup, "_PAIR_BYTES", 1000)
            again = compute_gram(model, inputs, params="all", precision="exact", transform=transform)
        assert max(relative_error(again.values, reference.values)) < 1e-12


def test_a_parameter_that_is_only_rounding_has_no_sign_and_is_listed():
    model = tiny_model("bert")
    inputs = tiny_inputs(model, zoo.LENGTHS, 12)
    keys = [f"bert.encoder.layer.{i}.attention.self.key.bias" for i in range(3)]
    assert plan_gram(model, inputs, params="all").negligible == keys
    gram = compute_gram(model, inputs, params="all", transform="sign")
    assert gram.plan.negligible == keys
    assert {row.strategy for row in gram.plan.parameters if row.parameter in keys} == {"zero"}


def test_what_is_not_finite_has_no_sign():
    g = torch.tensor([2.0, -3.0, 0.0, float("nan"), float("inf"), -float("inf"), 1e-9])
    assert torch.equal(torch.isnan(signed(g)), ~torch.isfinite(g))
    assert signed(g)[[0, 1, 2, 6]].tolist() == [1.0, -1.0, 0.0, 1.0]
    floored = signed(g, torch.tensor(1e-6))
    assert floored[6] == 0
    assert torch.equal(torch.isnan(floored), ~torch.isfinite(g))


class Overflowing(torch.nn.Module):
    """A gradient that is infinite for large inputs, and only for those."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(x) * 1e20


def test_an_infinite_gradient_stops_a_sign_gram():
    torch.manual_seed(0)
    x = torch.randn(9, 3)
    x[4] = 1e30
    with pytest.raises(NonFinite):
        compute_gram(Overflowing(), {"x": x}, params="all", transform="sign", check=False)


def adam_state(model, inputs, *, steps=3, parameters=None, cls=torch.optim.AdamW, **settings):
    optimizer = cls(parameters or [p for p in model.parameters() if p.requires_grad], lr=1e-3, **settings)
    for step in range(steps):
        optimizer.zero_grad()
        (model(**inputs).logits * (step + 1)).square().mean().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("settings", [{}, {"amsgrad": True}, {"cls": torch.optim.Adam, "betas": (0.8, 0.99)}])
def test_an_adam_state_gives_its_own_step(settings):
    model = with_lora(tiny_model("bert"), ["query", "value"], away_from_start=True)
    inputs = tiny_inputs(model, zoo.LENGTHS, 12)
    optimizer = adam_state(model, inputs, **settings)
    state = optimizer.state_dict()
    d = Preconditioner.from_optimizer(state, model).scale
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert set(d) == {n for n, _ in trained}
    for index, (name, _) in enumerate(trained):
        found = state["state"][index]
        v = found["max_exp_avg_sq"] if settings.get("amsgrad") else found["exp_avg_sq"]
        beta = settings.get("betas", (0.9, 0.999))[1]
        expected = 1 / ((v.double() / (1 - beta**3)).sqrt() + 1e-8)
        assert torch.allclose(d[name], expected, rtol=1e-12)
    names = set(d)
    root = torch.cat([d[n].reshape(-1) for n, _ in trained]).sqrt().numpy()
    G = gradients(model, inputs, names)
    gram = compute_gram(model, inputs, transform=ntk.Preconditioner.from_optimizer(state, model), precision="exact")
    assert max(relative_error(gram.values, contracted(G * root, G * root, "trace"))) < 1e-9


def test_groups_of_an_optimizer():
    model = tiny_model("bert")
    inputs = tiny_inputs(model, zoo.LENGTHS, 12)
    named = list(model.named_parameters())
    decayed, plain = [x for x in named if x[1].ndim > 1], [x for x in named if x[1].ndim == 1]
    by_name = [{"params": decayed, "lr": 1e-3}, {"params": plain, "lr": 1e-4, "weight_decay": 0.0}]
    state = adam_state(model, inputs, parameters=by_name).state_dict()
    found = Preconditioner.from_optimizer(state, model)
    assert list(found.scale) == [n for n, _ in decayed + plain]
    shuffled = [x for i in (2, 0, 1) for x in named[i::3]]  # as no state tells without names, but the optimizer does
    optimizer = adam_state(model, inputs, parameters=[p for _, p in shuffled])
    known = Preconditioner.from_optimizer(optimizer, model).scale
    assert list(known) == [n for n, _ in shuffled]
    last = optimizer.state[dict(named)[named[-1][0]]]
    assert torch.allclose(known[named[-1][0]], 1 / ((last["exp_avg_sq"].double() / (1 - 0.999**3)).sqrt() + 1e-8))
    with pytest.raises(InputError, match="expected one of the model's parameters only"):
        Preconditioner.from_optimizer(optimizer, tiny_model("bert"))
    with pytest.raises(InputError, match="expected an Adam or AdamW, got RAdam"):
        Preconditioner.from_optimizer(torch.optim.RAdam(model.parameters()), model)
    with pytest.raises(InputError, match="got AdamW with names, which it knows"):
        Preconditioner.from_optimizer(optimizer, model, [n for n, _ in named])
    first = state["state"][len(decayed)]["exp_avg_sq"].double() / (1 - 0.999**3)
    assert torch.allclose(found.scale[plain[0][0]], 0.1 / (first.sqrt() + 1e-8))
    for group, rate in zip(state["param_groups"], (1e-3, 1e-4), strict=True):  # as a schedule leaves them at its end
        group |= {"lr": 0.0, "initial_lr": rate}
    ended = Preconditioner.from_optimizer(state, model)
    assert all(torch.allclose(ended.scale[n], found.scale[n], rtol=1e-6) for n in found.scale)
    for group in state["param_groups"]:
        group.pop("initial_lr")
    with pytest.raises(InputError, match="expected learning rates of its groups, got 0 in all"):
        Preconditioner.from_optimizer(state, model)
    for group, rate in zip(state["param_groups"], (1e-3, 1e-4), strict=True):
        group |= {"lr": rate}
        group.pop("param_names")
    with pytest.raises(InputError, match="which of its 57 parameters is which is unknown; give names in its order"):
        Preconditioner.from_optimizer(state, model)
    again = Preconditioner.from_optimizer(state, model, [n for n, _ in decayed + plain])
    assert all(torch.equal(again.scale[n], found.scale[n]) for n in found.scale)
    with pytest.raises(InputError, match=r"optimizer state: \(97, 32\) for .* give names in the optimizer's order"):
        Preconditioner.from_optimizer(state, model, [n for n, _ in plain + decayed])


def test_bad_preconditioners():
    model = tiny_model("bert")
    inputs = tiny_inputs(model, zoo.LENGTHS, 12)
    whole = {n: torch.ones(p.shape) for n, p in model.named_parameters()}
    cases = {
        "classifier.bias: expected finite values ≥ 0, got -1": {**whole, "classifier.bias": -torch.ones(3)},
        "classifier.bias: expected a floating-point tensor, got int": {**whole, "classifier.bias": 1},
        "classifier.bias is selected but has no scale": {n: d for n, d in whole.items() if n != "classifier.bias"},
        r"classifier.bias: expected shape \(3,\), got \(4,\)": {**whole, "classifier.bias": torch.ones(4)},
    }
    for message, scale in cases.items():
        with pytest.raises(InputError, match=message):
            compute_gram(model, inputs, params="all", transform=Preconditioner(scale))
    for state in ({}, torch.optim.SGD(model.parameters(), lr=1.0).state_dict()):
        with pytest.raises(InputError, match="optimizer state: expected the state_dict"):
            Preconditioner.from_optimizer(state, model)
    with pytest.raises(InputError, match="transform: expected one of 'sgd', 'sign', 'asymmetric-sign', got 'adam'"):
        compute_gram(model, inputs, params="all", transform="adam")


def test_another_preconditioner_is_another_job(tmp_path):
    model = with_lora(tiny_model("bert"), ["query"], away_from_start=True)
    inputs = tiny_inputs(model, zoo.LENGTHS, 12)
    scale = {n: torch.rand(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    out = tmp_path / "k.h5"
    compute_gram(model, inputs, transform=Preconditioner(scale), out=out)
    assert compute_gram(model, inputs, transform=Preconditioner(scale), out=out).transform == "preconditioner"
    for other in ("sgd", Preconditioner({n: 2 * d for n, d in scale.items()})):
        with pytest.raises(InputError, match="holds another job"):
            compute_gram(model, inputs, transform=other, out=out)


def test_an_asymmetric_gram_is_refused_where_a_symmetric_one_is_needed():
    model = tiny_model("bert")
    gram = compute_gram(model, tiny_inputs(model, zoo.LENGTHS, 12), params="all", transform="asymmetric-sign")
    for use in (lambda: ntk.eigsh(gram, k=2), lambda: ntk.KernelRidge(ridge=1.0).fit(gram.values, np.zeros((7, 1)))):
        with pytest.raises(InputError, match="symmetric"):
            use()
