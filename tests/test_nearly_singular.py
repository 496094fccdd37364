"""Ridges near the rounding of K, and numbers at the ends of float64: against fractions, or refused."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from ntkengine.errors import InputError
from ntkengine.ridge import KernelRidge, RidgePath, conjugate_gradients, ridge_curve, ridge_grid

N = 8


def solved(K, y, ridge):
    """Return Q y and the leave-one-out residuals of (K + ridge·I), by elimination in fractions."""
    n = len(K)
    rows = [
        [Fraction(float(K[i, j])) + (Fraction(float(ridge)) if i == j else 0) for j in range(n)]
        + [Fraction(int(i == j)) for j in range(n)]
        for i in range(n)
    ]
    for i in range(n):
        pivot = max(range(i, n), key=lambda k: abs(rows[k][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [x / rows[i][i] for x in rows[i]]
        for k in range(n):
            if k != i and rows[k][i]:
                rows[k] = [a - rows[k][i] * b for a, b in zip(rows[k], rows[i], strict=True)]
    Q = [row[n:] for row in rows]
    dual = [sum(q * Fraction(float(v)) for q, v in zip(row, y, strict=True)) for row in Q]
    return np.array([float(d) for d in dual]), np.array([float(d / Q[i][i]) for i, d in enumerate(dual)])


def problems():
    rng = np.random.default_rng(3)
    for turn in range(12):
        if turn % 3 == 0:
            B = rng.standard_normal((N, N // 2))
        elif turn % 3 == 1:
            B = rng.standard_normal((N, 2 * N))
            B[-1] = B[0]
        else:
            B = np.linalg.qr(rng.standard_normal((N, N)))[0] * np.logspace(-8, 0, N)
        K = B @ B.T
        yield 0.5 * (K + K.T), rng.standard_normal(N)


@pytest.mark.parametrize("solver", ["eigen", "cholesky", "out-of-core"])
@pytest.mark.parametrize("relative", [0.0, 1e-16, 2e-15, 1e-14, 1e-13, 1e-12, 1e-11, 1e-9])
def test_what_is_not_refused_is_right(relative, solver):
    refused = 0
    for K, y in problems():
        ridge = relative * float(np.linalg.eigvalsh(K)[-1])
        try:
            model = KernelRidge(ridge=ridge, solver=solver).fit(K, y)
        except InputError:
            refused += 1
            continue
        dual, left = solved(K, y, ridge)
        assert np.linalg.norm(model.dual_coef_ - dual) <= 1e-3 * np.linalg.norm(dual)
        assert np.linalg.norm(model.loo_residuals_ - left) <= 1e-3 * np.linalg.norm(left)
    assert refused == (12 if relative < 1e-16 else 0 if relative > 1e-11 else refused)


def test_the_low_end_of_the_default_grid_is_right():
    rng = np.random.default_rng(1)
    for turn in range(6):
        Q = np.linalg.qr(rng.standard_normal((N, N)))[0]
        K = (Q * np.logspace(-17, 0, N)) @ Q.T
        K = 0.5 * (K + K.T)
        y = rng.standard_normal(N) if turn % 2 else K @ rng.standard_normal(N)
        model = KernelRidge(ridge="loo").fit(K, y)
        left = solved(K, y, model.path_.ridges[0])[1]
        assert model.path_.loo_mse[0] == pytest.approx(float(np.mean(left**2)), rel=1e-3)
        assert ridge_grid(np.linalg.eigvalsh(K), 0.0)[0] == pytest.approx(model.path_.ridges[0], rel=1e-4)


def test_generalised_cross_validation_without_a_ridge():
    values, y = np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0])
    path = RidgePath(np.diag(values), y)
    limit = np.mean((y / values) ** 2) / np.mean(1.0 / values) ** 2
    assert path.gcv([0.0, 1e-200]) == pytest.approx([limit, limit], rel=1e-14)
    assert ridge_curve(path, [0.0, 1.0]).gcv[0] == pytest.approx(limit, rel=1e-14)
    assert path.gcv([1e300])[0] == pytest.approx(np.mean(y**2), rel=1e-14)


def test_residuals_where_the_dual_coefficients_leave_float64():
    y = np.array([1.0, -2.0, 3.0, 4.0]) * 1e-65
    path = RidgePath(np.eye(4), y)
    for found in (path.loo_residuals(1e300), path.held_out_residuals(1e300, [0, 0, 1, 1]), path.train_residual(1e300)):
        assert found[:, 0] == pytest.approx(y, rel=1e-14)
    assert path.loo_mse([1e300])[0] == pytest.approx(np.mean(y**2), rel=1e-14)
    with pytest.raises(InputError, match="dual coefficients float64 can hold"):
        path.dual(1e300)
    with pytest.raises(InputError, match="dual coefficients float64 can hold"):
        KernelRidge(ridge=1e300, solver="eigen").fit(np.eye(4), y)


@pytest.mark.parametrize(
    ("scale", "right", "what"), [(1e-50, 1e300, "too large"), (1e50, 1e-300, "too small"), (1e40, 1e-290, "too small")]
)
def test_conjugate_gradients_outside_float64(scale, right, what):
    K = scale * np.eye(3)
    with pytest.raises(InputError, match=what):
        conjugate_gradients(K, np.full(3, right), 0.0)
    with pytest.raises(InputError, match=what):
        conjugate_gradients(K, np.column_stack([np.ones(3), np.full(3, right)]), 0.0)
    assert conjugate_gradients(K, np.zeros(3), 0.0).solution.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("solver", ["eigen", "cholesky", "out-of-core"])
def test_duplicates_under_a_tiny_ridge_are_left_out_rightly_or_refused(solver):
    refused = 0
    for seed in range(160):
        rng = np.random.default_rng(seed)
        n = 2 + seed % 3
        B = rng.standard_normal((n, 5))
        B[-1] = B[0]
        K, y = B @ B.T, rng.standard_normal(n)
        K[-1], K[:, -1], K[-1, -1] = K[0], K[:, 0], K[0, 0]
        K = 0.5 * (K + K.T)
        for ridge in (K[0, 0] * 10.0 ** rng.uniform(-15, -13), 1e-9 * K[0, 0]):
            try:
                model = KernelRidge(ridge=ridge, solver=solver).fit(K, y)
            except InputError:
                refused += 1
                continue
            dual, left = solved(K, y, ridge)
            assert np.linalg.norm(model.dual_coef_ - dual) <= 1e-3 * np.linalg.norm(dual)
            assert np.linalg.norm(model.loo_residuals_ - left) <= 1e-3 * np.linalg.norm(left)
    assert 5 < refused <= 160
