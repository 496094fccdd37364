"""The pieces of a checkpoint: any cut of them gives any other, and all ranks agree on what counts."""

from __future__ import annotations

import numpy as np
import pytest

from ntkengine import store
from ntkengine.errors import InputError
from ntkengine.gram.checkpoint import Checkpoints


def test_ranks_agree_on_what_is_a_checkpoint(tmp_path):
    """A rank whose disk is full keeps the others from counting theirs."""
    refused = []
    work = Checkpoints(tmp_path / "k.h5", {"a": 1}, ranks=2, agree=lambda failed: failed or bool(refused))
    with work:
        states = []
        for full in (False, False, True, True, False):
            refused[:] = [1] if full else []
            work.save({"tile": 0, "region": (0, 1, 0, 1)}, list, None)
            found = [store.load(p).state["generation"] for p in sorted(work.folder.path.glob("rank-0000*"))]
            states.append(sorted(found))
        assert states == [[1], [1, 2], [2, 3], [2, 3], [2, 3]]


@pytest.mark.parametrize("symmetric", [True, False])
def test_any_cut_of_the_pieces_gives_any_other(tmp_path, symmetric):
    """What other numbers of ranks need."""
    rng = np.random.default_rng(0)
    n, m = 11, 14  # three rows of eval
    K = rng.normal(size=(2, m, n))
    if symmetric:
        K[:, :n] += K[:, :n].transpose(0, 2, 1).copy()
    for _ in range(30):
        cut = sorted({0, n, m, *rng.integers(1, m, size=3).tolist()})
        parts = []
        for a, b in zip(cut, cut[1:], strict=False):
            if symmetric and rng.integers(2):  # a panel, its right end not computed
                values = K[:, a:b, : min(b, n)].copy()
                i, j = np.arange(a, b)[:, None], np.arange(min(b, n))[None, :]
                values[:, j > i] = np.nan
                parts.append(store.Part("", (a, b), (0, min(b, n)), values, lower=True, symmetric=True))
            else:
                middle = int(rng.integers(1, n))
                parts += [
                    store.Part("", (a, b), span, K[:, a:b, slice(*span)], symmetric=symmetric)
                    for span in ((0, middle), (middle, n))
                ]
        store.save_parts(tmp_path / "x", {}, parts)
        saved = store.load(tmp_path / "x")
        r, c = sorted(rng.choice(m + 1, 2, replace=False)), sorted(rng.choice(n + 1, 2, replace=False))
        out = np.full((2, r[1] - r[0], c[1] - c[0]), np.nan)
        if symmetric and r[0] < n:  # right of the diagonal of the last panel only its mirror image is there
            r = (r[0], min(r[1], n))
            out = out[:, : r[1] - r[0]]
        store.overlay([saved], [store.Part("", r, c, out)])
        np.testing.assert_array_equal(out, K[:, slice(*r), slice(*c)])
    store.save_parts(tmp_path / "some", {}, [part for part in parts if part.rows[1] < m])
    target = store.Part("", (10, m), (0, 3), np.zeros((2, m - 10, 3)))
    with pytest.raises(InputError, match=rf"has no entry \({max(cut[-2], 10)}, 0\)"):
        store.overlay([store.load(tmp_path / "some")], [target])


def test_a_checkpoint_counts_when_every_rank_has_it(tmp_path):
    def write(rank, slot, generation, ranks=2, attempt="x"):
        state = {"generation": generation, "rank": rank, "ranks": ranks, "attempt": attempt}
        store.save_parts(tmp_path / f"rank-{rank:04d}-of-{ranks:04d}.{slot}", state, [])

    for rank, slot, generation in ((0, "a", 3), (1, "a", 3), (0, "b", 4)):
        write(rank, slot, generation)
    assert [s.state["generation"] for s in store.load_newest(tmp_path)] == [3, 3]
    write(0, "b", 2, ranks=1)
    assert [s.state["rank"] for s in store.load_newest(tmp_path)] == [0, 1]
    write(1, "b", 4)
    assert [s.state["generation"] for s in store.load_newest(tmp_path)] == [4, 4]
    write(0, "a", 5, attempt="y")  # two runs that began from 4, each killed while it wrote 5
    write(1, "a", 5, attempt="z")
    assert [s.state["generation"] for s in store.load_newest(tmp_path)] == [4, 4]


def test_what_is_saved_after_a_failed_attempt_is_not_taken_for_it(tmp_path):
    """One rank's disk refuses a save, the other's the next: neither belongs to what the other wrote."""
    refused: list[int] = []
    ranks = {"ranks": 2, "agree": lambda failed: failed or bool(refused), "run": "r"}
    one = Checkpoints(tmp_path / "k.h5", {"a": 1}, **ranks)
    two = Checkpoints(tmp_path / "k.h5", {"a": 1}, rank=1, **ranks)
    with one, two:
        for number, saved in enumerate(((one, two), (one,), (two,))):
            refused[:] = [] if len(saved) == 2 else [1]
            for work in (one, two):
                if work in saved:
                    work.save({"tile": 0, "region": (0, 1, 0, 1), "number": number}, list, None)
                else:  # as `save` does when the disk refuses
                    work._attempts += 1
        found = store.load_newest(one.folder.path)
    assert [saved.state["number"] for saved in found] == [0, 0]
