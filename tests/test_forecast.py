"""A forecast against the linear model it speaks of: curves, ridge path, leave-one-out, noise."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
from scipy.stats import t as student

from ntkengine.errors import InputError
from ntkengine.forecast import forecast
from ntkengine.forecast.scores import centred_alignment, mean_interval, wilson_interval
from ntkengine.ridge import KernelRidge

N, M, C, P = 23, 14, 3, 90


def one_hot(labels: np.ndarray, outputs: int) -> np.ndarray:
    return 2.0 * np.eye(outputs)[labels] - 1.0


def linear_model(contraction: str = "trace", outputs: int = 1, seed: int = 0) -> SimpleNamespace:
    """A linear model f = f0 + J θ with its Gram, cross Gram, targets and Jacobians."""
    random = np.random.default_rng(seed)
    scale = np.arange(1.0, P + 1) ** -0.6
    J, J_eval = (random.standard_normal((rows, outputs, P)) * scale for rows in (N, M))
    labels = [random.integers(0, max(outputs, 2), rows) for rows in (N, M)]
    y, y_eval = (2.0 * v[:, None] - 1.0 if outputs == 1 else one_hot(v, outputs) for v in labels)

    def contract(A: np.ndarray, B: np.ndarray) -> np.ndarray:
        full = np.einsum("ncp,mdp->ncmd", A, B)
        if contraction == "full":
            return full.reshape(len(A) * outputs, len(B) * outputs)
        per_output = np.einsum("ncmc->cnm", full)
        return per_output if contraction == "per-output" else per_output.sum(axis=0)

    return SimpleNamespace(
        values=contract(J, J),
        cross=contract(J_eval, J),
        noise=1e-13,
        contraction=contraction,
        outputs=0.3 * random.standard_normal((N, outputs)),
        eval_outputs=0.3 * random.standard_normal((M, outputs)),
        y=y,
        y_eval=y_eval,
        J=J,
        J_eval=J_eval,
    )


@pytest.mark.parametrize(("contraction", "outputs"), [("trace", 1), ("full", C)])
def test_curves_are_gradient_descent_of_the_linear_model(contraction: str, outputs: int) -> None:
    g = linear_model(contraction, outputs)
    rate = 0.002 / np.linalg.eigvalsh(g.values)[-1] * N
    steps = np.array([1, 40, 400, 3000])
    result = forecast(g, g.y, eval_targets=g.y_eval, times=rate * steps)
    theta, row = np.zeros(P), 0
    for step in range(1, steps[-1] + 1):
        residual = g.outputs + g.J @ theta - g.y
        theta -= rate / N * np.einsum("nc,ncp->p", residual, g.J)
        if step == steps[row]:
            f, f_eval = g.outputs + g.J @ theta, g.eval_outputs + g.J_eval @ theta
            loss = 0.5 * np.sum((f - g.y) ** 2) / N
            assert result.curve_train_loss[row] == pytest.approx(loss, rel=3e-3)
            assert result.curve_eval_loss[row] == pytest.approx(0.5 * np.sum((f_eval - g.y_eval) ** 2) / M, rel=3e-3)
            assert result.curve_displacement[row] == pytest.approx(np.linalg.norm(theta), rel=3e-3)
            assert np.linalg.norm(theta) <= result.displacement(rate * step) * (1 + 1e-9)
            right = (f[:, 0] * g.y[:, 0] > 0) if outputs == 1 else f.argmax(1) == g.y.argmax(1)
            assert result.curve_train_accuracy[row] == pytest.approx(right.mean(), abs=1.01 / N)
            row += 1
    assert result.times.tolist() == (rate * steps).tolist()


def test_curves_match_the_matrix_exponential_to_rounding() -> None:
    g = linear_model()
    result = forecast(g, g.y[:, 0], eval_targets=g.y_eval)
    for i in (0, 40, 80):
        decay = scipy.linalg.expm(-g.values * result.times[i] / N)
        residual = g.y - g.outputs
        f_eval = g.eval_outputs + g.cross @ np.linalg.solve(g.values, residual - decay @ residual)
        assert result.curve_train_loss[i] == pytest.approx(0.5 * np.mean((decay @ residual) ** 2), rel=1e-8)
        assert result.curve_eval_loss[i] == pytest.approx(0.5 * np.mean((f_eval - g.y_eval) ** 2), rel=1e-8)
    assert result.best_time == result.times[np.argmin(result.curve_eval_loss)]
    value, low, high = result.best_eval_loss
    assert value == result.curve_eval_loss.min()
    assert low < value < high
    assert result.best_eval_accuracy[0] == result.curve_eval_accuracy[np.argmin(result.curve_eval_loss)]
    assert (np.diff(result.curve_train_loss) <= 1e-15).all()


@pytest.mark.parametrize(
    ("contraction", "outputs"),
    [("trace", 1), ("trace", C), ("full", C), ("per-output", C), ("per-output", 1), ("full", 1)],
)
def test_ridge_path_matches_refits(contraction: str, outputs: int) -> None:
    g = linear_model(contraction, outputs)
    result = forecast(g, g.y, eval_targets=g.y_eval, ridge=0.37)
    assert result.ridge == 0.37
    at = int(np.flatnonzero(result.ridges == 0.37)[0])

    def fit(train: np.ndarray, K_x: np.ndarray, f0_x: np.ndarray) -> np.ndarray:
        """Predict with the given training examples; K_x in the Gram's own layout against all of them."""
        r, out = (g.y - g.outputs)[train], np.array(f0_x)
        if contraction == "full":
            rows = (train[:, None] * outputs + np.arange(outputs)).reshape(-1)
            K = g.values[np.ix_(rows, rows)]
            dual = np.linalg.solve(K + 0.37 * np.eye(len(rows)), r.reshape(-1))
            return out + (K_x[:, rows] @ dual).reshape(-1, outputs)
        for c in range(outputs):
            own = contraction == "per-output"
            K, X = (g.values[c], K_x[c]) if own else (g.values / outputs, K_x / outputs)
            dual = np.linalg.solve(K[np.ix_(train, train)] + 0.37 * np.eye(len(train)), r[:, c])
            out[:, c] += X[:, train] @ dual
        return out

    everyone = np.arange(N)
    np.testing.assert_allclose(
        result.eval_mse[at], np.mean((fit(everyone, g.cross, g.eval_outputs) - g.y_eval) ** 2), rtol=1e-9
    )
    np.testing.assert_allclose(
        result.train_mse[at], np.mean((fit(everyone, g.values, g.outputs) - g.y) ** 2), rtol=1e-9
    )
    left_out = np.empty((N, outputs))
    for i in everyone:
        rows = slice(i * outputs, (i + 1) * outputs) if contraction == "full" else slice(i, i + 1)
        left_out[i] = fit(np.delete(everyone, i), g.values[..., rows, :], g.outputs[[i]])[0]
    squares = ((g.y - left_out) ** 2).mean(axis=1)
    assert result.loo[0] == pytest.approx(squares.mean(), rel=1e-9)
    assert result.loo_mse[at] == pytest.approx(squares.mean(), rel=1e-9)
    half = student.ppf(0.975, N - 1) * squares.std(ddof=1) / np.sqrt(N)
    assert result.loo[1] == pytest.approx(max(0.0, squares.mean() - half), rel=1e-6)
    assert result.loo[2] == pytest.approx(mean_interval(squares)[2], rel=1e-6)
    assert result.loo[2] > squares.mean() + half
    right = (np.sign(left_out) == g.y)[:, 0] if outputs == 1 else left_out.argmax(1) == g.y.argmax(1)
    assert result.loo_accuracy[at] == pytest.approx(right.mean())
    assert result.loo_accuracy_at_ridge == wilson_interval(right.sum(), N)
    assert result.eval_mse_at_ridge[0] == result.eval_mse[at]
    assert result.eval_accuracy_at_ridge[0] == result.eval_accuracy[at]
    assert result.contraction == contraction
    # Evaluating at the training rows: the chosen values are those of the path.
    assert result.paper_lower <= result.train_mse[at] <= result.paper_upper


