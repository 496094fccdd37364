"""Sums over the spectrum: exact against their definitions, sampled within their error bars."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.sparse.linalg import aslinearoperator

from ntkengine.errors import InputError
from ntkengine.spectrum import (
    DenseOperator,
    condition_number,
    effective_dimension,
    effective_rank,
    log_determinant,
    spectral_density,
)
from ntkengine.spectrum.implicit import ImplicitOperator
from ntkengine.spectrum.quadrature import quadrature
from tests.test_eigsh import draw
from tests.test_spectrum import with_spectrum

KINDS = ("outlier", "flat", "rank-deficient", "repeated", "tangent")


def test_exact_values_equal_their_definitions():
    values = np.r_[5.0, 1.0, 0.25, np.zeros(4)]
    matrix = with_spectrum(values)
    found = log_determinant(matrix, 0.3)
    assert found == pytest.approx(np.linalg.slogdet(matrix + 0.3 * np.eye(7))[1], rel=1e-12)
    assert found.exact
    assert 0 < found.error < 1e-12
    noisy = log_determinant(SimpleNamespace(values=matrix, noise=1e-3), 0.3)
    assert noisy.error == pytest.approx(np.log((values + 0.301) / (values + 0.3)).sum(), rel=1e-6)
    dimension = effective_dimension(matrix, 0.3)
    assert dimension == pytest.approx((values / (values + 0.3)).sum(), rel=1e-12)
    shown, error = map(float, str(dimension).split(" ± "))
    assert abs(shown - (values / (values + 0.3)).sum()) <= error < 1e-7
    again = pickle.loads(pickle.dumps(noisy))
    assert (again, again.error, again.exact) == (noisy, noisy.error, True)


def test_an_effective_rank_is_right_to_its_error():
    tight = 0
    for seed in range(100):
        true, rng = draw(KINDS[seed % 5], seed)
        noise = 10.0 ** rng.uniform(-8, -1) * np.linalg.norm(true, 2)
        E = rng.standard_normal(true.shape)
        E = 0.5 * (E + E.T) if seed % 3 else np.eye(len(true))  # what moves the trace most
        E *= noise / np.linalg.norm(E, 2)
        values = np.linalg.eigvalsh(true)
        exact = values.sum() ** 2 / (values**2).sum()
        found = effective_rank(SimpleNamespace(values=true + E, noise=noise))
        assert abs(found - exact) <= found.error
        assert found.error <= len(true)
        tight += found.error < 0.1 * exact
    assert tight > 40
    assert effective_rank(np.eye(9)).error < 1e-12


@pytest.mark.parametrize("function", [log_determinant, effective_dimension])
@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_sampled_values_are_within_their_error_bars(function, noise):
    missed = wide = 0
    for seed in range(200):
        matrix, rng = draw(KINDS[seed % 5], seed)
        ridge = 10.0 ** rng.uniform(-4, 1)
        operator = DenseOperator(SimpleNamespace(values=matrix, noise=noise))
        exact = function(matrix, ridge)
        # Few steps, so that the quadrature's own error matters as well as the probes'.
        found = function(operator, ridge, method="lanczos", probes=6, steps=int(rng.choice([8, 20, 60])), seed=seed)
        assert not found.exact
        missed += abs(found - exact) > found.error
        wide += found.error > 0.5 * max(1.0, abs(exact))
    assert missed <= 10  # 95 % of the draws
    assert wide < 100


@pytest.mark.parametrize("probes", [2, 4, 16])
@pytest.mark.parametrize("function", [log_determinant, effective_dimension])
def test_error_bars_hold_where_one_direction_is_all_that_varies(function, probes):
    matrices = [np.ones((150, 150)), with_spectrum(np.r_[1e4, np.arange(1.0, 150.0) ** -1.5])]
    exact = [function(matrix, 10.0) for matrix in matrices]
    missed = 0
    for seed in range(200):
        found = function(DenseOperator(matrices[seed % 2]), 10.0, method="lanczos", probes=probes, steps=30, seed=seed)
        missed += abs(found - exact[seed % 2]) > found.error
    assert missed <= 4  # of 99 % intervals
    even = function(DenseOperator(np.eye(50)), 1.0, method="lanczos", probes=probes)
    assert abs(even - function(np.eye(50), 1.0)) <= even.error < 1e-11


@pytest.mark.parametrize("function", [log_determinant, effective_dimension])
@pytest.mark.parametrize("noise", [1e-6, 1e-3, 1.0])
def test_error_bars_hold_where_noise_is_all_there_is(function, noise):
    for true in (np.zeros(60), np.r_[np.ones(5), np.zeros(55)]):
        exact = function(with_spectrum(true), 1e-3 * noise)
        gram = SimpleNamespace(values=with_spectrum(true + noise), noise=noise)
        for method, given in (("exact", gram), ("lanczos", DenseOperator(gram))):
            found = function(given, 1e-3 * noise, method=method)
            assert abs(found - exact) <= found.error * (1 + 1e-9)


def test_sampled_densities_are_within_their_error_bars():
    missed, counted = 0, 0
    spectra = [np.geomspace(1e-3, 1.0, 150), np.r_[30.0, np.linspace(0.01, 2.0, 150)]]
    matrices = [with_spectrum(values) for values in spectra]
    for seed in range(40):
        values, operator = spectra[seed % 2], aslinearoperator(matrices[seed % 2])
        found = spectral_density(operator, points=60, width=0.25, seed=seed)
        logs = np.log10(values)
        axis = np.log10(found.grid)
        true = np.exp(-0.5 * ((axis[:, None] - logs) / 0.25) ** 2).mean(axis=1) / (0.25 * np.sqrt(2 * np.pi))
        off = np.abs(found.density - true) > found.error
        missed += int(off.sum())
        counted += off.size
        assert found.error.max() < 0.6 * true.max()
        assert found.rows == len(values)
    assert missed <= 0.01 * counted


@pytest.mark.parametrize(
    ("values", "ridge", "steps"),
    [
        (np.r_[1e-8, np.ones(59)], 1e-6, 1),
        (np.r_[np.zeros(5), np.linspace(0.5, 1.0, 195)], 1e-6, 3),
        (np.r_[np.zeros(2), np.linspace(0.1, 1e3, 118)], 1e-9, 60),
    ],
    ids=["one small", "null space", "null space, long range"],
)
def test_errors_hold_where_the_truth_is_at_one_end_of_the_bracket(values, ridge, steps):
    operator = ImplicitOperator(lambda X: values[:, None] * X, len(values), block=16)
    truth = float((values / (values + ridge)).sum())
    found = [effective_dimension(operator, ridge, steps=steps, seed=seed) for seed in range(100)]
    assert sum(abs(e - truth) > e.error for e in found) <= 3
    assert np.median([e.error for e in found]) < 0.1 * truth


def test_more_probes_narrow_the_error():
    operator = aslinearoperator(with_spectrum(np.geomspace(1e-3, 10.0, 300)))
    few = effective_dimension(operator, 0.1, probes=8)
    many = effective_dimension(operator, 0.1, probes=128)
    assert many.error < 0.4 * few.error
    assert operator.shape == (300, 300)


def test_the_two_rules_bracket_every_probe():
    values = np.r_[1e3, np.geomspace(1e-4, 1.0, 200)]
    operator = DenseOperator(np.diag(values))
    found = quadrature(operator, probes=4, steps=10)
    z = np.random.default_rng(0).standard_normal((4, 201))
    operator.block = 3  # probes in step change nothing
    again = quadrature(operator, probes=4, steps=10)
    for i in range(4):
        np.testing.assert_allclose(found.diagonals[i], again.diagonals[i], rtol=1e-9)
    for f in (lambda x: np.log(x + 0.01), lambda x: x / (x + 0.01)):
        upper, lower = found.means(f), found.floor(f, -1e-9)[0]
        for probe in range(4):
            true = float(z[probe] ** 2 @ f(values)) / float(z[probe] @ z[probe])  # the matrix is diagonal
            assert lower[probe] <= true <= upper[probe]
    assert operator.products == 80


def test_bad_arguments_are_refused():
    with pytest.raises(InputError, match="ridge: expected"):
        log_determinant(np.eye(3), 0.0)
    with pytest.raises(InputError, match="'exact' needs a matrix"):
        log_determinant(aslinearoperator(np.eye(3)), 1.0, method="exact")
    with pytest.raises(InputError, match="method: expected"):
        effective_dimension(np.eye(3), 1.0, method="slq")
    with pytest.raises(InputError, match="probes: expected an integer >= 2, got 1"):
        effective_dimension(np.eye(3), 1.0, method="lanczos", probes=1)
    for sampled in (lambda op: log_determinant(op, 1.0), spectral_density):
        with pytest.raises(InputError, match="symmetric operator"):
            sampled(aslinearoperator(np.triu(np.ones((40, 40)))))
    with pytest.raises(InputError, match="no eigenvalue below"):
        log_determinant(aslinearoperator(with_spectrum(np.linspace(-2, 3, 50))), 0.5)


def test_the_condition_number_of_an_operator_whose_low_end_is_out_of_reach():
    values = np.geomspace(1e-8, 1.0, 700)
    found = condition_number(aslinearoperator(np.diag(values)))
    assert not found.resolved
    assert found.upper == np.inf
    assert 10 < found.lower <= 1e8
    assert str(found).startswith("> ")
