"""Kernels that are noisy, singular, skew, indefinite, tiny or huge: solved to their definition, or refused."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from ntkengine.errors import InputError
from ntkengine.ridge import KernelLogistic, KernelRidge, conjugate_gradients, nystrom, random_cholesky
from ntkengine.spectrum import DenseOperator, FactorOperator, ImplicitOperator, effective_dimension, eigsh
from tests.test_operators import on_disk
from tests.test_ridge import problem
from tests.test_spectrum import with_spectrum

SOLVERS = ("eigen", "cholesky", "out-of-core", "cg")


def single_precision(n=300, rank=40):
    """A Gram summed in float32: of rank 40, and its zero eigenvalues are +-1e-5."""
    features = np.random.default_rng(0).standard_normal((n, rank)).astype(np.float32)
    K = (features @ features.T).astype(np.float64)
    return 0.5 * (K + K.T), np.sign(np.random.default_rng(1).standard_normal(n))


def test_gradients_take_a_gram_whose_rounding_made_it_indefinite():
    K, y = single_precision()
    assert np.linalg.eigvalsh(K)[0] < -1e-6
    exact = np.linalg.solve(K + 0.1 * np.eye(len(K)), y)
    for X in (K, aslinearoperator(K), ImplicitOperator(lambda X: K @ X, len(K), noise=1e-4)):
        found = KernelRidge(ridge=0.1, solver="cg", tol=1e-10).fit(X, y)
        np.testing.assert_allclose(found.dual_coef_, exact, atol=1e-7 * np.abs(exact).max())
    with pytest.raises(InputError, match="projection has the eigenvalue -"):
        nystrom(DenseOperator(K), 150)
    low = nystrom(DenseOperator(K), 150, noise=1e-4)
    assert np.linalg.norm(K - low.factor @ low.factor.T, 2) < 1e-2


def test_noise_is_no_pivot():
    for seed in range(6):
        noise = 10.0 ** np.random.default_rng(seed).uniform(-8, -4)
        E = np.random.default_rng(seed).standard_normal((300, 300))
        E *= noise / np.linalg.norm(E + E.T, 2)
        values = np.r_[np.random.default_rng(seed).uniform(0.1, 10, 40), np.zeros(260)]
        K = with_spectrum(values, seed) + E + E.T
        for given in (0.0, noise):
            low = random_cholesky(
                lambda at: K[:, at],  # noqa: B023
                np.maximum(K.diagonal(), 0.0),
                150,
                noise=given,
                seed=seed,
            )
            assert low.factor.shape[1] <= 45
            left = np.linalg.eigvalsh(K - low.factor @ low.factor.T)
            assert left[0] > -1e3 * noise
            assert left[-1] < 2.0 * low.error + 1e3 * noise


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_singular_system_is_refused(solver):
    for seed in range(3):
        features = np.random.default_rng(seed).standard_normal((50, 7))
        K = features @ features.T
        for ridge in (0.0, 1e-16, 1e-14):
            if solver == "cg" and ridge:
                continue  # converges, or says that it has not
            with pytest.raises(InputError, match="positive definite"):
                KernelRidge(ridge=ridge, solver=solver).fit(K, features[:, 0] + 0.1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_skew_kernel_is_refused(tmp_path, solver):
    K, r = problem(n=60)
    K[3, 40] += 0.01
    np.save(tmp_path / "k.npy", K)
    for X in (K, np.load(tmp_path / "k.npy", mmap_mode="r"), on_disk(tmp_path / "k.h5", K)):
        with pytest.raises(InputError, match="symmetric"):
            KernelRidge(ridge=5.0, solver=solver).fit(X, r)


@pytest.mark.parametrize("solver", SOLVERS)
def test_any_layout_and_type_gives_the_same(solver):
    K, r = problem(n=40, m=2)
    K = np.round(64 * K) / 64  # what float16 holds as well
    exact = np.linalg.solve(K + 0.5 * np.eye(40), r)
    frozen = K.copy()
    frozen.setflags(write=False)
    strided = np.repeat(np.repeat(K, 2, 0), 2, 1)[::2, ::2]
    for X in (K, np.asfortranarray(K), frozen, strided, K.astype(np.float16), K.astype(np.float32), K.tolist()):
        krr = KernelRidge(ridge=0.5, solver=solver, tol=1e-12).fit(X, r)
        np.testing.assert_allclose(krr.dual_coef_, exact, rtol=1e-9, atol=1e-11)
    whole = np.round(K).astype(int) + 5 * np.eye(40, dtype=int)
    krr = KernelRidge(ridge=0.5, solver=solver, tol=1e-12).fit(whole, r)
    np.testing.assert_allclose(krr.dual_coef_, np.linalg.solve(whole + 0.5 * np.eye(40), r), rtol=1e-8, atol=1e-11)
    np.testing.assert_allclose(KernelRidge(ridge=1.0, solver=solver).fit([[2.0]], [3.0]).dual_coef_, [1.0])
    zero = KernelRidge(ridge=2.0, solver=solver).fit(np.zeros((3, 3)), np.arange(3.0))
    np.testing.assert_allclose(zero.dual_coef_, np.arange(3.0) / 2)


def test_duplicated_rows_share_their_coefficients():
    K, r = problem(n=12)
    twice = np.repeat(np.arange(12), 2)
    krr = KernelRidge(ridge=0.3).fit(K[np.ix_(twice, twice)], r[twice, 0])
    single = KernelRidge(ridge=0.15).fit(K, r[:, 0])
    np.testing.assert_allclose(krr.dual_coef_.reshape(12, 2).sum(axis=1), single.dual_coef_, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e200])
def test_right_hand_sides_of_any_size(scale):
    K, r = problem(n=50, m=2)
    exact = np.linalg.solve(K + 0.1 * np.eye(50), r)
    found = conjugate_gradients(K, r * scale, 0.1, tol=1e-12)
    np.testing.assert_allclose(found.solution / scale, exact, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_kernels_of_any_size(scale):
    K, r = problem(n=50)
    for criterion in ("loo", "gcv", "cv"):
        plain, scaled = (KernelRidge(ridge=criterion).fit(c * K, r[:, 0]) for c in (1.0, scale))
        assert scaled.ridge_ == pytest.approx(scale * plain.ridge_)
        np.testing.assert_allclose(scaled.loo_residuals_, plain.loo_residuals_, rtol=1e-6)
    y = r[:, 0] > 0
    plain, scaled = (KernelLogistic(ridge=0.1 * c).fit(c * K, y) for c in (1.0, scale))
    assert scaled.loss_ == pytest.approx(plain.loss_, rel=1e-9)
    np.testing.assert_allclose(scale * scaled.dual_coef_, plain.dual_coef_, rtol=1e-6)


@pytest.mark.parametrize("criterion", ["loo", "gcv"])
def test_examples_without_weight_are_as_if_not_there(criterion):
    K, r = problem(n=40, seed=3)
    weights = np.where(np.arange(40) % 3 == 0, 0.0, 1.5)
    kept = weights > 0
    all_, some = (
        KernelRidge(ridge=criterion).fit(K[np.ix_(at, at)], r[at, 0], sample_weight=weights[at])
        for at in (np.ones(40, dtype=bool), kept)
    )
    assert all_.ridge_ == pytest.approx(some.ridge_, rel=1e-9)
    np.testing.assert_allclose(all_.path_.gcv, some.path_.gcv, rtol=1e-9)
    np.testing.assert_allclose(all_.dual_coef_[kept], some.dual_coef_, atol=1e-12)
    np.testing.assert_array_equal(all_.dual_coef_[~kept], 0.0)


@pytest.mark.parametrize("C", [2, 3])
@pytest.mark.parametrize("features", [6, 200])
def test_logistic_reaches_the_minimum_for_the_smallest_ridges(C, features):
    random = np.random.default_rng(0)
    phi = random.standard_normal((60, features))
    phi[:, 0] += 3.0
    K, y = phi @ phi.T, random.integers(0, C, 60)
    for ridge in (1e-10, 1e-6, 1e-2, 1e6):
        ours = KernelLogistic(ridge=ridge).fit(K, y)
        p = ours.predict_proba(K)
        target = np.eye(C)[y]
        if C == 2:
            p, target = p[:, 1], target[:, 1]
        # Of the definition: ridge·α is what the probabilities, predicted with α, are short of the labels.
        np.testing.assert_allclose(ridge * ours.dual_coef_, target - p, atol=1e-3)


def test_logistic_without_a_kernel():
    y = [0, 1] * 3
    zero = KernelLogistic().fit(np.zeros((6, 6)), y)
    assert zero.loss_ == pytest.approx(6 * np.log(2))
    np.testing.assert_allclose(zero.decision_function(np.zeros((2, 6))), 0.0)
    for values in (-np.ones(6), np.array([-3.0, -2.0, 1.0, 2.0, 3.0, 4.0])):
        with pytest.raises(InputError, match="positive semi-definite kernel, its smallest eigenvalue -"):
            KernelLogistic().fit(with_spectrum(values), y)


def test_what_no_operator_can_be_is_refused():
    for bad in ({"block": 0}, {"noise": -1.0}, {"noise": np.nan}, {"rounding": np.inf}):
        with pytest.raises(InputError, match=f"{next(iter(bad))}: expected"):
            ImplicitOperator(lambda X: X, 5, **bad)
    with pytest.raises(InputError, match="features: expected real numbers"):
        FactorOperator(np.ones((4, 2)) * 1j)
    with pytest.raises(InputError, match="real products"):
        eigsh(LinearOperator((30, 30), matvec=lambda x: x * (1 + 1j), dtype=np.complex128), 2)
    for bad in (csr_array(np.eye(4)), 3.0, np.ones(4)):
        with pytest.raises(InputError, match="square matrix"):
            effective_dimension(bad, 1.0)
