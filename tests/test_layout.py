"""Memory budgets: every layout gives the same Gram, the layout fits the budget, too small a budget is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ntkengine.errors import InputError
from ntkengine.gram import planning
from ntkengine.gram.engine import compute_gram
from ntkengine.gram.fitting import GIB, fit
from ntkengine.gram.foresight import plan_gram
from ntkengine.gram.layout import Layout, Needs
from ntkengine.tangents.hidden import Hidden
from tests.brute import relative_error, tiny_inputs, tiny_model, with_lora

LENGTHS = [3, 9, 12, 5, 7, 1, 8]
LAYOUTS = {
    "disk": Layout(hidden="disk", microbatch_tokens=20),
    "host": Layout(hidden="host", microbatch_tokens=20),
    "split": Layout(factor_bytes=1.0, microbatch_tokens=20),
    "tiles": Layout(tile=3),
    "single samples": Layout(tile=1),
    "all": Layout(hidden="disk", factor_bytes=40_000.0, microbatch_tokens=15, tile=2, gradients=1 << 10),
}


def forced(monkeypatch, layout):
    monkeypatch.setattr(planning, "bounds", lambda *_: layout)
    monkeypatch.setattr(planning, "fit", lambda *_, **__: layout)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_every_layout_gives_the_same_gram(monkeypatch, name, kind):
    model = tiny_model(kind)
    tiles = LAYOUTS[name].tile
    lengths = LENGTHS[: {1: 2, 2: 4}.get(tiles)]  # a sweep for each pair of tiles
    inputs, held = tiny_inputs(model, lengths, 12), tiny_inputs(model, [4, 12, 6], 12, seed=1)
    samples = len(lengths) + 3
    arguments = {"params": "all", "precision": "exact", "per_module": True, "eval_inputs": held, "contraction": "full"}
    plain = compute_gram(model, inputs, **arguments)
    forced(monkeypatch, LAYOUTS[name])
    laid = compute_gram(model, inputs, **arguments)
    assert max(relative_error(laid.values, plain.values)) < 1e-12
    assert max(relative_error(laid.cross, plain.cross)) < 1e-12
    assert max(relative_error(laid.outputs, plain.outputs)) < 1e-12
    for module, part in plain.modules.items():
        assert np.linalg.norm(laid.modules[module] - part) <= 1e-12 * np.linalg.norm(plain.values)
    assert laid.meta["module_trace"] == pytest.approx(plain.meta["module_trace"], rel=1e-9)
    assert laid.plan.sweeps == (1 if not tiles else -(-samples // tiles) * (-(-samples // tiles) + 1) // 2)


@pytest.mark.parametrize("transform", ["sgd", "sign", "asymmetric-sign"])
@pytest.mark.parametrize("contraction", ["trace", "per-output", "sum-of-outputs"])
def test_tiles_under_every_contraction(monkeypatch, transform, contraction):
    model = with_lora(tiny_model("bert"), ["query", "value"], away_from_start=True)
    lengths = [3, 9, 12, 5, 7, 2, 8]  # one token attends to nothing else: its queries' gradients are rounding
    rows, columns = tiny_inputs(model, lengths, 12), tiny_inputs(model, [4, 12, 6, 2], 12, seed=1)
    arguments = {"precision": "exact", "transform": transform, "contraction": contraction}
    for pair in ((rows,), (rows, columns)):
        monkeypatch.undo()
        plain = compute_gram(model, *pair, **arguments)
        forced(monkeypatch, LAYOUTS["tiles"])
        assert max(relative_error(compute_gram(model, *pair, **arguments).values, plain.values)) < 1e-12


def test_a_budget_is_met_by_the_plan_or_refused():
    model = tiny_model("bert")
    inputs = tiny_inputs(model, LENGTHS * 8, 12)
    free = plan_gram(model, inputs, params="all")
    least = None
    for budget in (1.0, 0.02, 0.018, 0.0175):
        try:
            plan = plan_gram(model, inputs, params="all", memory_gib=budget)
        except InputError as error:
            least = float(str(error).split("at least ")[1].split(" GiB")[0])
            break
        assert plan.peak_bytes <= budget * GIB
        assert plan.layout["microbatch_tokens"] <= free.layout["microbatch_tokens"]
    tiny = 1e-5
    with pytest.raises(InputError, match="needs at least") as caught:
        plan_gram(model, inputs, params="all", memory_gib=tiny)
    least = float(str(caught.value).split("at least ")[1].split(" GiB")[0])
    assert plan_gram(model, inputs, params="all", memory_gib=least).peak_bytes <= least * GIB
    with pytest.raises(InputError, match="a number > 0"):
        compute_gram(model, inputs, params="all", memory_gib=0)


def test_the_fastest_layout_that_fits():
    needs = Needs(
        samples=64, tokens=8192, gram=1e6, hidden=4e8, cotangents=2e7, factors=[{"a": 1e8, "b": 1e8}, {"c": 5e7}],
        feature_tile=1e6, activations=1e5, weights=0.0, entry=4,
    )  # fmt: skip
    peaks = []
    for gib in (10, 0.75, 0.5, 0.3, 0.2, 0.1):
        layout = fit(needs, gib, spill="disk")
        peaks.append(needs.peak(layout))
        assert peaks[-1] <= gib * GIB
    assert fit(needs, 10, spill="disk").hidden == "device"
    assert fit(needs, 10, spill="disk").microbatch_tokens == 2048
    assert fit(needs, 0.5, spill="disk").hidden == "disk"
    assert fit(needs, 0.5, spill="disk").factor_bytes == float("inf")
    assert fit(needs, 0.2, spill="disk").factor_bytes < 2e8
    assert fit(needs, 0.2, spill="disk").tile == 0
    assert fit(needs, 0.1, spill="disk").tile > 0
    with pytest.raises(InputError, match=r"memory_gib=0.001: this job needs at least .* GiB above the model"):
        fit(needs, 0.001, spill="disk")


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_hidden_states_come_back_as_they_were(place):
    hidden = Hidden(place)
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    tensors = {(i, s): torch.randn(3, i + 1, 5, dtype=dtype) for i, dtype in enumerate(dtypes) for s in (1, 2)}
    for key, tensor in tensors.items():
        hidden.put(*key, tensor)
    for key, tensor in reversed(tensors.items()):
        assert torch.equal(hidden.take(*key, keep=True), tensor)
        assert torch.equal(hidden.take(*key), tensor)
        with pytest.raises(KeyError):
            hidden.take(*key)
    hidden.close()
