from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.kernel_ridge import KernelRidge as SklearnKernelRidge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import get_tags

from ntkengine.errors import InputError
from ntkengine.ridge import KernelRidge, RidgePath, cholesky_solve, choose, ridge_curve, ridge_grid


def problem(n: int = 31, m: int = 1, features: int = 80, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    phi = random.standard_normal((n, features)) * np.arange(1.0, features + 1) ** -0.7
    return phi @ phi.T, random.standard_normal((n, m))


def brute_force_loo(K: np.ndarray, r: np.ndarray, ridge: float, block: int = 1) -> np.ndarray:
    errors = np.empty_like(r)
    for i in range(0, len(K), block):
        out = np.arange(i, i + block)
        rest = np.setdiff1d(np.arange(len(K)), out)
        dual = np.linalg.solve(K[np.ix_(rest, rest)] + ridge * np.eye(len(rest)), r[rest])
        errors[out] = r[out] - K[np.ix_(out, rest)] @ dual
    return errors


@pytest.mark.parametrize("ridge", [1e-3, 0.2, 50.0])
@pytest.mark.parametrize(("m", "block"), [(1, 1), (3, 1), (1, 3)])
def test_loo_equals_refits(ridge: float, m: int, block: int) -> None:
    K, r = problem(n=33, m=m)
    expected = brute_force_loo(K, r, ridge, block)
    path = RidgePath(K, r, block)
    np.testing.assert_allclose(path.loo_residuals(ridge), expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(RidgePath(K, 0 * r, block).with_residual(r).loo_residuals(ridge), expected, atol=1e-10)
    np.testing.assert_allclose(cholesky_solve(K, r, ridge, block).loo_residuals, expected, rtol=1e-10, atol=1e-10)
    assert path.loo_mse(ridge) == pytest.approx([np.mean(expected**2)], rel=1e-10)


def test_path_quantities_equal_their_definitions() -> None:
    K, r = problem(n=27, m=2)
    path = RidgePath(K, r)
    ridges = [0.01, 0.7, 30.0]
    for i, ridge in enumerate(ridges):
        Q = np.linalg.inv(K + ridge * np.eye(27))
        left = ridge * Q @ r
        assert path.train_mse(ridges)[i] == pytest.approx(np.mean(left**2), rel=1e-10)
        assert path.gcv(ridges)[i] == pytest.approx(np.mean(left**2) / (ridge / 27 * np.trace(Q)) ** 2, rel=1e-10)
        assert path.effective_dimension(ridges)[i] == pytest.approx(np.trace(K @ Q), rel=1e-10)
        np.testing.assert_allclose(path.train_residual(ridge), left, atol=1e-12)
        np.testing.assert_allclose(path.dual(ridge), Q @ r, rtol=1e-9)


def test_cholesky_refines() -> None:
    K, r = problem(n=60)
    solution = cholesky_solve(K, r, 1e-6)
    assert solution.backward_error < 1e-13
    np.testing.assert_allclose((K + 1e-6 * np.eye(60)) @ solution.dual, r, atol=1e-12)
    assert cholesky_solve(K, np.zeros(60), 1.0).backward_error == 0.0


def test_singular_systems_are_refused() -> None:
    a = np.random.default_rng(0).standard_normal((20, 4))
    for attempt in (
        lambda: RidgePath(a @ a.T, np.ones(20)).dual(0.0),
        lambda: cholesky_solve(-np.eye(3), np.ones(3), 0.5),
    ):
        with pytest.raises(InputError, match="ridge: expected a value that makes K"):
            attempt()
    with pytest.raises(InputError, match="ridge: expected"):
        RidgePath(np.eye(3), np.ones(3)).gcv([-0.5])


@pytest.mark.parametrize(
    ("residual", "block", "message"),
    [
        (np.ones(5), 1, r"residual: expected shape \(6,\) or \(6, m\), got \(5,\)"),
        (np.r_[np.ones(5), np.nan], 1, "residual: expected finite numbers, row 5"),
        (np.ones((6, 2)), 3, "block: expected a divisor of 6 rows"),
        (np.ones(6), 4, "got 4 with 1 columns"),
        (["a"] * 6, 1, "residual: expected numbers"),
    ],
)
def test_bad_residuals_are_refused(residual: object, block: int, message: str) -> None:
    for solve in (
        lambda: RidgePath(np.eye(6), residual, block),
        lambda: cholesky_solve(np.eye(6), residual, 1.0, block),
    ):
        with pytest.raises(InputError, match=message):
            solve()


def test_grid_stays_above_the_noise() -> None:
    values = np.geomspace(1e-8, 10.0, 50)
    assert ridge_grid(values, 1e-4)[0] == pytest.approx(1e-4)
    clean = ridge_grid(values, 0.0, n=9)
    assert len(clean) == 9
    assert clean[0] == pytest.approx(1e-9)
    assert clean[-1] == pytest.approx(100.0)
    assert ridge_grid(np.r_[-1e-2, values], 0.0)[0] >= 2e-2
    with pytest.raises(InputError, match="above the noise"):
        ridge_grid(values, 11.0)
    with pytest.raises(InputError, match="above the noise"):
        ridge_grid(np.zeros(4), 0.0)
    with pytest.raises(InputError, match="noise: expected"):
        ridge_grid(values, float("nan"))
    with pytest.raises(InputError, match="n: expected"):
        ridge_grid(values, 0.0, n=1)


def test_choice_and_its_edges() -> None:
    K, noise_only = problem(n=40, seed=3)
    signal = np.linalg.eigh(K)[1][:, -3:] @ np.ones((3, 1)) * 5
    inside = RidgePath(K, signal + 0.3 * noise_only)
    grid = ridge_grid(inside.eigenvalues, 0.0)
    curve = ridge_curve(inside, grid)
    for criterion, scores in (("loo", curve.loo_mse), ("gcv", curve.gcv)):
        choice = choose(curve, criterion)
        assert choice == choose(inside, criterion, grid)
        assert choice.edge == ""
        assert choice.ridge == grid[np.argmin(scores)] == grid[choice.index]
        assert choice.score == scores.min()
    assert choose(inside, "loo", grid[-3:]).edge == "lower"
    assert choose(inside, "loo", grid[:3]).edge == "upper"
    with pytest.raises(InputError, match="criterion: expected"):
        choose(curve, "aic")


@pytest.mark.parametrize("m", [None, 3])
@pytest.mark.parametrize("solver", ["eigen", "cholesky", "auto"])
def test_agrees_with_sklearn(m: int | None, solver: str) -> None:
    K, y = problem(n=41, m=m or 1)
    y = y if m else y[:, 0]
    train, test = np.arange(30), np.arange(30, 41)
    theirs = SklearnKernelRidge(alpha=0.4, kernel="precomputed").fit(K[np.ix_(train, train)], y[train])
    ours = KernelRidge(ridge=0.4, solver=solver).fit(K[np.ix_(train, train)], y[train])
    np.testing.assert_allclose(ours.dual_coef_, theirs.dual_coef_, rtol=1e-9)
    predicted = ours.predict(K[np.ix_(test, train)])
    assert predicted.shape == y[test].shape
    np.testing.assert_allclose(predicted, theirs.predict(K[np.ix_(test, train)]), rtol=1e-9)
    assert ours.n_features_in_ == 30
    assert ours.path_ is None


@pytest.mark.parametrize("m", [None, 1, 2])
def test_offset_is_what_remains_far_from_the_data(m: int | None) -> None:
    K, y = problem(n=25, m=m or 1)
    f0 = np.random.default_rng(9).standard_normal(y.shape)
    y, f0 = (y, f0) if m else (y[:, 0], f0[:, 0])
    krr = KernelRidge(ridge=0.3).fit(K, y, offset=f0)
    expected = f0 + K @ np.linalg.solve(K + 0.3 * np.eye(25), y - f0)
    np.testing.assert_allclose(krr.predict(K, offset=f0), expected, atol=1e-10)
    np.testing.assert_allclose(krr.predict(np.zeros_like(K), offset=f0), f0)
    np.testing.assert_allclose(
        krr.loo_residuals_.reshape(25, -1), brute_force_loo(K, (y - f0).reshape(25, -1), 0.3), atol=1e-10
    )


def test_relative_ridge_and_searched_ridge() -> None:
    K, y = problem(n=30)
    relative = KernelRidge(ridge=0.1, relative=True).fit(K, y[:, 0])
    assert relative.ridge_ == pytest.approx(0.1 * np.trace(K) / 30)
    for criterion in ("loo", "gcv"):
        krr = KernelRidge(ridge=criterion).fit(K, y[:, 0])
        scores = krr.path_.loo_mse if criterion == "loo" else krr.path_.gcv
        assert krr.ridge_ == krr.path_.ridges[np.argmin(scores)]
        np.testing.assert_allclose(krr.loo_residuals_, brute_force_loo(K, y, krr.ridge_)[:, 0], atol=1e-10)
    noisy = KernelRidge().fit(SimpleNamespace(values=K, noise=0.5), y[:, 0])
    assert noisy.path_.ridges[0] >= 0.5


@pytest.mark.parametrize("solver", ["eigen", "cholesky"])
def test_full_layout_leaves_examples_out(solver: str) -> None:
    n, m = 11, 3
    K, flat = problem(n=n * m + 2 * m)
    y, f0 = flat[: n * m].reshape(n, m), np.full((n, m), 0.25)
    train, test = K[: n * m, : n * m], K[n * m :, : n * m]
    krr = KernelRidge(ridge=0.5, solver=solver).fit(train, y, offset=f0)
    dual = np.linalg.solve(train + 0.5 * np.eye(n * m), (y - f0).reshape(-1))
    np.testing.assert_allclose(krr.predict(test), (test @ dual).reshape(2, m), atol=1e-10)
    expected = brute_force_loo(train, (y - f0).reshape(-1, 1), 0.5, block=m).reshape(n, m)
    np.testing.assert_allclose(krr.loo_residuals_, expected, atol=1e-10)
    with pytest.raises(InputError, match="multiple of 3 rows"):
        krr.predict(test[:4])


def test_is_a_scikit_learn_estimator() -> None:
    K, y = problem(n=36)
    y = K[:, 0] / K[:, 0].std() + 0.1 * y[:, 0]
    estimator = KernelRidge(ridge=2.0, solver="eigen", relative=True)
    assert clone(estimator).get_params() == {
        "ridge": 2.0,
        "solver": "eigen",
        "relative": True,
        "class_weight": None,
        "cv": 5,
        "tol": 1e-8,
    }
    assert get_tags(estimator).input_tags.pairwise
    ridges = [1e-3, 1e-1, 1e3]
    ours = GridSearchCV(KernelRidge(), {"ridge": ridges}, cv=4, scoring="neg_mean_squared_error").fit(K, y)
    theirs = GridSearchCV(
        SklearnKernelRidge(kernel="precomputed"), {"alpha": ridges}, cv=4, scoring="neg_mean_squared_error"
    ).fit(K, y)
    np.testing.assert_allclose(ours.cv_results_["mean_test_score"], theirs.cv_results_["mean_test_score"], rtol=1e-8)
    assert ours.best_params_["ridge"] != 1e3
    piped = make_pipeline(FunctionTransformer(), KernelRidge(ridge=0.1)).fit(K, y)
    assert piped.score(K, y) == pytest.approx(KernelRidge(ridge=0.1).fit(K, y).score(K, y))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ridge": "aic"}, "ridge: expected 'loo', 'gcv', 'cv' or a number"),
        ({"ridge": -1.0}, "ridge: expected 'loo', 'gcv', 'cv' or a number"),
        ({"ridge": float("nan")}, "ridge: expected"),
        ({"solver": "qr"}, "solver: expected"),
        ({"ridge": "loo", "solver": "cholesky"}, "'cholesky' needs a numeric ridge"),
    ],
)
def test_bad_parameters_are_refused_in_fit(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        KernelRidge(**arguments).fit(np.eye(4), np.ones(4))


def test_bad_shapes_are_refused() -> None:
    krr = KernelRidge(ridge=1.0)
    with pytest.raises(NotFittedError):
        krr.predict(np.eye(4))
    with pytest.raises(InputError, match=r"y: expected shape \(4,\) or \(4, m\), got \(5,\)"):
        krr.fit(np.eye(4), np.ones(5))
    with pytest.raises(InputError, match=r"offset: expected shape \(4,\), got \(4, 1\)"):
        krr.fit(np.eye(4), np.ones(4), offset=np.ones((4, 1)))
    with pytest.raises(InputError, match=r"offset: expected shape \(4,\), got \(\)"):
        krr.fit(np.eye(4), np.ones(4), offset=1.0)
    krr.fit(np.eye(4), np.ones(4))
    with pytest.raises(InputError, match=r"X: expected K\(test, train\) of shape \(t, 4\), got \(2, 3\)"):
        krr.predict(np.ones((2, 3)))
    with pytest.raises(InputError, match="X: Input contains infinity"):
        krr.predict(np.full((2, 4), np.inf))
