"""Kernel logistic regression where offsets are large: checks that hold for every example, losses below rounding."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit, softmax

from ntkengine.errors import InputError, NotConverged
from ntkengine.ridge import KernelLogistic

N = 12


def kernel(lowest):
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((N, N)))[0]
    values = np.linspace(0.1, 2, N)
    values[0] = lowest
    K = (Q * values) @ Q.T
    return 0.5 * (K + K.T)


@pytest.mark.parametrize("large", [0.0, 1e3, 1e5, 1e12])
def test_one_large_offset_hides_no_indefinite_kernel(large):
    y, f0 = np.repeat([0, 1], N // 2), np.zeros(N)
    f0[-1] = large
    with pytest.raises(InputError, match="expected a positive semi-definite kernel"):
        KernelLogistic(ridge=0.05).fit(kernel(-1.0), y, offset=f0)
    with pytest.raises(InputError, match="expected a positive semi-definite kernel"):
        KernelLogistic(ridge=0.05).fit(kernel(-1.0), y % 2 + (np.arange(N) % 3 == 0), offset=np.outer(f0, [0, 1, 0]))
    model = KernelLogistic(ridge=0.05).fit(kernel(0.0), y, offset=f0)
    p = expit(f0 + kernel(0.0) @ model.dual_coef_)
    assert np.abs(0.05 * model.dual_coef_ - (y - p)).max() < 1e-7


def test_every_class_nearly_certain_from_the_start():
    model = KernelLogistic(ridge=1.0).fit(np.eye(3), [0, 1, 2], offset=40.0 * np.eye(3))
    others = np.exp(-40.0)
    assert model.loss_ == pytest.approx(3 * 2 * others, rel=1e-12)
    assert model.dual_coef_ == pytest.approx(others * (3 * np.eye(3) - 1), rel=1e-12)
    model = KernelLogistic(ridge=1.0).fit(np.eye(2), [0, 1], offset=[-40.0, 40.0])
    assert model.dual_coef_ == pytest.approx([-others, others], rel=1e-12)
    model = KernelLogistic(ridge=1.0).fit(np.eye(3), [0, 1, 2], offset=1e4 * np.eye(3))
    assert (model.loss_, model.dual_coef_.any()) == (0.0, False)


@pytest.mark.parametrize("size", [1.0, 30.0, 40.0, 300.0, 1e3, 1e6])
@pytest.mark.parametrize("classes", [2, 3])
def test_offsets_of_any_size_end_at_the_minimum_or_are_refused(size, classes):
    rng = np.random.default_rng(int(size))
    for turn in range(12):
        A = rng.standard_normal((N, N))
        K, codes = A @ A.T, np.arange(N) % classes
        own = codes[:, None] == np.arange(classes)
        f0 = size * (own if turn % 3 == 0 else rng.standard_normal((N, classes)) if turn % 3 == 1 else 1.0 - own)
        f0 = f0 if classes > 2 else f0[:, 1] - f0[:, 0]
        ridge = 10.0 ** rng.uniform(-4, 2)
        try:
            model = KernelLogistic(ridge=ridge).fit(K, codes, offset=f0)
        except NotConverged:
            continue
        f = f0 + K @ model.dual_coef_
        p = expit(f) if classes == 2 else softmax(f, axis=1)
        left = (codes if classes == 2 else own) - p
        assert np.abs(ridge * model.dual_coef_ - left).max() <= 1e-3 * np.abs(left).max() + 1e-15