def test_a_shared_kernel_is_the_same_in_every_contraction() -> None:
    g = linear_model("trace", 1)
    y, f0 = one_hot(np.arange(N) % C, C), np.random.default_rng(5).standard_normal((N, C))
    y_eval, f0_eval = one_hot(np.arange(M) % C, C), np.zeros((M, C))
    common = {"outputs": f0, "eval_outputs": f0_eval, "eval_targets": y_eval}
    K, X = g.values, g.cross
    same = [
        SimpleNamespace(values=C * K, cross=C * X, contraction="trace", noise=C * 1e-12, **common),
        SimpleNamespace(
            values=np.kron(K, np.eye(C)), cross=np.kron(X, np.eye(C)), contraction="full", noise=1e-12, **common
        ),
        SimpleNamespace(
            values=np.stack([K] * C), cross=np.stack([X] * C), contraction="per-output", noise=1e-12, **common
        ),
    ]
    first, *others = (forecast(gram, y) for gram in same)
    assert any("K/3" in line for line in first.assumptions)
    assert first.n_eval == M
    for other in others:
        assert not any("K/3" in line for line in other.assumptions)
        for name in ("ridges", "loo_mse", "gcv", "train_mse", "eval_mse", "loo_accuracy", "curve_eval_loss",
                     "curve_train_loss", "curve_displacement", "ridge", "loo", "alignment", "paper_upper"):  # fmt: skip
            np.testing.assert_allclose(getattr(other, name), getattr(first, name), rtol=1e-6, err_msg=name)
        assert other.effective_dimension == pytest.approx(first.effective_dimension * C, rel=1e-6)


