"""Ritz values against LAPACK on spectra that are hard for Lanczos: every true eigenvalue inside its bound."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import scipy.linalg
from scipy.sparse.linalg import aslinearoperator

import ntkengine as ntk
from ntkengine.errors import InputError, NotConverged
from ntkengine.spectrum import eigsh
from ntkengine.spectrum.certify import certified_bounds, pair_bounds
from tests.brute import tiny_inputs, tiny_model
from tests.test_spectrum import with_spectrum

DRAWS = 40  # of each of the five kinds: 200


def outlier(rng, n):
    return np.r_[10.0 ** rng.uniform(2, 6), np.arange(1.0, n) ** -rng.uniform(0.5, 3.0)]


def flat(rng, n):
    return 1.0 + rng.uniform(0, 1e-3, n)


def rank_deficient(rng, n):
    return np.r_[np.sort(rng.uniform(0.1, 10.0, n // 4)), np.zeros(n - n // 4)]


def repeated(rng, n):
    return np.repeat(rng.uniform(0.1, 10.0, -(-n // 10)), 10)[:n]


@functools.cache
def tangent_gram(seed):
    model = tiny_model("bert", seed=seed)
    lengths = np.random.default_rng(seed).integers(2, 12, 40).tolist()
    gram = ntk.compute_gram(
        model, tiny_inputs(model, lengths, 12, seed), params="all", contraction="full", precision="exact", check=False
    )
    return np.asarray(gram.values)


def draw(kind, seed):
    rng = np.random.default_rng(seed)
    if kind == "tangent":
        whole = tangent_gram(seed % 4)
        rows = np.sort(rng.choice(len(whole), rng.integers(60, len(whole)), replace=False))
        return whole[np.ix_(rows, rows)], rng
    values = {"outlier": outlier, "flat": flat, "rank-deficient": rank_deficient, "repeated": repeated}[kind]
    return with_spectrum(values(rng, int(rng.integers(60, 240))), seed), rng


@pytest.mark.parametrize("kind", ["outlier", "flat", "rank-deficient", "repeated", "tangent"])
def test_every_true_eigenvalue_is_inside_its_bound(kind):
    for seed in range(DRAWS):
        matrix, rng = draw(kind, seed)
        exact = scipy.linalg.eigvalsh(matrix)
        top, k = float(np.abs(exact).max()), int(rng.integers(1, 16))
        which = "LA" if kind == "flat" and seed % 2 else str(rng.choice(["LA", "SA", "BE"]))
        method = "lanczos" if which == "LA" else "shift-invert"
        block = int(rng.choice([1, 4]))
        ritz = eigsh(matrix, k, which, method=method, seed=seed, block=block, certify=bool(seed % 2))
        low = {"LA": 0, "SA": k, "BE": k // 2}[which]
        wanted = np.r_[exact[:low], exact[len(exact) - (k - low) :]]
        error = np.abs(ritz.values - wanted)
        assert (error <= ritz.bounds).all(), (seed, which, k, block)
        assert error.max() <= 1e-9 * top, (seed, which, k, block)
        assert ritz.bounds.max() <= 1e-7 * top
        assert ritz.certified == bool(seed % 2)
        np.testing.assert_allclose(ritz.vectors.T @ ritz.vectors, np.eye(k), atol=1e-12)


def test_a_missed_eigenvalue_is_noticed():
    values = np.r_[np.linspace(0.0, 1.0, 90), 4.0, 5.0, 5.0, 6.0]
    matrix = with_spectrum(values)
    exact, vectors = np.linalg.eigh(matrix)
    residuals = np.zeros(3)
    for picked, low, complete in (
        ([-3, -2, -1], False, True),
        ([-4, -2, -1], False, False),
        ([-4, -3, -1], False, False),
        ([0, 1, 2], True, True),
        ([0, 2, 3], True, False),
    ):
        radii = certified_bounds(matrix, exact[picked], vectors[:, picked], residuals, 10.0, low=low)
        assert (radii is not None) == complete
        if complete:
            assert radii.max() < 1e-10


def test_certified_bounds_hold_for_rough_pairs():
    rng = np.random.default_rng(3)
    for _ in range(50):
        n, k = 40, 5
        matrix = with_spectrum(np.r_[np.sort(rng.uniform(0, 1, n - k)), 2.0 + rng.uniform(0, 3, k)], 7)
        exact, vectors = np.linalg.eigh(matrix)
        basis = np.linalg.qr(vectors[:, -k:] + 10.0 ** rng.uniform(-6, -2) * rng.standard_normal((n, k)))[0]
        values, S = np.linalg.eigh(basis.T @ matrix @ basis)
        basis = basis @ S
        residuals = np.linalg.norm(matrix @ basis - basis * values, axis=0)
        radii = certified_bounds(matrix, values, basis, residuals, 10.0, low=False)
        assert radii is not None
        assert (exact[-k:] - values <= radii).all()
        assert (values - exact[-k:] <= 1e-12).all()
        assert (np.abs(exact[-k:] - values) <= pair_bounds(values, residuals) + 1e-12).all()


def test_touching_intervals_share_their_radius():
    values, residuals = np.array([1.0, 1.05, 2.0, 2.11, 2.2]), np.array([0.03, 0.03, 0.01, 0.06, 0.02])
    joined = np.hypot(0.03, 0.03)
    np.testing.assert_allclose(pair_bounds(values, residuals), [joined, joined, 0.01, 0.06, 0.02])
    chain = pair_bounds(values, np.array([0.03, 0.03, 0.01, 0.08, 0.02]))
    np.testing.assert_allclose(chain[3:], np.hypot(0.08, 0.02))
    assert chain[2] == 0.01
    chain = pair_bounds(values, np.array([0.03, 0.03, 0.033, 0.075, 0.02]))  # the joined radius reaches a third
    np.testing.assert_allclose(chain[2:], np.sqrt(0.033**2 + 0.075**2 + 0.02**2))


def test_blocks_take_fewer_passes():
    matrix = with_spectrum(repeated(np.random.default_rng(0), 240))
    passes = {}
    for block in (1, 8):
        operator = ntk.spectrum.DenseOperator(matrix)
        assert eigsh(operator, 20, method="lanczos", block=block).method == "lanczos"
        passes[block] = operator.passes
    assert passes[8] < 0.5 * passes[1]


@pytest.mark.parametrize("rows", [5, 17, 45])
@pytest.mark.parametrize("method", ["lanczos", "shift-invert", "dense"])
def test_nearly_all_pairs_of_tight_clusters(rows, method):
    for values in (np.zeros(rows), np.ones(rows), np.r_[np.ones(rows // 2), np.full(rows - rows // 2, 2.0)]):
        for k in {1, rows // 2, rows - 2, rows - 1, rows}:
            for seed in range(4):
                matrix = with_spectrum(values, seed)
                ritz = eigsh(matrix, k, "BE" if method != "lanczos" else "LA", method=method, block=16, certify=True)
                low = 0 if method == "lanczos" else k // 2
                exact = np.r_[values[:low], values[rows - (k - low) :]]
                assert (np.abs(ritz.values - exact) <= ritz.bounds).all()
                assert ritz.certified


def test_pairs_that_lapack_loses_are_found():
    # Its bisection returns fewer pairs than asked for here, without a word.
    for seed in range(60):
        ritz = eigsh(with_spectrum(np.ones(60), seed), 8)
        assert ritz.vectors.shape == (60, 8)
        np.testing.assert_allclose(ritz.values, 1.0, rtol=1e-13)


def test_the_low_end_of_an_operator_is_found_or_refused():
    clustered = aslinearoperator(with_spectrum(np.geomspace(1e-9, 1.0, 400)))
    with pytest.raises(NotConverged) as caught:
        eigsh(clustered, 4, "SA", max_products=300)
    partial = caught.value.partial
    assert partial.values.shape == (4,)
    assert not partial.certified
    # A gap at the low end is within Lanczos' reach.
    apart = aslinearoperator(with_spectrum(np.r_[-3.0, -2.0, np.linspace(0, 1, 300)]))
    np.testing.assert_allclose(eigsh(apart, 2, "SA").values, [-3.0, -2.0], atol=1e-10)
    for bad in ({"method": "shift-invert", "which": "SA"}, {"certify": True}):
        with pytest.raises(InputError, match="needs a matrix"):
            eigsh(clustered, 2, **bad)
    with pytest.raises(InputError, match="low end"):
        eigsh(np.eye(4), 2, method="shift-invert")


def test_the_low_end_of_an_indefinite_matrix():
    matrix = with_spectrum(np.r_[-7.0, -5.0, -4.0, -2.0, -1.0, np.geomspace(1e-6, 1.0, 160)])
    ritz = eigsh(matrix, 5, "SA", method="shift-invert", certify=True)
    np.testing.assert_allclose(ritz.values, [-7.0, -5.0, -4.0, -2.0, -1.0], atol=1e-12)
    assert (ritz.method, ritz.certified) == ("shift-invert", True)
    # Below the cluster that is wanted lies an eigenvalue that keeps the inverse away from it.
    hidden = with_spectrum(np.r_[-7.0, -1e-3, np.geomspace(1e-6, 1.0, 160)])
    with pytest.raises(NotConverged, match="largest residual"):
        eigsh(hidden, 5, "SA", method="shift-invert")
    np.testing.assert_allclose(eigsh(hidden, 5, "SA").values, np.linalg.eigvalsh(hidden)[:5], atol=1e-13)
