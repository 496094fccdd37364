"""Objects as an interpreter and a notebook show them: short, escaped, and without touching the matrix."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import ntkengine as ntk
from ntkengine.forecast import forecast
from ntkengine.forecast.outcome import Outcome
from ntkengine.forecast.ranking import Choice, Ranking
from ntkengine.gram.foresight import plan_gram
from ntkengine.gram.result import Gram
from ntkengine.recipe import Recipe
from ntkengine.store import open_gram
from tests.brute import tiny_inputs, tiny_model
from tests.test_report import Page

NASTY = "<script>alert('&')</script>"


class Untouchable:
    """A matrix whose entries nobody may read."""

    shape = (100_000, 100_000)

    def __array__(self, *_, **__):
        raise AssertionError

    def __getitem__(self, _):
        raise AssertionError


def page(shown):
    """Return the cells and other texts of a well-formed piece of HTML."""
    found = Page()
    found.feed(shown)
    assert found.open == []
    assert "script" not in found.tags
    return found.data


def test_gram_tells_the_essentials_and_reads_nothing():
    gram = Gram(
        Untouchable(), np.zeros((3, 1)), "trace", "sgd", 1.2e-5, cross=Untouchable(), path=NASTY,
        meta={"readout": "margin", "precision": "high", "sketch": {"features": 64}},
    )  # fmt: skip
    line = repr(gram)
    for text in ("100000 × 100000", "readout margin", "contraction trace", "noise ± 1.2e-05", "64 features", NASTY):
        assert text in line
    assert "\n" not in line
    told = page(gram._repr_html_())
    assert NASTY in told
    assert "100000 × 100000" in told
    bare = repr(Gram(Untouchable(), np.zeros((3, 1)), "trace", "sgd", float("nan")))
    assert "noise not estimated" in bare
    assert "file" not in bare


def test_gram_of_a_file_reads_no_entry(gram_file, monkeypatch):
    import h5py

    gram = open_gram(gram_file)

    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(h5py.Dataset, "__getitem__", refuse)
    assert str(gram_file) in repr(gram)
    assert "7 × 7" in page(gram._repr_html_())


def test_plan():
    model = tiny_model("bert", num_labels=2)
    plan = plan_gram(model, tiny_inputs(model, [5, 3, 4], 6), params="*.layer.*")
    line = repr(plan)
    assert len(line) < 400
    for text in ("examples 3", "tokens 12", "outputs 2", f"parameter tensors {len(plan.parameters)}", "GFLOP", "MiB"):
        assert text in line
    assert "3" in page(plan._repr_html_())
    plan.parameters[0].strategy = NASTY
    assert any(NASTY in text for text in page(plan._repr_html_()))


@pytest.fixture(scope="module")
def found():
    rng = np.random.default_rng(0)
    Z = rng.standard_normal((30, 40))
    return forecast(Z @ Z.T, np.sign(Z[:, :1]))


def test_forecast(found):
    line = repr(found)
    assert "30 train" in line
    assert "leave-one-out mse" in line
    assert str(found.condition) in line
    assert len(line) < 500
    told = page(found._repr_html_())
    printed = str(found).splitlines()
    assert len(printed) == len(found.table()) + len(found.assumptions)
    assert printed[-1] == f"- {found.assumptions[-1]}"
    for label, value in found.table():
        assert any(line.startswith(label) and line.endswith(f"   {value}") for line in printed)
        assert label in told
        assert value in told
    assert any(found.assumptions[0] in text for text in told)


def test_ranking():
    choices = [
        Choice(
            f"{NASTY}{i}", (f"layer.{i}",), 1000 + i, Outcome(0.5, (0.4 + i, 0.3, 0.6), (0.8, 0.7, 0.9), 0.1, 0.0, 0.0)
        )
        for i in range(12)
    ]
    ranking = Ranking(choices, 8, 16.0, Recipe(1e-3, epochs=4), ["a"])
    lines = repr(ranking).splitlines()
    assert lines[0] == "Ranking of 12 subsets, LoRA of rank 8, adam, learning rate 0.001, epochs 4"
    assert lines[1] == f"  1. {NASTY}0: eval loss 0.4 (0.3 to 0.6), 1,000 parameters"
    assert lines[-1] == "  and 2 more"
    assert len(lines) == 12
    told = page(ranking._repr_html_())
    assert f"{NASTY}9" in told
    assert f"{NASTY}10" not in told
    assert any("the best 10 of 12" in text for text in told)
    told = page(replace(ranking, start=choices[0].outcome)._repr_html_())
    assert f"{NASTY}9" in told
    assert f"{NASTY}10" not in told
    assert "before training" in told


def test_what_holds_arrays_prints_in_a_line():
    examples = ntk.read_examples([{"text": f"text {i}", "label": i % 2} for i in range(50)])
    assert repr(examples) == "Examples(50 from list, classes '0', '1')"
    K = np.diag(np.arange(1.0, 41.0))
    shown = repr(ntk.eigsh(K, k=20))
    assert shown.startswith("Ritz(20 values: 40 ± ")
    assert ", …, 21 ± " in shown
    assert len(shown) < 250
    held = ntk.CrossFit(np.arange(6) % 2, np.zeros((2, 6, 6)), np.zeros((2, 6, 1)))
    assert repr(held) == "CrossFit(2 folds of 6 examples, C = 1)"
    model = tiny_model("bert")
    inputs = tiny_inputs(model, [3, 5, 4], 6)
    run = ntk.fine_tune(
        model, inputs, np.eye(3), params="all", epochs=2, batch_size=3, learning_rate=0.01, optimizer="sgd"
    )
    assert repr(run).startswith("FineTuning(2 steps of sgd: train loss ")
