"""The plan is what the run does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ntkengine.gram.engine import compute_gram
from ntkengine.gram.foresight import plan_gram
from ntkengine.gram.heldout import held_out_seconds
from tests.brute import tiny_inputs, tiny_model

LENGTHS = [11, 3, 5, 7, 2, 9, 5]


def test_plan_says_what_the_run_does():
    model = tiny_model("bert")
    inputs = tiny_inputs(model, LENGTHS, 12)
    plan = plan_gram(model, inputs, params="all")
    gram = compute_gram(model, inputs, params="all")
    assert {r.parameter for r in plan.parameters} == {r.parameter for r in gram.plan.parameters}
    assert {r.parameter for r in plan.parameters} == {name for name, _ in model.named_parameters()}
    assert plan.flops > 0
    assert plan.peak_bytes > 0
    assert plan.seconds == plan.probe_seconds + plan.pass_seconds + plan.contract_seconds + plan.check_seconds
    assert min(plan.probe_seconds, plan.pass_seconds, plan.check_seconds) > 0
    assert {r.path for r in plan.parameters} == {"outer", "lookup", "diagonal"}


def test_the_plan_of_an_unchecked_job_has_no_checks():
    model = tiny_model("bert")
    plan = plan_gram(model, tiny_inputs(model, LENGTHS, 12), params="all", check=False)
    assert plan.check_seconds == 0.0


def test_held_out_heads_take_a_backward_pass_each_or_a_sweep_each():
    plan = SimpleNamespace(outputs=1, probe_seconds=1.0, pass_seconds=6.0, contract_seconds=2.0)
    assert held_out_seconds(plan, {"readout": "margin"}, 4, 2, 0.5) == 1.0 + 0.5 * (6 / 3 * 6.0 + 4 * 2.0)
    for call in ({"readout": "margin", "transform": "sign"}, {"readout": "loss"}, {"sketch": 8}):
        assert held_out_seconds(plan, call, 4, 2, 0.5) == 4 * (1.0 + 0.5 * 8.0)
    assert held_out_seconds(plan, {"readout": "margin"}, 4, 3, 0.5) == 4 * (1.0 + 0.5 * 8.0)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_plan_knows_which_tokens_count_in_the_top_block(kind):
    model = tiny_model(kind)
    inputs = tiny_inputs(model, [12] * 6, 12)
    plan = plan_gram(model, inputs, params="all")
    gram = compute_gram(model, inputs, params="all", check=False)
    rows = {r.parameter: (r.strategy, r.tokens, r.flops) for r in plan.parameters}
    assert rows == {r.parameter: (r.strategy, r.tokens, r.flops) for r in gram.plan.parameters}
    assert {1, 12} <= {tokens for _, tokens, _ in rows.values()}  # one token at the top, all of them below
    width, blocks = model.config.hidden_size, model.config.num_hidden_layers
    assert plan.hidden_bytes == 6 * 12 * width * 4 * (blocks + plan.outputs)