def test_agrees_with_the_estimator_and_picks_both_criteria() -> None:
    g = linear_model()
    for criterion in ("loo", "gcv"):
        result = forecast(g, g.y, eval_targets=g.y_eval, ridge=criterion)
        krr = KernelRidge(ridge=criterion).fit(g, g.y, offset=g.outputs)
        assert result.ridge == pytest.approx(krr.ridge_, rel=1e-9)
        np.testing.assert_allclose(result.gcv, krr.path_.gcv, rtol=1e-8)
        predicted = krr.predict(g.cross, offset=g.eval_outputs)
        assert result.eval_mse_at_ridge[0] == pytest.approx(np.mean((predicted - g.y_eval) ** 2), rel=1e-8)
        assert result.loo[0] == pytest.approx(np.mean(krr.loo_residuals_**2), rel=1e-8)
    assert result.ridge == result.ridge_gcv
    assert result.gcv_value == result.gcv.min()


def leaky_problem(seed: int) -> tuple[SimpleNamespace, np.ndarray, np.ndarray, np.ndarray]:
    """A head fitted on the labels of 90 examples with 45 noisy features, and a kernel of other features."""
    random = np.random.default_rng(seed)
    n, m, width = 90, 1500, 45
    h, h_eval = random.standard_normal((n, width)), random.standard_normal((m, width))
    phi, phi_eval = random.standard_normal((n, 30)) * 0.5, random.standard_normal((m, 30)) * 0.5
    w, v = random.standard_normal((width, 1)) / np.sqrt(width), random.standard_normal((30, 1)) / np.sqrt(8)
    y, y_eval = (
        np.sign(a @ w + b @ v + 0.5 * random.standard_normal((len(a), 1))) for a, b in ((h, phi), (h_eval, phi_eval))
    )

    def head(rows: np.ndarray, at: np.ndarray) -> np.ndarray:
        return at @ np.linalg.solve(h[rows].T @ h[rows] + np.eye(width), h[rows].T @ y[rows])

    everyone = np.arange(n)
    out_of_fold = np.empty((n, 1))
    for fold in range(30):
        rows = everyone[fold::30]
        out_of_fold[rows] = head(np.delete(everyone, rows), h[rows])
    gram = SimpleNamespace(
        values=phi @ phi.T, cross=phi_eval @ phi.T, noise=1e-12, contraction="trace",
        outputs=head(everyone, h), eval_outputs=head(everyone, h_eval),
    )  # fmt: skip
    return gram, y, y_eval, out_of_fold


