"""What the type that entries are stored in, and triangles that differ, say of their error."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import torch

from ntkengine.errors import InputError
from ntkengine.spectrum import (
    DenseOperator,
    DeviceOperator,
    FactorOperator,
    PanelOperator,
    condition_number,
    effective_dimension,
    eigsh,
    log_determinant,
    noise_of,
    spectral_density,
)

N = 120


def triangles(seed):
    """Return K and a float32 matrix each of whose entries is off on its own, by what still passes for symmetric."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((N, N + 20))
    K = (A @ A.T / N).astype(np.float32).astype(float)
    K = 0.5 * (K + K.T)
    return K, (K + rng.standard_normal((N, N)) * 1.5e-6 * np.abs(K).max()).astype(np.float32)


class Told:
    def __init__(self, values, noise):
        self.values, self.noise = values, noise


@pytest.mark.parametrize("seed", range(5))
def test_eigenvalues_lie_within_what_differing_triangles_show(seed):
    K, stored = triangles(seed)
    shown = 0.5 * np.linalg.norm(stored.astype(float) - stored.T)
    mean = 0.5 * (stored.astype(float) + stored.T)
    assert np.linalg.norm(mean - K, 2) <= shown
    for given in (stored, Told(stored, 1e-9), DenseOperator(stored), DeviceOperator(torch.from_numpy(stored))):
        assert noise_of(given) == pytest.approx(shown, rel=1e-6)
    assert DeviceOperator(Told(stored, 0.0)).noise == pytest.approx(shown, rel=1e-6)
    assert DeviceOperator(torch.from_numpy(stored), noise=0.0).noise == pytest.approx(shown, rel=1e-6)
    true = np.linalg.eigvalsh(K)
    for given in (stored, Told(stored, 0.0), DeviceOperator(torch.from_numpy(stored))):
        found = eigsh(given, k=3)
        assert (np.abs(found.values - true[-3:]) <= found.bounds).all()
    found = eigsh(stored, k=3, which="SA")
    assert (np.abs(found.values - true[:3]) <= found.bounds).all()
    condition = condition_number(stored)
    assert condition.lower <= true[-1] / true[0] <= condition.upper
    for ridge in (1e-3, 1.0):
        for method in ("exact", "lanczos"):
            found = effective_dimension(Told(stored, 0.0), ridge, method=method)
            assert abs(found - (true / (true + ridge)).sum()) <= found.error
    assert spectral_density(Told(stored, 0.0)).grid[0] > 0


@pytest.mark.parametrize("seed", range(5))
def test_a_streamed_triangle_is_as_wrong_as_it_shows(seed, tmp_path):
    K, stored = triangles(seed)
    stored = (K + 0.1 * (stored - K)).astype(np.float32)
    lower = np.tril(stored.astype(float))
    lower += np.tril(lower, -1).T
    with h5py.File(tmp_path / "k.h5", "w") as file:
        streamed = PanelOperator(file.create_dataset("k", data=stored, chunks=(16, N)), noise=0.0)
        assert np.linalg.norm(lower - K, 2) <= streamed.noise <= 5 * np.linalg.norm(stored.astype(float) - stored.T)
        found = eigsh(streamed, k=3)
        assert (np.abs(found.values - np.linalg.eigvalsh(K)[-3:]) <= found.bounds).all()


def test_a_symmetric_matrix_keeps_its_noise(tmp_path):
    K, _ = triangles(0)
    assert noise_of(K) == pytest.approx(0.5 * np.finfo(float).eps * np.linalg.norm(K))
    assert noise_of(Told(K, 1e-9)) == 1e-9
    with h5py.File(tmp_path / "k.h5", "w") as file:
        assert PanelOperator(file.create_dataset("k", data=K), noise=1e-9).noise == 1e-9
        assert PanelOperator(file["k"], noise=0.0).noise == 0.0
    stack = np.stack([K, K])
    assert noise_of(Told(stack, 1e-9)) == 1e-9
    stack[1, 0, 1] += 1e-6
    assert noise_of(Told(stack, 1e-9)) == pytest.approx(1e-6 / np.sqrt(2.0))
    with pytest.raises(InputError, match="square"):
        noise_of(np.ones((2, 3)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_features_of_few_digits_tell_their_rounding(dtype, scale):
    Phi = np.random.default_rng(0).standard_normal((200, 30)) * scale
    stored = Phi.astype(dtype)
    operator = FactorOperator(stored)
    K, rounded = Phi @ Phi.T, stored.astype(float) @ stored.astype(float).T
    assert np.linalg.norm(rounded - K, 2) <= operator.noise <= 200 * np.linalg.norm(rounded - K, 2)
    found = eigsh(operator, k=3)
    assert (np.abs(found.values - np.linalg.eigvalsh(K)[-3:]) <= found.bounds).all()
    assert FactorOperator(stored, noise=0.0).noise == 0.0
    assert FactorOperator(Phi).noise == 0.0
    assert FactorOperator(np.ones((3, 2), dtype=np.int64)).noise == 0.0


@pytest.mark.parametrize("method", ["exact", "lanczos"])
@pytest.mark.parametrize("rows", [1, 3, 200])
def test_sums_over_the_spectrum_of_nothing(method, rows):
    for K in (np.zeros((rows, rows)), Told(np.zeros((rows, rows)), 1e-3)):
        found = effective_dimension(K, 1.0, method=method)
        assert abs(found) <= found.error + 1e-300
        found = log_determinant(K, 2.0, method=method)
        assert abs(found - rows * np.log(2.0)) <= found.error
    assert effective_dimension(np.zeros((rows, rows)), 1.0, method=method) == 0.0
