"""Numbers as text: what is printed holds what was known, on the side it was known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ntkengine.digits import above, below, between, measured, nearest, with_error
from ntkengine.report.findings import spectrum_table
from ntkengine.spectrum import Estimate, condition_from_eigenvalues, condition_number, eigsh


def draws(count=3000):
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield float(rng.choice([-1, 1]) * 10.0 ** rng.uniform(-9, 9)), float(10.0 ** rng.uniform(-12, 9)), rng


def test_an_error_printed_holds_for_the_number_printed():
    for value, error, rng in draws():
        most = int(rng.integers(2, 9))
        shown, off = (float(text) for text in with_error(value, error, most))
        assert off >= (error + abs(shown - value)) * (1 - 1e-9)
        # Nor is it much larger than the error, or than what so many digits leave out.
        unit = 10.0 ** (math.floor(math.log10(abs(value))) - most + 1)
        assert off <= 1.16 * (error + 0.5 * unit)
        assert abs(shown - value) <= max(0.06 * error, 0.51 * unit)


def test_bounds_are_rounded_outwards():
    for value, _, rng in draws():
        digits = int(rng.integers(1, 7))
        low, high = float(below(value, digits)), float(above(value, digits))
        assert low <= value <= high
        assert high - low <= 1.0001 * 10.0 ** (math.floor(math.log10(abs(value))) - digits + 1)
        assert low <= float(nearest(value, digits)) <= high
        assert float(above(high, digits)) == high  # a round number stays as it is
        width = abs(value) * 10.0 ** rng.uniform(-9, 1, 2)
        text = between(value, value - width[0], value + width[1])
        middle, ends = text[:-1].split(" (")
        least, most = map(float, ends.split(" to "))
        assert least <= value - width[0]
        assert most >= value + width[1]
        assert least <= float(middle) <= most


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (22800.2242, 2e-11, "22800.224 ± 0.00021"),
        (27.5142, 0.149, "27.51 ± 0.16"),
        (3.0, 0.12, "3.00 ± 0.12"),
        (12345.6, 340.0, "12350 ± 350"),
        (3.9, 940.0, "3.9 ± 940"),
        (9.0, 0.0, "9 ± 0"),
        (0.0, 1e-3, "0 ± 0.001"),
        (2.5, math.inf, "2.5 ± inf"),
        (2.5, math.nan, "2.5 ± unknown"),
        (math.inf, 1.0, "inf ± 1"),
        (np.float32(0.5), np.float64(1e-5), "0.500000 ± 1e-05"),
    ],
)
def test_what_is_printed(value, error, shown):
    assert measured(value, error) == shown


def test_an_unbounded_interval():
    assert between(1.0, 0.0, math.inf) == "1 (0 to inf)"
    assert above(math.nan) == "nan"


def test_condition_numbers_claim_no_more_than_is_proved():
    for seed in range(500):
        rng = np.random.default_rng(seed)
        values = np.array([rng.uniform(1, 10), rng.uniform(100, 1000)])
        found = condition_from_eigenvalues(values, noise=1e-6)
        low, high = map(float, str(found).split(" (")[1][:-1].split(" to "))
        assert low <= found.lower <= values[1] / values[0] <= found.upper <= high
        hidden = condition_from_eigenvalues(np.array([1e-9, values[1]]), noise=1e-8 * rng.uniform(1, 9))
        told = str(hidden).split()
        assert float(told[1]) <= hidden.lower
        assert float(told[-1][:-1]) >= hidden.noise


def test_estimates_and_spectra_are_right_to_what_is_printed():
    A = np.random.default_rng(0).standard_normal((8, 20))
    K = 617.0 * A @ A.T
    exact = np.linalg.eigvalsh(K)[::-1]
    rows = spectrum_table(eigsh(K, k=8), condition_number(K)).rows
    for value, (_, shown, bound, _) in zip(exact, rows, strict=True):
        assert abs(float(shown) - value) <= float(bound) < 1e-6 * value
    value, error = map(float, str(Estimate(257.17099793, 7.6e-13, exact=True)).split(" ± "))
    assert abs(value - 257.17099793) <= error < 1e-5
