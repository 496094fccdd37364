"""scikit-learn's own checks, weights, classes, folds, and solvers beyond memory."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.sparse.linalg import aslinearoperator
from scipy.special import log_softmax
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, KFold, cross_val_predict
from sklearn.utils.estimator_checks import parametrize_with_checks

from ntkengine.errors import InputError, NonFinite, NotConverged
from ntkengine.ridge import KernelLogistic, KernelRidge, RidgePath, cholesky_on_disk, cholesky_solve, draw_folds
from ntkengine.spectrum import PanelOperator
from tests.test_operators import on_disk
from tests.test_ridge import brute_force_loo, problem

NOT_A_KERNEL = "the check makes a matrix that is no positive semi-definite kernel"
EXPECTED = {
    "KernelRidge": {
        "check_positive_only_tag_during_fit": NOT_A_KERNEL,
        "check_estimators_dtypes": NOT_A_KERNEL,
    },
    "KernelLogistic": {
        "check_positive_only_tag_during_fit": NOT_A_KERNEL,
        "check_estimators_dtypes": NOT_A_KERNEL,
        "check_class_weight_classifiers": "wants an intercept: far from all examples f is f0, whatever the weights",
        "check_decision_proba_consistency": "the check gives samples, not their kernel",
    },
}


def expected(estimator):
    found = dict(EXPECTED[type(estimator).__name__])
    if estimator.ridge == "loo":  # the grid starts above what makes such a matrix indefinite
        found.pop("check_estimators_dtypes")
    return found


@parametrize_with_checks(
    [KernelRidge(), KernelRidge(ridge=0.1, relative=True), KernelLogistic()], expected_failed_checks=expected
)
def test_scikit_learns_checks(estimator, check):
    check(estimator)


@pytest.mark.parametrize("solver", ["eigen", "cholesky"])
@pytest.mark.parametrize(("m", "full"), [(1, False), (3, False), (2, True)])
def test_weights_are_those_of_the_weighted_loss(solver, m, full):
    n = 24
    K, r = problem(n=n * m if full else n, m=1 if full else m)
    y = r.reshape(n, m)
    weights = np.random.default_rng(1).uniform(0.2, 3.0, n)
    weights[[3, 7]] = 0.0
    krr = KernelRidge(ridge=0.4, solver=solver).fit(K, y, sample_weight=weights)
    block = m if full else 1
    w = np.repeat(weights, block)
    flat = y.reshape(len(K), -1)

    def dual(rows):
        # W K alpha + ridge alpha = W r, which holds for weights of zero as well.
        A = w[rows, None] * K[np.ix_(rows, rows)] + 0.4 * np.eye(len(rows))
        return np.linalg.solve(A, w[rows, None] * flat[rows])

    everything = np.arange(len(K))
    np.testing.assert_allclose(krr.dual_coef_.reshape(flat.shape), dual(everything), atol=1e-10)
    for i in range(n):
        out = np.arange(i * block, (i + 1) * block)
        rest = np.setdiff1d(everything, out)
        left = flat[out] - K[np.ix_(out, rest)] @ dual(rest)
        np.testing.assert_allclose(krr.loo_residuals_[i].reshape(left.shape), left, atol=1e-9)


def test_weights_count_as_copies():
    K, r = problem(n=20)
    copies = np.random.default_rng(2).integers(1, 4, 20)
    again = np.repeat(np.arange(20), copies)
    weighted = KernelRidge(ridge=0.3).fit(K, r[:, 0], sample_weight=copies)
    repeated = KernelRidge(ridge=0.3).fit(K[np.ix_(again, again)], r[again, 0])
    np.testing.assert_allclose(weighted.predict(K), repeated.predict(K[:, again]), atol=1e-9)
    searched = KernelRidge().fit(K, r[:, 0], sample_weight=copies)
    assert searched.ridge_ == searched.path_.ridges[np.argmin(searched.path_.loo_mse)]


def test_balanced_classes_weigh_alike():
    K, _ = problem(n=30)
    y = np.where(np.arange(30) < 24, -1.0, 1.0)
    for targets in (y, np.column_stack([y, -y])):
        balanced = KernelRidge(ridge=0.3, class_weight="balanced").fit(K, targets)
        weights = np.where(y < 0, 30 / (2 * 24), 30 / (2 * 6))
        by_hand = KernelRidge(ridge=0.3).fit(K, targets, sample_weight=weights)
        np.testing.assert_allclose(balanced.dual_coef_, by_hand.dual_coef_, rtol=1e-12)


def test_held_out_folds_equal_refits():
    K, r = problem(n=33, m=2)
    folds = draw_folds(4, 33)
    assert sorted(np.bincount(folds)) == [8, 8, 8, 9]
    left = RidgePath(K, r).held_out_residuals(0.3, folds)
    for fold in range(4):
        out, rest = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        dual = np.linalg.solve(K[np.ix_(rest, rest)] + 0.3 * np.eye(len(rest)), r[rest])
        np.testing.assert_allclose(left[out], r[out] - K[np.ix_(out, rest)] @ dual, atol=1e-10)
    krr = KernelRidge(ridge="cv", cv=folds).fit(K, r)
    assert krr.ridge_ == krr.path_.ridges[np.argmin(krr.path_.cv_mse)]
    singles = KernelRidge(ridge="cv", cv=33).fit(K, r)
    np.testing.assert_allclose(singles.path_.cv_mse, singles.path_.loo_mse, rtol=1e-8)
    # On the full layout the rows of an example stay together.
    together = draw_folds(3, 33, block=3).reshape(-1, 3)
    assert (together == together[:, :1]).all()
    for bad in (1, 34, 2.5, np.zeros(33), np.zeros(5)):
        with pytest.raises(InputError, match="cv: expected"):
            KernelRidge(ridge="cv", cv=bad).fit(K, r)


@pytest.mark.parametrize(("m", "block"), [(1, 1), (3, 1), (1, 3)])
@pytest.mark.parametrize("rows", [3, 7, 60])
def test_cholesky_on_disk_equals_cholesky_in_memory(tmp_path, m, block, rows):
    n = 60
    K, r = problem(n=n, m=m)
    budget = 4 * 8 * n * rows / 2**20
    np.save(tmp_path / "k.npy", K)
    for gram in (K, np.load(tmp_path / "k.npy", mmap_mode="r"), on_disk(tmp_path / f"{m}{block}.h5", K)):
        found = cholesky_on_disk(gram, r, 0.2, block, budget_mib=budget, scratch=tmp_path)
        expected = cholesky_solve(K, r, 0.2, block)
        np.testing.assert_allclose(found.dual, expected.dual, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(found.loo_residuals, expected.loo_residuals, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(found.loo_residuals, brute_force_loo(K, r, 0.2, block), atol=1e-10)
        assert found.backward_error < 1e-13
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]
    assert np.isnan(cholesky_on_disk(K, r, 0.2, block, budget_mib=budget, loo=False).loo_residuals).all()


def test_cholesky_on_disk_refuses(tmp_path):
    K, r = problem(n=30)
    budget = 4 * 8 * 30 * 10 / 2**20
    with pytest.raises(InputError, match=r"positive definite, got 0.1: Cholesky broke down in rows 20 to 29"):
        cholesky_on_disk(K - np.diag(np.r_[np.zeros(20), np.full(10, 99.0)]), r, 0.1, budget_mib=budget)
    with pytest.raises(NonFinite, match="row 12"):
        cholesky_on_disk(np.where(np.eye(30, k=3) * (np.arange(30)[:, None] == 12) > 0, np.nan, K), r, 0.1)
    with pytest.raises(InputError, match="budget_mib: expected at least"):
        cholesky_on_disk(K, r, 0.1, budget_mib=1e-6)
    with pytest.raises(InputError, match="ridge: expected"):
        cholesky_on_disk(K, r, -1.0)


def test_solvers_beyond_memory_agree_with_those_in_memory(tmp_path, monkeypatch):
    K, r = problem(n=120, m=2)
    gram = on_disk(tmp_path / "k.h5", K)
    exact = KernelRidge(ridge=0.3, relative=True).fit(K, r)
    monkeypatch.setattr("ntkengine.ridge.estimator.IN_MEMORY", 100)
    streamed = KernelRidge(ridge=0.3, relative=True).fit(gram, r)
    np.testing.assert_allclose(streamed.loo_residuals_, exact.loo_residuals_, atol=1e-10)
    for X, relative in ((gram, True), (aslinearoperator(K), False), (PanelOperator(gram), True)):
        ridge = 0.3 if relative else exact.ridge_
        found = KernelRidge(ridge=ridge, solver="cg", relative=relative, tol=1e-11).fit(X, r)
        np.testing.assert_allclose(found.dual_coef_, exact.dual_coef_, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(found.predict(K[:7]), exact.predict(K[:7]), atol=1e-8)
        assert found.loo_residuals_ is None
    assert KernelRidge(ridge=0.3).fit(aslinearoperator(K), r).loo_residuals_ is None
    for bad, message in (
        ({"ridge": "loo"}, "a LinearOperator is solved with by 'cg'"),
        ({"ridge": 1.0, "relative": True}, "relative: expected a matrix"),
    ):
        with pytest.raises(InputError, match=message):
            KernelRidge(**bad).fit(aslinearoperator(K), r)
    with pytest.raises(InputError, match="takes none"):
        KernelRidge(ridge=1.0, solver="cg").fit(K, r, sample_weight=np.arange(120))


def classes(C, n=60, seed=0):
    random = np.random.default_rng(seed)
    features = random.standard_normal((n, 6))
    scores = features[:, :C] + 0.7 * random.standard_normal((n, C))
    return features, scores.argmax(axis=1)


@pytest.mark.parametrize("C", [2, 3])
def test_logistic_equals_scikit_learns_on_the_features(C):
    features, y = classes(C)
    K = features @ features.T
    labels = np.array(["no", "yes", "zebra"])[y]
    theirs = LogisticRegression(C=1 / 0.7, fit_intercept=False, tol=1e-10, max_iter=5000).fit(features, labels)
    ours = KernelLogistic(ridge=0.7).fit(K, labels)
    # With two classes scikit-learn has one column of coefficients, as here.
    np.testing.assert_allclose(ours.predict_proba(K), theirs.predict_proba(features), atol=1e-5)
    assert (ours.predict(K) == theirs.predict(features)).all()
    assert list(ours.classes_) == ["no", "yes", "zebra"][:C]
    np.testing.assert_allclose(features.T @ ours.dual_coef_.reshape(60, -1), theirs.coef_.T, atol=1e-5)
    weighted = KernelLogistic(ridge=0.7, class_weight="balanced").fit(K, labels, sample_weight=np.arange(60.0))
    reference = clone(theirs).set_params(class_weight="balanced").fit(features, labels, sample_weight=np.arange(60.0))
    np.testing.assert_allclose(weighted.predict_proba(K), reference.predict_proba(features), atol=1e-5)


def test_logistic_on_the_full_layout_minimises_its_loss():
    n, C, ridge = 12, 3, 0.5
    random = np.random.default_rng(0)
    phi = random.standard_normal((n * C, 50))
    K, y = phi @ phi.T, np.arange(n) % C
    f0 = 0.3 * random.standard_normal((n, C))
    ours = KernelLogistic(ridge=ridge).fit(K, y, offset=f0)

    def loss(alpha):
        f = f0 + (K @ alpha).reshape(n, C)
        return -log_softmax(f, axis=1)[np.arange(n), y].sum() + 0.5 * ridge * alpha @ K @ alpha

    assert ours.loss_ == pytest.approx(loss(ours.dual_coef_.reshape(-1)), rel=1e-8)
    assert ours.loss_ <= minimize(loss, np.zeros(n * C), tol=1e-10).fun + 1e-7
    f = ours.decision_function(K, offset=f0)
    np.testing.assert_allclose(f, f0 + (K @ ours.dual_coef_.reshape(-1)).reshape(n, C), atol=1e-8)
    np.testing.assert_allclose(ours.predict_proba(K, offset=f0).sum(1), 1.0)
    # One kernel for every class is the same problem as the shared layout.
    shared = problem(n=n)[0]
    small = KernelLogistic(ridge=ridge).fit(shared, y)
    blocks = KernelLogistic(ridge=ridge).fit(np.kron(shared, np.eye(C)), y)
    np.testing.assert_allclose(blocks.dual_coef_, small.dual_coef_, atol=1e-7)


def test_logistic_margin_with_offset_and_two_columns():
    features, y = classes(2)
    K = features @ features.T
    f0 = np.linspace(-1, 1, 60)
    ours = KernelLogistic(ridge=0.4).fit(K, y, offset=f0)
    np.testing.assert_allclose(ours.decision_function(K, offset=f0[:, None]), f0 + K @ ours.dual_coef_, atol=1e-9)
    p = ours.predict_proba(K, offset=f0)[:, 1]
    np.testing.assert_allclose(0.4 * ours.dual_coef_, y - p, atol=1e-6)
    both = KernelLogistic(ridge=0.8).fit(np.kron(K, np.eye(2)), y)
    one = KernelLogistic(ridge=0.4).fit(K, y)
    # Two columns share the margin's penalty: half each way is half the norm.
    np.testing.assert_allclose(both.predict_proba(np.kron(K, np.eye(2))), one.predict_proba(K), atol=1e-6)


def test_estimators_work_inside_scikit_learn():
    features, y = classes(3)
    K = features @ features.T
    search = GridSearchCV(KernelLogistic(), {"ridge": [1e-2, 1.0, 1e4]}, cv=KFold(4), scoring="neg_log_loss").fit(K, y)
    assert search.best_params_["ridge"] == 1.0
    predicted = cross_val_predict(KernelLogistic(), K, y, cv=KFold(4))
    assert (predicted == y).mean() > 0.6


@pytest.mark.parametrize(
    ("arguments", "given", "message"),
    [
        ({"ridge": 0.0}, {}, "ridge: expected a finite number > 0"),
        ({}, {"y": np.zeros(60)}, "at least two classes, got one class"),
        ({}, {"y": np.arange(59) % 2}, "y: expected 60 labels"),
        ({}, {"offset": np.zeros((60, 2))}, r"offset: expected shape \(60, 1\)"),
        ({}, {"offset": np.full(60, np.nan)}, "offset: expected finite"),
        ({}, {"sample_weight": -np.ones(60)}, "sample_weight: expected finite numbers >= 0"),
        ({}, {"sample_weight": np.ones(3)}, r"sample_weight: expected shape \(60,\)"),
    ],
)
def test_logistic_refuses(arguments, given, message):
    features, y = classes(2)
    with pytest.raises(InputError, match=message):
        KernelLogistic(**arguments).fit(features @ features.T, **{"y": y, **given})


def test_logistic_says_when_it_stops_short():
    features, y = classes(3)
    with pytest.raises(NotConverged, match="logistic regression: gradient") as caught:
        KernelLogistic(ridge=1e-6, max_iter=1).fit(features @ features.T, y)
    assert caught.value.partial.predict(features @ features.T).shape == y.shape


@pytest.mark.parametrize("estimator", [KernelRidge, KernelLogistic])
def test_a_ridge_below_the_noise_is_refused_and_one_near_it_told(estimator, caplog):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20, 30))
    y = np.sign(rng.standard_normal(20))
    gram = SimpleNamespace(values=x @ x.T, noise=1e-2, contraction="trace")
    with pytest.raises(InputError, match="ridge: expected at least the noise of the kernel, 0.01, got 0.009"):
        estimator(ridge=0.009).fit(gram, y)
    with pytest.raises(InputError, match=r"expected at least the noise of the kernel, 0.02"):
        estimator(ridge=0.015).fit(gram, y, sample_weight=np.r_[2.0, np.ones(19)])
    for ridge, told in ((0.011, True), (0.19, True), (0.21, False)):
        caplog.clear()
        estimator(ridge=ridge).fit(gram, y)
        assert ("times the kernel's noise" in caplog.text) is told
    estimator(ridge=0.009).fit(gram.values, y)  # a bare array carries none


def test_targets_of_a_full_gram_are_a_row_an_example():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((12, 30))
    gram = SimpleNamespace(values=x @ x.T, noise=0.0, contraction="full", outputs=np.zeros((4, 3)))
    y = rng.standard_normal((4, 3))
    assert KernelRidge(ridge=1.0).fit(gram, y).loo_residuals_.shape == (4, 3)
    with pytest.raises(InputError, match=r"y: expected \(4, 3\), an example of this 'full' Gram a row, got \(12,\)"):
        KernelRidge(ridge=1.0).fit(gram, y.reshape(-1))
