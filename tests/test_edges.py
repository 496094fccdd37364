"""Numbers at their edges: negative by noise, next to nothing, few probes, few steps, too large, no kernel at all."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.sparse.linalg import LinearOperator, aslinearoperator

import ntkengine as ntk
from ntkengine.errors import InputError
from ntkengine.forecast.bounds import risk_bounds
from ntkengine.ridge import (
    KernelLogistic,
    KernelRidge,
    RidgePath,
    cholesky_on_disk,
    cholesky_solve,
    conjugate_gradients,
    nystrom,
    ridge_grid,
)
from ntkengine.ridge.tuning import pick
from ntkengine.spectrum import DenseOperator, condition_number, effective_dimension, log_determinant, noise_of
from ntkengine.spectrum import spectral_density as density_of
from tests.test_spectrum import with_spectrum


def kernel(n=12):
    A = np.random.default_rng(0).standard_normal((n, 2 * n))
    return A @ A.T


Y = np.random.default_rng(1).standard_normal(12)


@pytest.mark.parametrize("ridge", [1e-4, 1e-2, 0.1])
@pytest.mark.parametrize("function", [log_determinant, effective_dimension])
def test_sampled_sums_over_eigenvalues_that_noise_made_negative(function, ridge):
    gram = SimpleNamespace(values=with_spectrum(np.r_[np.geomspace(1e-3, 1, 80), -np.linspace(1e-3, 9e-3, 20)]))
    gram.noise = 1e-2
    exact = function(gram, ridge)
    found = function(DenseOperator(gram), ridge, method="lanczos", steps=60)
    assert abs(found - exact) <= found.error
    with pytest.raises(InputError, match="no eigenvalue below -0.01"):
        function(
            DenseOperator(SimpleNamespace(values=gram.values - 5e-3 * np.eye(100), noise=1e-2)), ridge, method="lanczos"
        )


@pytest.mark.parametrize("probes", [2, 3, 4])
def test_error_bars_of_few_probes_hold_where_an_eigenvector_has_few_entries(probes):
    matrix = np.eye(60)
    matrix[0, 1] = matrix[1, 0] = 0.9999  # signs alike on both entries do not see the eigenvalue 1e-4
    exact = effective_dimension(matrix, 1e-4)
    operator, missed = DenseOperator(matrix), 0
    for seed in range(100):
        found = effective_dimension(operator, 1e-4, method="lanczos", probes=probes, steps=10, seed=seed)
        missed += abs(found - exact) > found.error
    assert missed <= 3  # of 99 % intervals


def test_error_bars_cover_the_rounding_of_a_flat_spectrum():
    for given in (np.eye(120), aslinearoperator(np.eye(120))):
        found = effective_dimension(given, 1e-4)
        assert abs(found - 120 / (1 + 1e-4)) <= found.error < 1e-10


@pytest.mark.parametrize(("steps", "probes"), [(10, 16), (50, 8), (80, 4)])
@pytest.mark.parametrize(
    "values",
    [
        np.geomspace(1e-10, 1, 150),
        np.r_[np.linspace(1, 2, 100), np.geomspace(1e-9, 1e-6, 50)],
        np.arange(1, 151.0) ** -3,
    ],
    ids=["wide", "two ends", "power"],
)
def test_the_error_of_a_density_covers_what_few_steps_do_not_resolve(values, steps, probes):
    operator = aslinearoperator(with_spectrum(values))
    for seed in range(4):
        found = density_of(operator, points=60, width=0.25, probes=probes, steps=steps, seed=seed)
        axis = np.log10(found.grid)[:, None]
        true = np.exp(-0.5 * ((axis - np.log10(values)) / 0.25) ** 2).mean(axis=1) / (0.25 * np.sqrt(2 * np.pi))
        assert (np.abs(found.density - true) <= found.error).all()


@pytest.mark.parametrize("steps", [20, 50, 80])
def test_unresolved_eigenvalues_are_counted_with_an_error(steps):
    operator = aslinearoperator(with_spectrum(np.r_[np.zeros(75), np.geomspace(1e-3, 1, 75)]))
    found = density_of(operator, probes=8, steps=steps)
    assert abs(found.unresolved - 75) <= found.unresolved_error
    assert found.unresolved_error < (20 if steps == 80 else 120)
    assert density_of(np.diag([1.0, 2.0, 0.0])).unresolved_error == 0.0


def test_the_noise_of_a_condition_number_covers_an_end_that_has_not_settled():
    values = np.geomspace(1e-9, 1.0, 700)
    operator = LinearOperator((700, 700), matvec=lambda x: values * x.reshape(-1), dtype=float)
    found = condition_number(operator)
    assert not found.resolved
    assert found.lambda_min - found.noise <= 1e-9
    assert "the smallest eigenvalue is at most" in str(found)


@pytest.mark.parametrize("n", [30, 400])
def test_an_operator_in_single_precision_does_not_resolve_what_that_hides(n):
    K = with_spectrum(np.r_[1e-9, np.linspace(0.5, 1, n - 1)]).astype(np.float32)
    for operator in (
        aslinearoperator(K),
        LinearOperator((n, n), matvec=lambda x: K @ x.reshape(-1).astype(np.float32), dtype=np.float32),
    ):
        found = condition_number(operator)
        assert not found.resolved
        assert found.lower <= 1e9
        assert found.noise > 1e-8


def test_bounds_of_a_forecast_are_refused_for_an_indefinite_kernel():
    K = with_spectrum(np.r_[-0.5, np.linspace(0.1, 3, 11)])
    with pytest.raises(InputError, match=r"gram: expected no eigenvalue below .* found one at -0.5"):
        ntk.forecast(K, Y)
    assert ntk.forecast(SimpleNamespace(values=K, noise=0.3), Y).noise == pytest.approx(0.5)


@pytest.mark.parametrize("weight", [1e-12, 1e-32, 1e-100])
@pytest.mark.parametrize(("solver", "full"), [("eigen", False), ("cholesky", False), ("eigen", True)])
def test_examples_of_next_to_no_weight_are_left_out_exactly(solver, full, weight):
    y = Y.reshape(6, 2) if full else Y
    weights = np.ones(len(y))
    weights[[1, 4]] = 0.0
    exact = KernelRidge(ridge=0.1, solver="cholesky").fit(kernel(), y, sample_weight=weights).loo_residuals_
    weights[[1, 4]] = weight, 3 * weight
    found = KernelRidge(ridge=0.1, solver=solver).fit(kernel(), y, sample_weight=weights).loo_residuals_
    np.testing.assert_allclose(found, exact, rtol=1e4 * weight + 1e-11)


def test_an_effective_dimension_is_never_negative():
    path = RidgePath(with_spectrum(np.r_[-1e-3, -1e-3, -1e-3, 1e-4]), np.ones(4))
    assert 0.0 <= path.effective_dimension(2e-3)[0] <= 4.0


@pytest.mark.parametrize("scale", [1e-200, 1e-170, 1e160, 1e200])
def test_numbers_whose_squares_are_none_are_refused_by_name(scale):
    K, labels = kernel(), Y > 0
    line = r"expected numbers the largest of which is from 1e-70 to 1e\+70"
    for name, use in {
        "gram": [
            lambda: ntk.effective_rank(scale * K),
            lambda: noise_of(scale * K),
            lambda: KernelRidge().fit(scale * K, Y),
            lambda: KernelLogistic().fit(scale * K, labels),
            lambda: ntk.forecast(scale * K, Y),
            lambda: ntk.eigsh(aslinearoperator(scale * K), 2),
            lambda: log_determinant(aslinearoperator(scale * K), 1.0),
        ],
        "y": [lambda: KernelRidge().fit(K, scale * Y)],
        "targets": [lambda: ntk.forecast(K, scale * Y)],
        "residual": [lambda: cholesky_solve(K, scale * Y, 1.0)],
        "eigenvalues": [lambda: ridge_grid([scale, 2 * scale], 0.0)],
        "sample_weight": [lambda: KernelRidge(1.0).fit(K, Y, sample_weight=scale * np.ones(12))],
    }.items():
        for one in use:
            with pytest.raises(InputError, match=f"{name}: {line}"):
                one()


def test_a_ridge_that_leaves_logistic_regression_no_numbers():
    with pytest.raises(InputError, match="ridge: expected at least"):
        KernelLogistic(1e-200).fit(kernel(), Y > 0)


def test_there_is_no_least_of_scores_that_are_no_numbers():
    with pytest.raises(InputError, match="scores: expected finite numbers, got 1 that are not"):
        pick(np.array([1.0, 2.0]), np.array([np.nan, 1.0]))


def test_an_operator_that_is_nothing():
    zero = aslinearoperator(np.zeros((6, 6)))
    assert not nystrom(zero, 3).factor.any()
    np.testing.assert_allclose(
        KernelRidge(ridge=2.0, solver="cg").fit(zero, np.arange(6.0)).dual_coef_, np.arange(6) / 2
    )
    with pytest.raises(InputError, match="positive definite"):
        conjugate_gradients(zero, np.arange(6.0), 0.0)


@pytest.mark.parametrize("budget", [0.0025, 1.0])
def test_a_factor_on_disk_of_triangles_that_differ(tmp_path, budget):
    K = kernel() + 10 * np.eye(12)
    exact = np.linalg.solve(K + np.eye(12), Y)
    np.testing.assert_allclose(cholesky_on_disk(K, Y, 1.0, budget_mib=budget, scratch=tmp_path).dual[:, 0], exact)
    K[9, 2] += 1e-6
    with pytest.raises(InputError, match="gram: expected a symmetric matrix"):
        cholesky_on_disk(K, Y, 1.0, budget_mib=budget, scratch=tmp_path)


def test_bounds_of_numbers_that_are_none():
    with pytest.raises(InputError, match="residual_norm: expected a finite number >= 0, got nan"):
        risk_bounds(1.0, float("nan"), 0.0, 1.0)
