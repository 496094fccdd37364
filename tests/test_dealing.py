"""How a job is dealt out to ranks: shards, who meets whom, and the Gram pasted together again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ntkengine.cluster.ring import hops
from ntkengine.cluster.shards import deal
from ntkengine.gram.blocks import Block, paste, pick
from ntkengine.gram.frame import Frame
from ntkengine.gram.panels import meetings
from ntkengine.inputs.batches import Samples


def sampled(*groups):
    """Return samples of given lengths."""
    made = []
    for lengths in groups:
        mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
        for i, n in enumerate(lengths):
            mask[i, :n] = 1
        made.append({"input_ids": mask.clone(), "attention_mask": mask})
    return Samples(made)


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8])
def test_shards_have_equal_tokens_and_equal_samples(ranks):
    lengths = np.random.default_rng(0).lognormal(3, 0.7, 400).astype(int).clip(2, 200).tolist()
    samples = sampled(lengths, lengths[:3])
    shards = deal(samples, ranks)
    axis = np.concatenate([s.positions(g) for s in shards for g in (0, 1)])
    assert np.array_equal(np.sort(axis), np.arange(403))
    tokens = [s.tokens for s in shards]
    assert sum(tokens) == sum(lengths) + sum(lengths[:3])
    assert max(tokens) <= 1.1 * sum(tokens) / ranks
    sizes = [len(s.positions(0)) for s in shards]
    assert max(sizes) - min(sizes) <= 8
    assert shards == deal(samples, ranks)


@pytest.mark.parametrize("transform", ["sgd", "asymmetric-sign"])
@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("window", [1, 2, 9])
@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 6])
def test_every_wanted_pair_meets_once(ranks, window, two, transform):
    samples = sampled([*range(2, 40)], [3, 4, 5])
    first, second = samples.span(0), samples.span(1)
    frame = Frame(first if two else (0, samples.total), second if two else first, 1, "trace", transform)
    shards = deal(samples, ranks)
    met = np.zeros((samples.total, samples.total), dtype=int)
    work = []
    for rank in range(ranks):
        pairs = 0
        for meeting in meetings(shards, rank, samples, frame, window):
            axis = meeting.positions
            for f in meeting.frames:
                met[np.ix_(axis[slice(*f.rows)], axis[slice(*f.columns)])] += 1
                pairs += f.pairs
        work.append(pairs)
    inside = met[slice(*frame.rows), slice(*frame.columns)]
    assert met.sum() == inside.sum()
    if frame.symmetric:
        square, rest = inside[: len(inside[0])], inside[len(inside[0]) :]
        own = np.zeros_like(square)
        for shard in shards:
            own[np.ix_(shard.positions(0), shard.positions(0))] = 1
        assert np.array_equal(square + square.T, 1 + own)
        assert (rest == 1).all()
    else:
        assert (inside == 1).all()
    if not two and ranks < 6:  # 38 samples: stripes of one or two
        assert max(work) <= 1.35 * sum(work) / ranks


def test_hops_are_half_a_ring():
    assert [(h.source, h.half) for h in hops(0, 4)] == [(1, False), (2, True)]
    assert [(h.source, h.half) for h in hops(2, 4)] == [(3, False), (0, False)]
    assert [h.source for h in hops(4, 5)] == [0, 1]


def test_blocks_make_the_gram():
    rng = np.random.default_rng(0)
    K = rng.normal(size=(1, 7, 5))
    K[:, :5] += K[:, :5].transpose(0, 2, 1)
    frame = Frame((0, 7), (0, 5), 1, "trace")
    blocks = [
        Block("", (0, 2), (0, 2), K[:, :2, :2]),
        Block("", (0, 2), (2, 5), K[:, :2, 2:]),
        Block("", (2, 7), (2, 5), K[:, 2:, 2:]),
        Block("", (5, 7), (0, 2), K[:, 5:, :2]),
    ]
    # A block over the square's end is not mirrored, so the square is cut there.
    blocks[2:3] = [Block("", (2, 5), (2, 5), K[:, 2:5, 2:]), Block("", (5, 7), (2, 5), K[:, 5:, 2:])]
    whole = np.full_like(K, np.nan)
    paste(blocks, frame, whole)
    assert np.array_equal(whole, K)
    rows, columns = np.array([6, 0, 3]), np.array([4, 1])
    assert np.array_equal(pick(blocks, frame, rows, columns), K[:, rows[:, None], columns[None, :]])
