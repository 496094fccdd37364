"""The Gram of an embedding table's gradients against float64."""

from __future__ import annotations

import pytest
import torch
from ntk_kernels import naive
from ntk_kernels.lookup import lookup, sum_rows

from tests.kernels.common import DEVICE, close, randn


def tokens(S, T, vocabulary, seed=0):
    """Return ids, the first token in every sample."""
    ids = torch.randint(0, vocabulary, (S, T), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 1
    return ids.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("S", "T", "C", "D", "vocabulary"), [(1, 1, 1, 1, 2), (20, 9, 3, 33, 7), (70, 5, 1, 129, 40)])
def test_the_whole_gram(S, T, C, D, vocabulary, dtype):
    ids, d = tokens(S, T, vocabulary), randn(S, C, T, D, dtype=dtype)
    rows, sample, token = sum_rows(ids, d)
    assert bool((token.diff() >= 0).all())
    K = torch.ones(S, S, dtype=torch.float64, device=DEVICE)
    lookup(rows.view(len(rows), -1), sample, token, K)
    close(K - 1, naive.lookup(ids, d.double(), vocabulary), torch.float32)


def test_a_part_of_rows_and_columns_and_one_triangle():
    ids, d = tokens(50, 6, 9), randn(50, 1, 6, 20)
    truth = naive.lookup(ids, d, 9)
    rows, sample, token = sum_rows(ids, d)
    K = torch.zeros(30, 2 * 25, dtype=torch.float64, device=DEVICE)[:, ::2]
    lookup(rows[:, 0], sample, token, K, 20, 3)
    close(K, truth[20:, 3:28])
    K = torch.zeros(40, 22, dtype=torch.float64, device=DEVICE)
    lookup(rows[:, 0], sample, token, K, 10, 10, lower=True)
    close(K, truth[10:, 10:32].tril())


def test_columns_of_their_own():
    ids, d = tokens(20, 4, 5), randn(20, 2, 4, 12)
    rows, sample, token = sum_rows(ids, d)
    flat = rows.view(len(rows), -1)
    K = torch.zeros(20, 20, dtype=torch.float64, device=DEVICE)
    lookup(flat, sample, token, K, columns_LD=flat.sign())
    one_hot = torch.zeros(20, 5, 24, dtype=torch.float64, device=DEVICE)
    one_hot[sample, token] = flat.double()
    close(K, one_hot.flatten(1) @ one_hot.sign().flatten(1).T)


def test_the_same_bits_every_time():
    ids, d = tokens(40, 30, 6), randn(40, 1, 30, 16)
    found = []
    for _ in range(2):
        rows, sample, token = sum_rows(ids, d)
        K = torch.zeros(40, 40, dtype=torch.float64, device=DEVICE)
        lookup(rows[:, 0], sample, token, K)
        found.append(K)
    assert torch.equal(*found)


def test_refusals():
    K = torch.zeros(2, 2, dtype=torch.float64, device=DEVICE)
    index = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="expected float32"):
        lookup(randn(3, 4).half(), index, index, K)
    with pytest.raises(ValueError, match=r"expected \(2, 3\)"):
        sum_rows(tokens(2, 4, 5), randn(2, 1, 3, 4))
