"""What a report says in short: the figures of the objects, held against the start, chance and what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from ntkengine.forecast import forecast
from ntkengine.report import Section, training, verdict, write_report
from tests.madegram import N, made_gram


@pytest.fixture(scope="module")
def gram():
    return made_gram()


@pytest.fixture(scope="module")
def found(gram):
    return forecast(gram, gram.targets)


def test_the_verdict_at_the_top_has_the_figures_of_the_table(found, tmp_path):
    rows = dict(found.table())
    lines = verdict.forecast_verdict(found)
    assert rows["eval accuracy at ridge"] in lines[0]
    accuracy = rows["at the start, eval"].partition("accuracy ")[2]
    assert lines[0].partition("; before it, ")[2].startswith(f"accuracy {accuracy}: ")
    assert rows["share of the largest class"] in lines[1]
    assert f"{found.proximal:.3g}" in lines[2]
    assert lines[3].count("%") == 3
    share = found.start["eval_largest_class"]
    for low, high, told in ((0.0, 1.0, "within"), (share + 0.01, 1.0, "below"), (0.0, share - 0.01, "above")):
        changed = replace(found, eval_accuracy_at_ridge=(low, low, high))
        assert f": {told} the interval" in verdict.forecast_verdict(changed)[1]
    before = found.start["eval_accuracy"]
    for low, high, told in (
        (0.0, 1.0, "within the interval, so not told apart from no training."),
        (before + 0.01, 1.0, "training helps."),
        (0.0, before - 0.01, "training is forecast to make it worse."),
    ):
        changed = replace(found, eval_accuracy_at_ridge=(low, low, high))
        assert verdict.forecast_verdict(changed)[0].endswith(f": {told}")
    page = write_report(tmp_path / "r.html", [Section("first"), Section("a & b", verdict=lines)]).read_text()
    assert page.index("In short") < page.index(lines[0]) < page.index("<h2>first</h2>")
    assert page.count("a &amp; b") == 1
    assert "In short" not in write_report(tmp_path / "r.html", [Section("first")]).read_text()


def test_the_verdict_without_eval_examples_or_classes(gram):
    less = {"cross": None, "eval_outputs": None, "eval_targets": None, "meta": {}}
    alone = forecast(SimpleNamespace(**{**vars(gram), **less}), gram.targets)
    lines = verdict.forecast_verdict(alone)
    assert lines[0].startswith(f"Fine-tuning is forecast to reach leave-one-out accuracy {span(alone)}, a 95 %")
    assert lines[1].startswith("Always naming the largest class gets train 0.")
    assert len(lines) == 3
    values = forecast(gram.values, gram.targets * np.arange(1, N + 1)[:, None])
    assert len(verdict.forecast_verdict(values)) == 2
    assert verdict.forecast_verdict(values)[0].startswith("Fine-tuning is forecast to reach leave-one-out mse ")


def test_a_lower_mse_helps_and_a_ridge_at_the_edge_is_told(gram, found):
    values = forecast(gram.values, gram.targets * np.arange(1, N + 1)[:, None])
    start = values.start["train_mse"]
    for reached, told in ((0.5, "training helps"), (2.0, "training is forecast to make it worse")):
        changed = replace(values, loo=(reached * start, reached * start, reached * start))
        line = verdict.forecast_verdict(changed)[0]
        assert f"before it, mse {start:.4g}: {told}." in line
    rng = np.random.default_rng(1)
    useless = forecast(np.diag(rng.uniform(1.0, 1.1, N)), gram.targets)
    (edge,) = [line for line in useless.assumptions if "leave-one-out optimum is at the largest ridge" in line]
    assert verdict.forecast_verdict(useless)[-1].endswith(f". {edge}")
    assert "largest ridge" not in "".join(verdict.forecast_verdict(found))


def test_the_verdict_of_a_fine_tuning_is_measured_and_held_against_its_forecast(found, tmp_path):
    names = set(training.COLUMNS)
    half, (_, low, high) = found.outputs / 2, found.eval_accuracy_at_ridge
    start = {f"{part}_loss": half * found.start[f"{part}_mse"] for part in ("train", "eval")}
    first = dict.fromkeys(names) | start | {"step": 0, "eval_accuracy": 0.5}
    path = tmp_path / "h.jsonl"

    def told(accuracy, first=first, loss="squared"):
        last = dict.fromkeys(names) | {"step": 9, "train_loss": 0.0625, "eval_loss": 0.25, "eval_accuracy": accuracy}
        recipe = {"optimizer": "sgd", "learning_rate": 1.0, "epochs": 2, "loss": loss}
        head = {"recipe": recipe, "seconds": 1.0, "measuring_seconds": 1.0}
        path.write_text("\n".join(map(json.dumps, (head, first, last))))
        return training.training_section(path, {"k.h5": found}).verdict

    measured = f"eval loss {start['eval_loss']:.4g} → 0.25, eval accuracy 0.5 → {(low + high) / 2:.4g}, train loss"
    assert measured in told((low + high) / 2)[0]
    row = dict(found.table())["eval accuracy at ridge"]
    for accuracy, place in (((low + high) / 2, "within the interval"), (low - 0.1, "below it"), (1.0, "above it")):
        assert told(accuracy)[1:] == [
            f"k.h5 forecast eval accuracy {row} at its ridge; measured {accuracy:.4g}, {place}."
        ]
    assert told(None)[1].startswith(f"k.h5 forecast eval mse {dict(found.table())['eval mse at ridge']} at its")
    assert len(told(0.7, first | {"eval_loss": 1.01 * start["eval_loss"]})) == 1
    assert len(told(0.7, loss="cross-entropy")) == 1


def span(found):
    return dict(found.table())["leave-one-out accuracy"]


def test_the_verdict_of_a_ranking_is_its_first_choice():
    best = {"name": "query", "parameters": 36864, "eval_loss": (0.4, 0.3, 0.5), "eval_accuracy": (0.7, 0.6, 0.8)}
    other = {"name": "key", "parameters": 8, "eval_loss": (0.6, 0.5, 0.7), "eval_accuracy": None}
    start = {"eval_loss": (0.55, 0.5, 0.6), "eval_accuracy": (0.62, 0.6, 0.64)}
    assert verdict.ranking_verdict([best, other]) == [
        "Adapt query (36,864 parameters): eval loss 0.4 (0.3 to 0.5), accuracy 0.7 (0.6 to 0.8)."
    ]
    assert verdict.ranking_verdict([best, other], start) == [
        "Adapt query (36,864 parameters): eval loss 0.55 → 0.4 (0.3 to 0.5), accuracy 0.62 → 0.7 (0.6 to 0.8)."
    ]
    assert "2 of 2" in verdict.ranking_verdict([best, other | {"eval_loss": (0.5, 0.4, 0.6)}])[1]


def test_a_ranking_that_trains_for_nothing_says_so():
    best = {"name": "query", "parameters": 36864, "eval_loss": (0.4, 0.3, 0.5), "eval_accuracy": None}
    told = verdict.ranking_verdict([best], {"eval_loss": (0.38461, 0.3, 0.5), "eval_accuracy": None})
    assert told[0] == (
        "No candidate is forecast to do better than the model before training (0.3846): lower learning rate, fewer "
        "epochs, a proximal term, or more data."
    )
    assert told[1] == "The first, query (36,864 parameters): eval loss 0.3846 → 0.4 (0.3 to 0.5)."
    near = verdict.ranking_verdict([best], {"eval_loss": (0.45, 0.3, 0.5), "eval_accuracy": None})
    assert near[0].startswith("Adapt query")
    assert (
        near[1]
        == "The first is not told apart from no training: the model before training (0.45) lies within its interval."
    )
    assert verdict.against_start((0.4, 0.3, 0.5), (0.4, 0.3, 0.5))[0].startswith("No candidate")
    assert verdict.against_start((0.4, 0.3, 0.5), (0.51, 0.3, 0.6)) == []
