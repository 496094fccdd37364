from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from scipy.sparse.linalg import eigsh as scipy_eigsh

from ntkengine.errors import InputError, NotConverged
from ntkengine.spectrum import (
    DenseOperator,
    as_matrix,
    condition_number,
    effective_dimension,
    effective_rank,
    eigsh,
    noise_of,
    spectral_density,
)


def with_spectrum(values: np.ndarray, seed: int = 0) -> np.ndarray:
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))
    matrix = (q * values) @ q.T
    return 0.5 * (matrix + matrix.T)


SPECTRA = {
    "outlier": np.r_[1e4, np.arange(1.0, 301.0) ** -1.5],
    "flat": 1.0 + 1e-3 * np.arange(211),
    "identity": np.ones(97),
    "rank 5": np.r_[5.0, 4.0, 3.0, 2.0, 1.0, np.zeros(158)],
    "repeated": np.r_[np.full(7, 9.0), np.full(4, 8.0), np.linspace(0.1, 5.0, 200)],
    "zero": np.zeros(63),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("k", [1, 6, 13])
def test_lanczos_finds_the_largest_and_its_bounds_hold(name: str, k: int) -> None:
    matrix = with_spectrum(SPECTRA[name])
    exact = np.linalg.eigvalsh(matrix)
    ritz = eigsh(matrix, k=k, method="lanczos", seed=3)
    assert ritz.method == "lanczos"
    # Position by position, so a missed copy of a repeated eigenvalue is an error.
    assert (np.abs(ritz.values - exact[-k:]) <= ritz.bounds).all()
    assert (np.diff(ritz.values) >= 0).all()
    np.testing.assert_allclose(ritz.vectors.T @ ritz.vectors, np.eye(k), atol=1e-12)
    np.testing.assert_allclose(
        ritz.residuals, np.linalg.norm(matrix @ ritz.vectors - ritz.vectors * ritz.values, axis=0), atol=1e-11
    )


@pytest.mark.parametrize("which", ["SA", "BE"])
@pytest.mark.parametrize("method", ["lanczos", "dense"])
def test_other_ends_match_scipy(which: str, method: str) -> None:
    values = np.r_[np.linspace(1.0, 2.0, 120), 10.0, 10.0, 12.0, -3.0, -3.0, -5.0, 1e-3]
    matrix = with_spectrum(values, seed=1)
    ritz = eigsh(matrix, k=5, which=which, method=method)
    np.testing.assert_allclose(ritz.values, np.sort(scipy_eigsh(matrix, k=5, which=which)[0]), atol=1e-9)


def test_dense_agrees_with_lapack_and_small_sizes_work() -> None:
    matrix = with_spectrum(np.geomspace(1e-9, 1.0, 63))
    np.testing.assert_allclose(eigsh(matrix, k=63).values, np.linalg.eigvalsh(matrix), atol=1e-14)
    assert eigsh(matrix, k=3).method == "dense"
    for method in ("dense", "lanczos"):
        assert eigsh(np.array([[2.5]]), k=1, which="BE", method=method).values == pytest.approx([2.5])
        np.testing.assert_allclose(eigsh(matrix, k=63, method=method).values, np.linalg.eigvalsh(matrix), atol=1e-13)


def test_operators_count_products_and_run_through_lanczos() -> None:
    matrix = with_spectrum(SPECTRA["outlier"])
    dense = DenseOperator(matrix)
    dense @ np.ones(301)
    dense @ np.ones((301, 4))
    assert dense.products == 5
    ritz = eigsh(aslinearoperator(matrix), k=4)
    assert ritz.method == "lanczos"
    assert 0 < ritz.products < 600
    np.testing.assert_allclose(ritz.values, np.linalg.eigvalsh(matrix)[-4:], rtol=1e-9)


def test_auto_takes_lanczos_where_it_is_quick_and_lapack_where_it_stalls() -> None:
    quick = with_spectrum(np.arange(1.0, 521.0) ** -1.5)
    stalling = with_spectrum(1.0 - np.linspace(0.0, 1.0, 520) ** 3)
    assert eigsh(quick, k=5).method == "lanczos"
    ritz = eigsh(stalling, k=3, tol=1e-12)
    assert ritz.method == "dense"
    assert (np.abs(ritz.values - np.linalg.eigvalsh(stalling)[-3:]) <= ritz.bounds).all()


def test_small_eigenvalues_under_an_outlier_are_relative_to_themselves() -> None:
    matrix = with_spectrum(SPECTRA["outlier"])
    ritz = eigsh(matrix, k=30, method="lanczos", tol=1e-6)
    np.testing.assert_allclose(ritz.values, np.linalg.eigvalsh(matrix)[-30:], rtol=1e-6)
    assert (ritz.residuals <= np.maximum(1e-6 * ritz.values, 1e-10)).all()


def test_lanczos_is_reproducible_and_carries_partial_results() -> None:
    matrix = with_spectrum(np.linspace(0.0, 1.0, 400))
    first, second = (eigsh(matrix, k=2, method="lanczos", seed=5, tol=1e-4) for _ in range(2))
    np.testing.assert_array_equal(first.values, second.values)
    with pytest.raises(NotConverged, match="stopped after") as caught:
        eigsh(matrix, k=2, method="lanczos", tol=1e-13, max_products=45)
    partial = caught.value.partial
    assert caught.value.residual == partial.residuals.max() > 0
    exact = np.linalg.eigvalsh(matrix)
    assert all(
        np.abs(exact - value).min() <= bound for value, bound in zip(partial.values, partial.bounds, strict=True)
    )


def test_noise_enters_the_bounds() -> None:
    matrix = with_spectrum(np.linspace(1.0, 2.0, 50))
    gram = SimpleNamespace(values=matrix, noise=1e-3)
    for method in ("dense", "lanczos"):
        ritz = eigsh(gram, k=3, method=method)
        assert (ritz.bounds >= ritz.residuals + 1e-3).all()
    assert noise_of(gram) == 1e-3
    assert noise_of(matrix) == pytest.approx(2.0**-53 * np.linalg.norm(matrix))
    assert noise_of(matrix.astype(np.float32)) == pytest.approx(2.0**-24 * np.linalg.norm(matrix), rel=1e-5)
    with pytest.raises(InputError, match=r"gram: expected a square matrix \(N, N\), got shape \(50, 49\)"):
        noise_of(matrix[:, 1:])


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (np.ones((3, 4)), r"square matrix \(N, N\), got shape \(3, 4\)"),
        (np.array([[1.0, 2.0], [0.0, 1.0]]), "symmetric matrix, got max"),
        (np.array([[1.0, 0.0], [0.0, np.nan]]), "finite entries, row 1"),
        (np.eye(2) * 1j, "real numbers, got dtype complex128"),
        (SimpleNamespace(values=np.eye(2), noise=-1.0), "noise: expected a finite number >= 0, got -1.0"),
    ],
)
def test_bad_matrices_are_refused(gram: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        eigsh(gram, k=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k: expected an integer from 1 to 6, got 0"),
        ({"k": 7}, "got 7"),
        ({"k": 2, "which": "LM"}, "which: expected"),
        ({"k": 2, "tol": 0.0}, "tol: expected"),
        ({"k": 2, "method": "qr"}, "method: expected"),
        ({"k": 2, "max_products": 0}, "max_products: expected"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        eigsh(np.eye(6), **arguments)


def test_bad_operators_are_refused() -> None:
    skew = np.triu(np.ones((30, 30)))
    with pytest.raises(InputError, match="symmetric operator"):
        eigsh(aslinearoperator(skew), k=2)
    with pytest.raises(InputError, match="finite products"):
        eigsh(LinearOperator((30, 30), matvec=lambda x: x * np.nan, dtype=np.float64), k=2)
    with pytest.raises(InputError, match="'dense' needs a matrix"):
        eigsh(aslinearoperator(np.eye(30)), k=2, method="dense")


def test_rounding_asymmetry_is_averaged() -> None:
    a = np.random.default_rng(0).standard_normal((1030, 7)).astype(np.float32)
    matrix = a @ a.T
    matrix[3, 5] = np.nextafter(matrix[5, 3], np.float32(np.inf))
    result = as_matrix(matrix)
    assert result.dtype == np.float64
    np.testing.assert_array_equal(result, result.T)
    matrix[3, 1029] += 0.1
    with pytest.raises(InputError, match="symmetric"):
        as_matrix(matrix)


def test_condition_number_brackets_every_matrix_within_the_noise() -> None:
    values = np.geomspace(1e-2, 10.0, 41)
    matrix, noise = with_spectrum(values), 2e-3
    condition = condition_number(SimpleNamespace(values=matrix, noise=noise))
    assert condition.resolved
    assert str(condition).startswith("1000 (")
    random = np.random.default_rng(2)
    for _ in range(20):
        error = random.standard_normal(matrix.shape)
        error += error.T
        true = np.linalg.eigvalsh(matrix + noise * error / np.linalg.norm(error, 2))
        assert condition.lower <= true[-1] / true[0] <= condition.upper


def test_unresolved_condition_number_is_a_lower_bound() -> None:
    condition = condition_number(SimpleNamespace(values=with_spectrum(np.geomspace(1e-7, 1.0, 30)), noise=1e-5))
    assert not condition.resolved
    assert condition.upper == np.inf
    assert condition.lower == pytest.approx(1.0 / 1.01e-5, rel=1e-3)
    assert str(condition).startswith("> 99000 (unresolved: the smallest eigenvalue 1e-07")


def test_a_negative_eigenvalue_shows_its_own_noise() -> None:
    condition = condition_number(
        SimpleNamespace(values=with_spectrum(np.r_[-1e-3, np.linspace(1.0, 2.0, 9)]), noise=0.0)
    )
    assert condition.noise == pytest.approx(1e-3)
    assert not condition.resolved
    assert condition.lower == pytest.approx(1999.0, rel=1e-6)


def test_singular_and_zero_matrices_are_unresolved_without_any_declared_noise() -> None:
    a = np.random.default_rng(4).standard_normal((40, 9))
    assert not condition_number(a @ a.T).resolved
    zero = condition_number(np.zeros((5, 5)))
    assert (zero.resolved, zero.lower) == (False, 1.0)


def test_condition_number_of_an_operator() -> None:
    matrix = with_spectrum(np.linspace(1.0, 7.0, 150))
    condition = condition_number(aslinearoperator(matrix))
    assert condition.lower <= 7.0 <= condition.upper
    assert condition.upper - condition.lower < 1e-5


def test_density_integrates_to_the_resolved_fraction() -> None:
    values = np.r_[np.geomspace(1e-3, 1e2, 37), np.full(12, 1e-9)]
    result = spectral_density(SimpleNamespace(values=with_spectrum(values), noise=1e-6), points=801)
    assert (result.unresolved, result.rows) == (12, 49)
    area = np.trapezoid(result.density, np.log10(result.grid))
    assert area == pytest.approx(37 / 49, abs=1e-4)
    with pytest.raises(InputError, match="above its noise"):
        spectral_density(SimpleNamespace(values=np.eye(3), noise=2.0))
    with pytest.raises(InputError, match="points"):
        spectral_density(np.eye(3), points=1)


def test_effective_dimension_and_rank() -> None:
    values = np.r_[5.0, 1.0, 0.25, np.zeros(4)]
    matrix = with_spectrum(values)
    inverse = np.linalg.inv(matrix + 0.3 * np.eye(7))
    assert effective_dimension(matrix, 0.3) == pytest.approx(np.trace(matrix @ inverse), rel=1e-12)
    assert effective_rank(matrix) == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-12)
    assert effective_rank(np.eye(9)) == pytest.approx(9.0)
    with pytest.raises(InputError, match="ridge: expected"):
        effective_dimension(matrix, 0.0)
    with pytest.raises(InputError, match="non-zero"):
        effective_rank(np.zeros((2, 2)))
