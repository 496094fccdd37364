"""A forecast's accuracies, tables and refusals; its bounds and scores."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ntkengine.errors import InputError
from ntkengine.forecast import displacement_bound, forecast, linearisation_gap_bound, risk_bounds
from ntkengine.forecast.scores import centred_alignment, hits, mean_interval, name_classes, wilson_interval
from tests.test_forecast import C, M, N, linear_model


def test_values_to_be_met_name_no_class() -> None:
    two, many = np.array([[-1.0], [1.0], [1.0]]), np.array([[-1.2], [0.7], [1.0]])
    assert name_classes(two)
    assert name_classes(3.0 * two, np.array([[3.0]]))
    assert not name_classes(many)
    assert not name_classes(two, np.array([[0.5]]))
    assert not name_classes(np.abs(two))
    assert not name_classes(np.array([[0.0], [1.0]]))
    labels, values = np.array([0, 1, 2, 2, 0]), np.random.default_rng(0).standard_normal((5, 3))
    for code in (np.eye(3), 2 * np.eye(3) - 1, np.full((3, 3), 0.05) + 0.85 * np.eye(3), np.eye(3) - labels.mean()):
        assert name_classes(code[labels])
        assert name_classes(code[labels], code[:1])
        assert not name_classes(code[labels], values[:2])
    assert name_classes(np.eye(3)[:2])
    assert not name_classes(values)
    assert not name_classes(values[:1])
    assert not name_classes(np.array([[3.0, 5.0], [2.0, 5.0], [4.0, 1.0]]))  # ratings
    assert not name_classes(np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))  # several labels
    g = linear_model()
    result = forecast(g, g.y * np.linspace(0.5, 1.5, N)[:, None], eval_targets=g.y_eval)
    assert (result.loo_accuracy, result.eval_accuracy, result.start["train_accuracy"]) == (None,) * 3
    assert any("no accuracy" in line for line in result.assumptions)
    assert forecast(g, g.y, eval_targets=g.y_eval).loo_accuracy is not None
    ratings = np.random.default_rng(0).uniform(1.0, 5.0, (N, 2))
    result = forecast(linear_model(outputs=2).values, ratings)
    assert (result.loo_accuracy, result.curve_train_accuracy, result.start["train_accuracy"]) == (None,) * 3
    assert not any("accuracy" in label for label, _ in result.table())


def test_bare_arrays_default_to_a_zero_start() -> None:
    g = linear_model()
    result = forecast(g.values, g.y)
    same = forecast(SimpleNamespace(values=g.values, contraction="trace", outputs=np.zeros((N, 1)), noise=None), g.y)
    np.testing.assert_array_equal(result.loo_mse, same.loo_mse)
    assert result.start == {
        "train_mse": 1.0, "train_accuracy": 0.0, "held_out_mse": None, "held_out_accuracy": None,
        "eval_mse": None, "eval_accuracy": None, "train_largest_class": max((g.y > 0).mean(), (g.y < 0).mean()),
    }  # fmt: skip
    full = linear_model("full", C)
    assert forecast(full.values, full.y).contraction == "full"
    split = linear_model("per-output", C)
    assert forecast(split.values, split.y).contraction == "per-output"


def test_regression_targets_have_no_accuracy() -> None:
    g = linear_model()
    result = forecast(g, np.linspace(0.0, 1.0, N), eval_targets=np.linspace(0.0, 1.0, M))
    assert result.loo_accuracy is None
    assert result.curve_eval_accuracy is None
    assert result.eval_mse_at_ridge is not None
    assert result.eval_accuracy_at_ridge is None
    assert any("no class" in line for line in result.assumptions)
    assert "leave-one-out accuracy" not in dict(result.table())


def test_results_print_and_serialise() -> None:
    g = linear_model()
    g.modules = {"a": 0.25 * g.values, "b": 0.75 * g.values}
    result = forecast(g, g.y, eval_targets=g.y_eval)
    rank_one = forecast(np.outer(g.y, g.y), g.y)
    assert result.modules == pytest.approx({"a": 0.25, "b": 0.75})
    for each in (result, rank_one):
        back = json.loads(json.dumps(each.to_dict(), allow_nan=False))
        assert back["loo_mse"] == each.loo_mse.tolist()
        assert back["condition"]["lambda_max"] == each.condition.lambda_max
        assert all(isinstance(label, str) and isinstance(text, str) for label, text in each.table())
    assert rank_one.to_dict()["condition"]["upper"] is None
    table = dict(result.table())
    assert table["share of trace, b"] == "75.0%"
    assert " to " in table["eval accuracy at ridge"]
    assert "unresolved" in dict(rank_one.table())["condition number"]
    g.modules, g.meta = {}, {"module_trace": {"c": 3.0, "d": 1.0}}
    assert forecast(g, g.y).modules == {"c": 0.75, "d": 0.25}


def test_curves_can_be_read_at_a_time_and_matched_to_a_loss() -> None:
    g = linear_model()
    result = forecast(g, g.y, eval_targets=g.y_eval)
    time = result.time_of_train_loss(0.2)
    assert result.at(time)["train_loss"] == pytest.approx(0.2)
    assert result.at(result.times[7])["eval_loss"] == pytest.approx(result.curve_eval_loss[7])
    exact = forecast(g, g.y, eval_targets=g.y_eval, times=[time])
    assert exact.curve_train_loss[0] == pytest.approx(0.2, rel=5e-3)
    with pytest.raises(InputError, match="time: expected between"):
        result.at(result.times[-1] * 1.1)
    with pytest.raises(InputError, match="loss: expected between"):
        result.time_of_train_loss(10.0)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"contraction": "sum-of-outputs"}, {}, "'sum-of-outputs' is the kernel of the sum of 3 outputs"),
        ({"contraction": "pooled"}, {}, "contraction: expected one of"),
        ({"contraction": "full"}, {}, r"gram: expected shape \(69, 69\) for contraction 'full'"),
        (
            {"outputs": np.zeros((N, 2))},
            {},
            r"^targets: expected \(23, 2\), a column for each output .*, got \(23, 3\)$",
        ),
        ({"cross": None}, {"eval_targets": np.zeros((M, C))}, "eval_targets: expected a Gram with a cross block"),
        ({}, {"eval_targets": np.zeros((M - 1, C))}, r"eval_targets: expected 14 rows, .* got \(13, 3\)"),
        ({}, {"eval_targets": np.zeros((M, 2))}, "eval_targets: expected 3 columns"),
        ({"eval_outputs": None}, {"eval_targets": np.zeros((M, C))}, "eval_offset: expected f0 on the eval examples"),
        ({}, {"eval_targets": np.zeros((M, C)), "offset": np.ones((N, C))}, "eval_offset: .* same start as offset"),
        ({"outputs": None}, {"eval_targets": np.zeros((M, C))}, "offset: expected f0 on the train examples"),
        ({}, {"held_out_offset": np.ones(N)}, r"held_out_offset: expected shape \(23, 3\)"),
        ({}, {"ridge": "aic"}, "ridge: expected 'loo', 'gcv' or a number, got 'aic'"),
        ({}, {"ridge": -1.0}, "ridge: expected a number > 0"),
        ({}, {"times": [0.0, 1.0]}, "times: expected a list of finite numbers > 0"),
        ({"noise": 1e9}, {}, "above the noise"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, arguments: dict, message: str) -> None:
    g = linear_model("trace", C)
    vars(g).update(change)
    with pytest.raises(InputError, match=message):
        forecast(g, g.y, **arguments)


def test_non_finite_targets_are_refused() -> None:
    g = linear_model()
    g.y[4] = np.nan
    with pytest.raises(InputError, match="targets: expected finite numbers, row 4"):
        forecast(g, g.y)


def test_bounds() -> None:
    random = np.random.default_rng(1)
    K = np.diag(random.uniform(0.5, 9.0, 12))
    y = random.standard_normal(12)
    for ridge in (0.01, 1.0, 100.0):
        risk = np.sum((ridge * np.linalg.solve(K + ridge * np.eye(12), y)) ** 2)
        lower, upper = risk_bounds(ridge, float(np.linalg.norm(y)), K.diagonal().min(), K.diagonal().max())
        assert lower <= risk <= upper
    assert risk_bounds(1.0, 2.0, 3.0, 7.0) == (0.0625, 0.25)
    assert displacement_bound(2.0, 3.0, 0.5, 4.0) == pytest.approx(24.0 * (1 - np.exp(-2.0)))
    assert displacement_bound(2.0, 3.0, 0.0, 4.0) == pytest.approx(displacement_bound(2.0, 3.0, 1e-12, 4.0)) == 48.0
    assert linearisation_gap_bound(2.0, 3.0, 0.5, 0.1, 10.0) == pytest.approx(20.0)
    for call, message in (
        (lambda: risk_bounds(0.0, 1.0, 0.0, 1.0), "ridge: expected"),
        (lambda: risk_bounds(1.0, 1.0, 2.0, 1.0), "lambda_min: expected"),
        (lambda: displacement_bound(1.0, 1.0, -1.0, 1.0), "proximal: expected"),
        (lambda: linearisation_gap_bound(1.0, 1.0, 1.0, 1.0, -1.0), "time: expected"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_scores() -> None:
    value, low, high = wilson_interval(8, 10)
    assert (value, low, high) == (0.8, pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson_interval(0, 5)[1] == 0.0
    assert wilson_interval(5, 5)[2] == pytest.approx(1.0)
    mean, low, high = mean_interval(np.array([1.0, 2.0, 3.0, 4.0]))
    half = 3.1824463 * np.std([1, 2, 3, 4], ddof=1) / 2
    assert (mean, low, high) == (2.5, pytest.approx(2.5 - half), pytest.approx(2.5 * np.exp(half / 2.5), rel=1e-5))
    more = 6 * (1 + 2 * 3.1824463**2) / (6 * 4 * 4)  # third moment 6, variance 4, of four
    assert mean_interval(np.array([0.0, 0.0, 4.0, 0.0]))[2] == pytest.approx(np.exp(3.1824463 + more), rel=1e-6)
    assert mean_interval(np.zeros(3)) == (0.0, 0.0, 0.0)
    assert mean_interval(np.array([2.0]))[1:] == (0.0, np.inf)
    draws = np.random.default_rng(0).normal(10.0, 1.0, (4000, 4))
    assert np.mean([low <= 10.0 <= high for _, low, high in map(mean_interval, draws)]) == pytest.approx(
        0.95, abs=0.015
    )
    for count in (3, 5, 10, 30):  # errors squared: skewed
        draws = np.random.default_rng(1).normal(size=(4000, count)) ** 2
        assert np.mean([low <= 1.0 <= high for _, low, high in map(mean_interval, draws)]) > 0.93
    assert all(
        low <= value <= high for n in range(1, 60) for k in range(n + 1) for value, low, high in [wilson_interval(k, n)]
    )
    assert hits(np.zeros((2, 1)), np.array([[1.0], [-1.0]])).tolist() == [False, False]
    assert hits(np.zeros((2, 3)), np.eye(3)[:2]).tolist() == [False, False]
    assert hits(np.eye(3)[[0, 2]], np.eye(3)[:2]).tolist() == [True, False]
    y = np.sign(np.random.default_rng(0).standard_normal((31, 2)))
    centred = y - y.mean(axis=0)
    assert centred_alignment(centred @ centred.T + 100.0, y) == pytest.approx(1.0)
    K = np.cov(np.random.default_rng(1).standard_normal((31, 50)))
    H = np.eye(31) - 1 / 31
    Kc, Yc = H @ K @ H, H @ y @ y.T @ H
    expected = np.sum(Kc * Yc) / np.linalg.norm(Kc) / np.linalg.norm(Yc)
    assert centred_alignment(K, y) == pytest.approx(expected, rel=1e-10)
    assert centred_alignment(K, np.ones((31, 1))) is None


def test_eval_targets_of_the_gram_go_with_its_own_targets_alone(caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    A, y = rng.standard_normal((12, 20)), rng.choice([-1.0, 1.0], (12, 1))
    K = A @ A.T
    held: dict[str, Any] = {"targets": y[:8], "eval_targets": y[8:], "outputs": np.zeros((8, 1)), "meta": {}}
    gram = SimpleNamespace(
        values=K[:8, :8], cross=K[8:, :8], eval_outputs=np.zeros((4, 1)), contraction="trace", **held
    )
    assert forecast(gram, y[:8]).eval_mse is not None
    assert not caplog.text
    assert forecast(gram, -y[:8]).eval_mse is None
    assert "eval_targets: none, as those that the Gram holds go with its own targets" in caplog.text
    both = forecast(gram, -y[:8], eval_targets=-y[8:]).eval_mse, forecast(gram, y[:8]).eval_mse
    np.testing.assert_allclose(*both, rtol=1e-12)
    with pytest.raises(
        InputError, match=r"^targets: expected 8 rows, one for each train example of the Gram, got \(7, 1"
    ):
        forecast(gram, y[:7])
    gram.meta["readout"] = "loss"
    with pytest.raises(InputError, match="^gram: is of readout 'loss'"):
        forecast(gram, y[:8])
