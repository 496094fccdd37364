"""Low-rank approximations from columns, and conjugate gradients with what they make."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse.linalg import aslinearoperator

from ntkengine.errors import InputError, NotConverged
from ntkengine.ridge import Preconditioner, conjugate_gradients, nystrom, preconditioner, random_cholesky
from ntkengine.spectrum import DenseOperator, ImplicitOperator, ShardedOperator
from tests.test_operators import on_ranks
from tests.test_spectrum import with_spectrum

N = 400
TANGENT = np.r_[1e4, np.arange(1.0, N) ** -1.5]  # an outlier and a power law, as empirical NTKs have


def columns_of(matrix, asked):
    def columns(index):
        asked.append(index.copy())
        return matrix[:, index]

    return columns


def test_random_cholesky_reads_only_its_columns_and_is_exact_there():
    matrix, asked = with_spectrum(TANGENT), []
    low = random_cholesky(columns_of(matrix, asked), matrix.diagonal(), 60, block=16)
    assert low.factor.shape == (N, 60)
    assert len(set(low.pivots)) == 60
    assert set(low.pivots) <= set(np.concatenate(asked))
    assert max(map(len, asked)) <= 16
    approximation = low.factor @ low.factor.T
    np.testing.assert_allclose(approximation[:, low.pivots], matrix[:, low.pivots], atol=1e-8)
    gap = np.linalg.eigvalsh(matrix - approximation)
    assert gap[0] > -1e-8
    assert gap[-1] <= low.error
    np.testing.assert_allclose(low.residual, (matrix - approximation).diagonal(), atol=1e-8)
    # The guarantee is for the mean; 60 columns against the best approximation of rank 20.
    assert low.error < 2.0 * np.sort(TANGENT)[:-20].sum()


def test_random_cholesky_draws_pivots_as_one_by_one_does():
    matrix = np.diag([4.0, 2.0, 1.0, 1.0])
    matrix[0, 1] = matrix[1, 0] = 2.0
    counts = {block: np.zeros((4, 4)) for block in (1, 3)}
    draws = 6000
    for block, count in counts.items():
        for seed in range(draws):
            low = random_cholesky(lambda at: matrix[:, at], matrix.diagonal(), 2, block=block, seed=seed)
            count[low.pivots.min(), low.pivots.max()] += 1
    # First by the diagonal, then by what is left of it: 0 leaves 1 of row 1, and 1 leaves 2 of row 0.
    first = matrix.diagonal() / 8
    expected = np.zeros((4, 4))
    for i in range(4):
        left = np.maximum(matrix.diagonal() - matrix[i] ** 2 / matrix[i, i], 0)
        for j in range(4):
            expected[min(i, j), max(i, j)] += first[i] * left[j] / left.sum()
    for count in counts.values():
        assert np.abs(count / draws - expected).max() < 4 * np.sqrt(0.25 / draws)


def test_random_cholesky_stops_when_nothing_is_left():
    a = np.random.default_rng(0).standard_normal((50, 7))
    low = random_cholesky(lambda at: (a @ a.T)[:, at], (a**2).sum(1), 30)
    assert low.factor.shape == (50, 7)
    np.testing.assert_allclose(low.factor @ low.factor.T, a @ a.T, atol=1e-10)
    rough = random_cholesky(lambda at: (a @ a.T)[:, at], (a**2).sum(1), 30, block=1, tol=0.5)
    assert rough.factor.shape[1] < 7
    assert rough.error <= 0.5 * rough.trace
    assert random_cholesky(lambda at: np.zeros((5, len(at))), np.zeros(5), 3).factor.shape == (5, 0)


def test_random_cholesky_ends_when_the_diagonal_promises_more_than_the_columns_have():
    a = np.random.default_rng(0).standard_normal((50, 7))
    low = random_cholesky(lambda at: (a @ a.T)[:, at], 1.0005 * (a**2).sum(1), 30)
    assert low.factor.shape == (50, 7)
    np.testing.assert_allclose(low.factor @ low.factor.T, a @ a.T, atol=1e-10)


@pytest.mark.parametrize(
    ("columns", "diagonal", "message"),
    [
        (lambda at: np.ones((4, len(at))), np.ones(5), r"columns: expected shape \(5, "),
        (lambda at: np.full((5, len(at)), np.nan), np.ones(5), "columns: expected finite"),
        (lambda at: np.full((5, len(at)), 2.0), np.ones(5), "differs from the diagonal 1 by 1"),
        (lambda at: at, -np.ones(5), "diagonal: expected"),
    ],
)
def test_bad_columns_are_refused(columns, diagonal, message):
    with pytest.raises(InputError, match=message):
        random_cholesky(columns, diagonal, 2)


def test_nystrom_is_below_the_matrix_and_near_the_best():
    matrix = with_spectrum(TANGENT)
    low = nystrom(DenseOperator(matrix), 60)
    gap = np.linalg.eigvalsh(matrix - low.factor @ low.factor.T)
    assert gap[0] > -1e-7
    assert gap[-1] < 10 * np.sort(TANGENT)[-30]
    with pytest.raises(InputError, match="positive semi-definite"):
        nystrom(aslinearoperator(-np.eye(30)), 4)


def test_the_preconditioner_is_an_inverse():
    matrix = with_spectrum(TANGENT)
    low = random_cholesky(lambda at: matrix[:, at], matrix.diagonal(), 50)
    P = Preconditioner(low, 1e-3)
    X = np.random.default_rng(0).standard_normal((N, 3))
    whole = low.factor @ (low.factor.T @ X) + 1e-3 * X
    np.testing.assert_allclose(P @ whole, X, atol=1e-6)
    with pytest.raises(InputError, match="ridge: expected"):
        Preconditioner(low, 0.0)


@pytest.mark.parametrize("way", ["matrix", "columns", "products"])
def test_preconditioned_gradients_take_ten_times_fewer_iterations(way):
    matrix, ridge = with_spectrum(TANGENT), 1e-4
    right = np.random.default_rng(1).standard_normal((N, 2))
    exact = np.linalg.solve(matrix + ridge * np.eye(N), right)
    plain = conjugate_gradients(matrix, right, ridge, tol=1e-8)
    operator = ImplicitOperator(lambda X: matrix @ X, N)
    given = {
        "matrix": {},
        "columns": {"columns": lambda at: matrix[:, at], "diagonal": matrix.diagonal()},
        "products": {},
    }
    P = preconditioner(operator if way == "products" else matrix, ridge, 250, **given[way])
    quick = conjugate_gradients(operator, right, ridge, preconditioner=P, tol=1e-8)
    for found in (plain, quick):
        assert (found.residual <= 1e-8).all()
        np.testing.assert_allclose(found.solution, exact, atol=1e-5 * np.abs(exact).max())
        assert found.products <= 2 * (found.iterations + 2)
    assert quick.iterations * 10 <= plain.iterations


def test_gradients_say_when_they_stop_short():
    matrix = with_spectrum(TANGENT)
    right = np.ones(N)
    with pytest.raises(NotConverged, match="after 5 iterations, 1e-08 wanted; the iterations are used up") as caught:
        conjugate_gradients(matrix, right, 1e-3, max_iterations=5)
    partial = caught.value.partial
    true = np.linalg.norm(right - matrix @ partial.solution - 1e-3 * partial.solution) / np.linalg.norm(right)
    assert partial.residual == pytest.approx([true], rel=1e-6)
    with pytest.raises(NotConverged, match="rounding lets it fall no further"):
        conjugate_gradients(matrix, right, 1e-3, tol=1e-15)
    with pytest.raises(InputError, match="positive definite"):
        conjugate_gradients(-np.eye(5), np.ones(5), 0.5)
    with pytest.raises(InputError, match="tol"):
        conjugate_gradients(np.eye(5), np.ones(5), 0.5, tol=0)


def test_zero_and_unequal_right_hand_sides():
    matrix = with_spectrum(TANGENT)
    right = np.zeros((N, 3))
    right[:, 1], right[:, 2] = matrix[:, 0] + matrix[:, 1], np.cos(np.arange(N)) * 1e-9
    found = conjugate_gradients(matrix, right, 0.5, tol=1e-10)
    np.testing.assert_array_equal(found.solution[:, 0], 0.0)
    assert (found.residual <= 1e-10).all()


@pytest.mark.parametrize("size", [1, 2])
def test_ranks_solve_as_one(size):
    matrix = with_spectrum(TANGENT)
    right = np.cos(np.arange(N))

    def work(comm):
        operator = ShardedOperator(np.array_split(matrix, size)[comm.Get_rank()], comm)

        def solver(op):
            return conjugate_gradients(op, right, 0.1, preconditioner=preconditioner(op, 0.1, 40), tol=1e-11)

        return operator.solve(solver)

    exact = np.linalg.solve(matrix + 0.1 * np.eye(N), right)
    for found in on_ranks(size, work):
        np.testing.assert_allclose(found.solution, exact, atol=1e-8)


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("block", [1, 64])
def test_columns_of_an_indefinite_matrix_are_refused(rank, block):
    large = np.full((5, 5), 3.0)
    np.fill_diagonal(large, 1.0)
    hollow = np.zeros((4, 4))
    hollow[0, 1] = hollow[1, 0] = 5.0
    for K in (np.array([[1.0, 2.0], [2.0, 1.0]]), large, hollow):
        if K is hollow and block == 1:
            continue  # two of the four columns show it
        with pytest.raises(InputError, match="expected those of a positive semi-definite matrix"):
            random_cholesky(lambda at: K[:, at], K.diagonal().copy(), rank, block=block)  # noqa: B023


@pytest.mark.parametrize("lowest", [-3.0, -0.3, -0.03])
def test_the_error_is_a_bound_or_refused(lowest):
    refused = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        Q = np.linalg.qr(rng.standard_normal((30, 30)))[0]
        K = (Q * np.r_[lowest, np.zeros(20), np.linspace(1, 4, 9)]) @ Q.T
        K = 0.5 * (K + K.T)
        if (K.diagonal() < 0).any():
            K += np.diag(np.maximum(-K.diagonal(), 0.0))
        try:
            low = random_cholesky(lambda at: K[:, at], K.diagonal().copy(), 30, seed=seed)  # noqa: B023
        except InputError:
            refused += 1
            continue
        assert np.linalg.norm(K - low.factor @ low.factor.T, 2) <= low.error
    assert refused >= 15


def test_a_preconditioner_of_what_the_ridge_makes_positive():
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.standard_normal((60, 60)))[0]
    K = (Q * np.r_[-0.1, np.zeros(40), np.linspace(1, 40, 19)]) @ Q.T
    K = 0.5 * (K + K.T)
    right = rng.standard_normal(60)
    found = conjugate_gradients(K, right, 1.0, preconditioner=preconditioner(K, 1.0, 30))
    np.testing.assert_allclose(found.solution, np.linalg.solve(K + np.eye(60), right), atol=1e-6)


def test_the_error_has_the_noise_that_is_told():
    missed = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        n = int(rng.choice([5, 20, 60]))
        x = rng.standard_normal((n, 3)) * 10.0 ** rng.uniform(-2, 2, 3)
        K = x @ x.T
        noise = 10.0 ** rng.uniform(-8, -2) * np.linalg.norm(K, 2)
        E = rng.standard_normal((n, n))
        K += (E + E.T) * noise / np.linalg.norm(E + E.T, 2)
        diagonal = np.maximum(np.diag(K), 0)
        found = random_cholesky(lambda i, K=K: K[:, i], diagonal, n, noise=noise, seed=seed)
        missed += np.linalg.norm(K - found.factor @ found.factor.T, 2) > found.error
    assert missed == 0