def test_a_head_fitted_on_the_labels_leaks_and_the_held_out_offset_does_not() -> None:
    ridge, seeds = 20.0, range(11, 19)
    truth, loo, gcv = [], [], []
    for seed in seeds:
        gram, y, y_eval, out_of_fold = leaky_problem(seed)
        leaky = forecast(gram, y, eval_targets=y_eval, ridge=ridge)
        honest = forecast(
            gram, y, eval_targets=y_eval, ridge=ridge, held_out_offset=out_of_fold, head_fitted_on_targets=True
        )
        truth.append(honest.eval_mse_at_ridge[0])
        loo.append(honest.loo[0])
        gcv.append(honest.gcv_value)
        assert leaky.eval_mse_at_ridge == honest.eval_mse_at_ridge
        assert leaky.eval_accuracy_at_ridge == honest.eval_accuracy_at_ridge
        np.testing.assert_array_equal(leaky.curve_train_loss, honest.curve_train_loss)
        # Far too rosy, even at the top of the interval.
        assert leaky.loo[2] < 0.6 * truth[-1]
        assert leaky.gcv_value < 0.5 * truth[-1]
    # One draw of 90 examples scatters; without a leak the mean over draws does not lie.
    assert np.mean(loo) == pytest.approx(np.mean(truth), rel=0.1)
    assert np.mean(gcv) == pytest.approx(np.mean(truth), rel=0.1)
    assert honest.start["held_out_mse"] > 2 * honest.start["train_mse"]
    assert any("only if the head was not fitted" in line for line in leaky.assumptions)
    assert any("held-out outputs" in line for line in honest.assumptions)
    with pytest.raises(InputError, match="held_out_offset: expected outputs of heads that did not see"):
        forecast(gram, y, head_fitted_on_targets=True)


def test_noise_freezes_what_it_hides_and_limits_ridges_and_times() -> None:
    random = np.random.default_rng(3)
    phi = random.standard_normal((40, 6))
    error = random.standard_normal((40, 40))
    error = 1e-3 * (error + error.T) / np.linalg.norm(error + error.T, 2)
    gram = SimpleNamespace(values=phi @ phi.T + error, noise=1e-3, contraction="trace", outputs=np.zeros((40, 1)))
    y = np.sign(random.standard_normal((40, 1)))
    result = forecast(gram, y)
    assert not result.condition.resolved
    assert result.ridges[0] >= 1e-3
    assert result.times[-1] <= 40 / 1e-3 * (1 + 1e-9)
    U = np.linalg.svd(phi)[0]
    left = 0.5 * np.sum((U[:, 6:].T @ y) ** 2) / 40
    assert result.curve_train_loss[-1] == pytest.approx(left, rel=1e-2)
    assert np.isfinite(result.curve_displacement).all()
    assert any("do not move" in line for line in result.assumptions)
    assert (result.eval_mse, result.eval_mse_at_ridge, result.eval_accuracy_at_ridge) == (None,) * 3
    assert (result.best_time, result.curve_eval_loss) == (None,) * 2
    with pytest.raises(InputError, match="ridge: expected a number > 0 and not below the noise"):
        forecast(gram, y, ridge=1e-5)


def test_sums_over_the_spectrum_are_right_to_their_errors() -> None:
    for seed in range(40):
        random = np.random.default_rng(seed)
        phi = random.standard_normal((40, 3))
        noise = 10.0 ** random.uniform(-6, -1)
        error = random.standard_normal((40, 40))
        error = error @ error.T if seed % 2 else error + error.T
        true = phi @ phi.T
        values = true + error * noise / np.linalg.norm(error, 2)
        result = forecast(SimpleNamespace(values=values, noise=noise, contraction="trace"), np.sign(phi[:, 0]))
        exact = np.clip(np.linalg.eigvalsh(true), 0.0, None)
        for found, expected in (
            (result.trace, exact.sum()),
            (result.effective_rank, exact.sum() ** 2 / (exact**2).sum()),
            (result.effective_dimension, (exact / (exact + result.ridge)).sum()),
            (result.effective_dimension_at(2.0), (exact / (exact + 2.0)).sum()),
        ):
            assert abs(found - expected) <= found.error
            assert found.error >= 1e-3 * noise
        table = dict(result.table())
        assert table["trace"] == str(result.trace)
        assert result.to_dict()["effective_dimension_error"] == result.effective_dimension.error


