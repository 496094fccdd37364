"""Lip(∇f) against Hessians written out, and the published bounds against gradient descent."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

import ntkengine as ntk
from ntkengine.finetune.bounds import linearity_bounds
from ntkengine.finetune.curvature import gradient_lipschitz
from tests.brute import tiny_inputs, tiny_model, with_lora
from tests.test_finetune_models import Mean, Mixing, padded
from tests.test_linearize import TARGETS


def small(outputs, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double(), {"x": torch.randn(3, 3).double()}


def hessians(model, inputs, names):
    """Return (N·C, P, P) float64, by brute force."""
    model = copy.deepcopy(model).eval()
    if hasattr(model, "config"):
        model.base_model.model.set_attn_implementation("eager")  # the fused one cannot be differentiated twice
    args, kwargs = ((), inputs) if hasattr(model, "config") else (tuple(inputs.values()), {})
    held = {n: p.detach() for n, p in model.named_parameters()}
    sizes = [held[n].numel() for n in names]

    def f(theta):
        parts = {n: t.reshape(held[n].shape) for n, t in zip(names, theta.split(sizes), strict=True)}
        out = functional_call(model, {**held, **parts}, args, kwargs)
        return (out if isinstance(out, torch.Tensor) else out.logits).reshape(-1)

    theta = torch.cat([held[n].reshape(-1) for n in names])
    rows = [torch.autograd.functional.hessian(lambda t, i=i: f(t)[i], theta) for i in range(len(f(theta)))]
    return torch.stack(rows).numpy()


def test_of_one_output_it_is_the_spectral_norm_of_the_hessian():
    model, inputs = small(1)
    one = {"x": inputs["x"][:1]}
    (H,) = hessians(model, one, [n for n, _ in model.named_parameters()])
    values = np.linalg.eigvalsh(H)
    assert -values[0] > 0.5 * values[-1]  # of both signs
    found = gradient_lipschitz(model, one, iterations=500, tol=1e-9)
    assert found.value == pytest.approx(np.abs(values).max(), rel=1e-5)
    assert found.value <= np.abs(values).max() * (1 + 1e-12)
    assert found.converged
    assert all(b >= a * (1 - 1e-12) for a, b in zip(found.path, found.path[1:], strict=False))


def test_of_two_outputs_it_is_the_largest_over_their_combinations():
    model, inputs = small(2)
    one = {"x": inputs["x"][:1]}
    T = hessians(model, one, [n for n, _ in model.named_parameters()])
    angles = np.linspace(0, np.pi, 20001)
    truth = max(np.abs(np.linalg.eigvalsh(np.cos(a) * T[0] + np.sin(a) * T[1])[[0, -1]]).max() for a in angles)
    found = gradient_lipschitz(model, one, iterations=500, starts=4, tol=1e-9)
    assert found.value == pytest.approx(truth, rel=1e-6)
    assert max(found.starts) == found.value


def test_of_many_outputs_it_bounds_how_the_jacobian_turns():
    model, inputs = small(2)
    names = [n for n, _ in model.named_parameters()]
    T = hessians(model, inputs, names)
    found = gradient_lipschitz(model, inputs, iterations=300, starts=6, tol=1e-9)
    random = np.random.default_rng(0)
    for _ in range(50):
        u = random.standard_normal(T.shape[1])
        assert np.linalg.norm(np.einsum("kpq,q->kp", T, u / np.linalg.norm(u)), 2) <= found.value * (1 + 1e-9)
    w = random.standard_normal(len(T))
    assert np.abs(np.linalg.eigvalsh(np.einsum("k,kpq->pq", w / np.linalg.norm(w), T))).max() <= found.value


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_transformers_with_adapters(kind):
    model = with_lora(tiny_model(kind, 1), TARGETS[kind][:1], away_from_start=True).double()
    inputs = tiny_inputs(model, [4, 6], 6)
    names = [n for n, _ in model.named_parameters() if "layers.1." in n or "layer.1." in n or "h.1." in n]
    names = [n for n in names if "lora_" in n]
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    T = hessians(model, inputs, names)
    angles = np.linspace(0, np.pi, 721)
    truth = max(np.abs(np.linalg.eigvalsh(np.cos(a) * T[0] + np.sin(a) * T[1])).max() for a in angles)
    found = gradient_lipschitz(model, inputs, params=names, iterations=40, starts=1, tol=1e-5)
    assert truth > 0
    assert 0.99 * truth < found.value < truth * (1 + 1e-5)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_of_a_linear_model_it_is_zero():
    found = gradient_lipschitz(nn.Linear(3, 2), {"x": torch.randn(4, 3)})
    assert (found.value, found.path, found.converged) == (0.0, [0.0], True)


def test_the_same_seed_finds_the_same():
    model, inputs = small(2)
    found = [gradient_lipschitz(model, inputs, seed=s) for s in (1, 1, 2)]
    assert found[0] == found[1]
    assert found[0].path[0] != found[2].path[0]


@pytest.mark.parametrize("proximal", [0.0, 0.5])
def test_bounds_hold_for_gradient_descent(proximal):
    model, inputs = small(2)
    y = np.random.default_rng(0).choice([-1.0, 1.0], size=(3, 2))
    J = ntk.compute_gram(model, inputs, contraction="full", precision="exact")
    rate, steps = 0.01, 100
    found = linearity_bounds(model, inputs, y, time=rate * steps, proximal=proximal)
    assert found.lipschitz == pytest.approx(np.sqrt(np.linalg.eigvalsh(np.asarray(J))[-1]), rel=1e-3)
    assert found.residual_norm == pytest.approx(np.linalg.norm(J.outputs - y))
    run = ntk.fine_tune(
        model,
        inputs,
        y,
        learning_rate=rate,
        optimizer="sgd",
        epochs=steps,
        batch_size=0,
        linear=True,
        proximal=proximal,
    )
    last = run.history[-1]
    reach = 1 - np.exp(-proximal) if proximal else 1.0
    radius = found.lipschitz * found.residual_norm / 3 * (reach / proximal if proximal else 1.0)
    assert found.displacement == pytest.approx(radius)
    turn = 2 * radius * found.gradient_lipschitz + found.lipschitz
    assert found.gap == pytest.approx(found.lipschitz * found.residual_norm * turn / 3)
    assert 0 < last.displacement < found.displacement
    assert 0 < last.gap < found.gap
    assert found.to_dict()["gap"] == found.gap


def test_padding_that_f_reads_is_not_cut():
    torch.manual_seed(0)
    model, inputs = Mean().double(), {k: v[[1, 3, 2, 0]] for k, v in padded().items()}
    for p in model.parameters():
        p.data *= 0.3
    found = gradient_lipschitz(model, inputs, tol=1e-9, iterations=200)
    whole = gradient_lipschitz(model, {"input_ids": inputs["input_ids"]}, tol=1e-9, iterations=200)
    assert found.value == pytest.approx(whole.value, rel=1e-9)
    with pytest.raises(ntk.CheckFailed, match="f of example 0 depends on the other examples"):
        gradient_lipschitz(Mixing(), {"x": torch.randn(4, 4)})


def test_bad_input():
    model, inputs = small(2)
    for call, message in (
        (lambda: gradient_lipschitz(model, inputs, iterations=0), "iterations, starts: expected at least 1"),
        (lambda: gradient_lipschitz(model.to(torch.bfloat16), inputs), "float32 or float64"),
        (lambda: linearity_bounds(small(2)[0], inputs, np.ones(3), time=1.0), "targets: expected"),
        (
            lambda: linearity_bounds(small(2)[0], inputs, np.ones((3, 2)), time=-1.0),
            "time: expected a finite number >= 0",
        ),
    ):
        with pytest.raises(ntk.InputError, match=message):
            call()
