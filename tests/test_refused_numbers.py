"""Numbers that would come out wrong, or of nothing: refused by name; and shapes that are alike by chance."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
from scipy.sparse.linalg import LinearOperator

import ntkengine as ntk
from ntkengine.errors import InputError
from ntkengine.forecast.crossfit import CrossFit
from ntkengine.ridge.direct import cholesky_solve
from ntkengine.ridge.outofcore import cholesky_on_disk
from ntkengine.ridge.solve import RidgePath


def kernel(n=12):
    A = np.random.default_rng(0).standard_normal((n, 2 * n))
    return A @ A.T


Y = np.random.default_rng(1).standard_normal(12)
NAN_FOLDS = np.r_[[0.0] * 4, [1.0] * 4, [np.nan] * 4]


@pytest.mark.parametrize("ridge", [0.0, 1e-16])
def test_a_factor_whose_pivots_hide_how_singular_the_matrix_is(tmp_path, ridge):
    n = 60
    L = np.tril(-np.ones((n, n)), -1) + np.eye(n)  # unit pivots, λ_min of L Lᵀ about 4⁻ⁿ
    y = np.random.default_rng(1).standard_normal(n)
    for solve in (cholesky_solve, lambda *a: cholesky_on_disk(*a, budget_mib=1.0, scratch=tmp_path)):
        with pytest.raises(InputError, match=r"ridge: .* well enough conditioned, got .* residual of"):
            solve(0.1 * (L @ L.T), y, ridge)


def test_traces_of_functions_of_an_indefinite_matrix():
    for f in (ntk.log_determinant, ntk.effective_dimension):
        with pytest.raises(InputError, match="gram: expected no eigenvalue below .* found one at -0.5"):
            f(np.diag([1.0, -0.5]), 1.0)


def test_an_operator_whose_krylov_spaces_close_at_once():
    identity = LinearOperator((50, 50), matvec=lambda v: v.reshape(-1), dtype=float)
    found = ntk.effective_dimension(identity, 1.0)
    assert abs(float(found) - 25.0) <= found.error + 1e-9


def test_folds_without_a_name():
    with pytest.raises(InputError, match="folds: .* row 8 has NaN"):
        RidgePath(kernel(), Y).held_out_residuals(1.0, NAN_FOLDS)
    with pytest.raises(InputError, match="cv: .* row 8 has NaN"):
        ntk.KernelRidge("cv", cv=NAN_FOLDS).fit(kernel(), Y)


@pytest.mark.parametrize("weight", [np.nan, np.inf, -1.0])
def test_weights_of_classes(weight):
    with pytest.raises(InputError, match="class_weight: expected finite numbers >= 0"):
        ntk.KernelLogistic(1.0, class_weight={0: weight, 1: 1, 2: 1}).fit(np.eye(6), [0, 1, 2] * 2)


def test_complex_numbers():
    for name, make in {
        "y": lambda: ntk.KernelRidge(1.0).fit(kernel(), Y + 1j),
        "sample_weight": lambda: ntk.KernelRidge(1.0).fit(kernel(), Y, sample_weight=Y + 1j),
        "offset": lambda: ntk.KernelLogistic(1.0).fit(kernel(), [0, 1] * 6, offset=Y + 1j),
        "targets": lambda: ntk.forecast(kernel(), Y + 1j),
    }.items():
        with pytest.raises(InputError, match=f"{name}: expected real numbers"):
            make()


def test_outputs_of_folds_that_stay_in_their_file(tmp_path):
    # With as many classes as examples they have the shape of a Gram, and are read when they are needed.
    outputs, fold = np.random.default_rng(0).standard_normal((3, 6, 6)), np.array([2, 0, 1, 0, 2, 1])
    with h5py.File(tmp_path / "k.h5", "w") as file:
        stored = file.create_dataset("fold_outputs", data=outputs)
        held = CrossFit(fold, np.zeros((3, 6, 6)), stored).held_out()
    np.testing.assert_array_equal(held, outputs[fold, np.arange(6)])