@pytest.mark.parametrize(("contraction", "outputs"), [("trace", 2), ("full", 2), ("per-output", 2)])
def test_sums_over_the_spectrum_of_several_outputs_know_their_noise(contraction, outputs) -> None:
    g = linear_model(outputs=outputs, contraction=contraction)
    noise = 1e-3
    noisy = SimpleNamespace(**{**vars(g), "noise": noise})
    result = forecast(noisy, g.y)
    rows = len(result.eigenvalues)
    assert rows == (N if contraction == "trace" else N * outputs)
    assert result.trace.error == pytest.approx(rows * noise / (outputs if contraction == "trace" else 1), rel=1e-6)


def test_a_ridge_hardly_above_the_noise_is_told() -> None:
    g = linear_model()
    noisy = SimpleNamespace(**{**vars(g), "noise": 1e-2})
    for ridge, told in ((1.1e-2, "1.1 times .* of 2 "), (0.11, "11 times .* of 0.2 "), (0.21, None), (1.0, None)):
        lines = [line for line in forecast(noisy, g.y, ridge=ridge).assumptions if "The ridge is only" in line]
        assert len(lines) == (told is not None)
        assert told is None or re.search(told, lines[0])


def test_what_the_noise_does_to_the_curve_is_told() -> None:
    g = linear_model()
    values, vectors = np.linalg.eigh(g.values)
    rng = np.random.default_rng(5)
    for noise in (1e-6, 1e-3, 0.1):
        small = np.where(np.arange(N) < 5, 0.9 * noise, values)  # not resolved, and really there
        true = SimpleNamespace(**{**vars(g), "values": (vectors * small) @ vectors.T, "noise": 0.0})
        E = rng.standard_normal((N, N))
        E = (E + E.T) * noise / np.linalg.norm(E + E.T, 2)
        told = forecast(SimpleNamespace(**{**vars(true), "values": true.values + E, "noise": noise}), g.y)
        assert told.times[-1] <= max(0.1 * N / noise, 10 * N / values[-1]) * (1 + 1e-9)
        line = next(line for line in told.assumptions if "do not move in the training curve" in line)
        share = float(re.search(r"residuals by (\S+) %", line)[1]) / 100
        assert 0 < share <= 0.2 or noise == 0.1
        exact = forecast(true, g.y, times=told.times)
        start = np.linalg.norm(g.y - g.outputs)
        apart = np.abs(np.sqrt(2 * N * told.curve_train_loss[-1]) - np.sqrt(2 * N * exact.curve_train_loss[-1]))
        assert apart <= share * start


def test_an_alignment_has_the_error_that_noise_makes() -> None:
    rng = np.random.default_rng(0)
    y, x = np.sign(rng.standard_normal((30, 1))), rng.standard_normal((30, 4))
    K = x @ x.T + 0.3 * y @ y.T
    true = centred_alignment(K, y)
    for noise in (1e-3, 1e-1, 3.0, 100.0):
        for _ in range(20):
            E = rng.standard_normal((30, 30)) if rng.random() < 0.5 else np.outer(y, y)
            E = (E + E.T) * noise / np.linalg.norm(E + E.T, 2)
            found = centred_alignment(K + E, y, noise)
            assert abs(found - true) <= found.error
    assert found.error == np.inf
    told = forecast(SimpleNamespace(values=K + 1e3, contraction="trace", noise=100.0), y)
    assert "not resolved" in dict(told.table())["alignment with targets"]
    assert told.to_dict()["alignment_error"] is None
