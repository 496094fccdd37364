"""A job that ends early and is started again: the same numbers, nothing summed twice, another job's work refused."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal

import numpy as np
import pytest
import torch

from ntkengine import store
from ntkengine.errors import CheckFailed, InputError, Stopped
from ntkengine.gram import computing, run
from ntkengine.gram.checkpoint import Checkpoints
from ntkengine.gram.engine import compute_gram
from ntkengine.gram.layout import Layout
from tests.brute import tiny_inputs, tiny_model

LENGTHS = [11, 3, 5, 7, 2, 9, 5, 4, 8]


class Killed(BaseException):
    """What a killed process would not live to see."""


@pytest.fixture
def contracted(monkeypatch):
    """Return the names of contracted parameters; `contracted.stop` ends the job at one of them, `act` does more."""

    class Names(list):
        stop = None
        act = None

    names = Names()
    contract = run.contract

    def counted(factors, *args):
        if names.stop is not None and len(names) == names.stop:
            raise Killed
        names.append(factors.name)
        if names.act is not None:
            names.act()
        return contract(factors, *args)

    monkeypatch.setattr(run, "contract", counted)
    return names


def same(got, wanted):
    np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted))
    for name in ("cross", "outputs", "eval_outputs"):
        if getattr(wanted, name) is not None:
            np.testing.assert_array_equal(np.asarray(getattr(got, name)), np.asarray(getattr(wanted, name)))
    assert list(got.modules) == list(wanted.modules)
    for name in wanted.modules:
        np.testing.assert_array_equal(np.asarray(got.modules[name]), np.asarray(wanted.modules[name]))
    assert got.meta["module_trace"] == wanted.meta["module_trace"]
    assert [(r.parameter, r.strategy, r.flops) for r in got.plan.parameters] == [
        (r.parameter, r.strategy, r.flops) for r in wanted.plan.parameters
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"contraction": "trace"},
        {"contraction": "trace", "per_module": True},
        {"contraction": "full", "per_module": True},
        {"contraction": "per-output", "transform": "sign"},
        {"contraction": "trace", "transform": "asymmetric-sign"},
        {"contraction": "trace", "sketch": 16, "check": True, "stops": (62, 66)},
        {"contraction": "trace", "precision": "exact", "two": True},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_a_job_that_ended_early_goes_on_to_the_same_numbers(tmp_path, contracted, settings):
    model = tiny_model("bert")
    inputs, others = tiny_inputs(model, LENGTHS, 12), tiny_inputs(model, [4, 6, 3], 9, seed=1)
    call = {"params": "all", "check": False, **settings}
    stops = call.pop("stops", (5, 9))  # of a check before the sweep, 57 parameters too
    call["inputs2" if call.pop("two", False) else "eval_inputs"] = others
    wanted = compute_gram(model, inputs, **call)
    call |= {"out": tmp_path / "k.h5", "checkpoint_s": 0.0}
    every = [row.parameter for row in wanted.plan.parameters]
    for stop in stops:
        del contracted[:]
        contracted.stop = stop
        with pytest.raises(Killed):
            compute_gram(model, inputs, **call)
    del contracted[:]
    contracted.stop = 10**9
    got = compute_gram(model, inputs, **call)
    same(got, wanted)
    assert got.meta["resumed"] == 14
    if not call["check"]:  # which contracts by itself
        assert len(contracted) == len(every) - 14
    assert [p.name for p in tmp_path.iterdir()] == ["k.h5"]
    assert store.verify_gram(tmp_path / "k.h5") == ([] if call["check"] else ["the noise is not a finite number"])


@pytest.mark.parametrize("per_module", [False, True])
def test_tiles_that_are_finished_are_not_swept_again(tmp_path, contracted, monkeypatch, per_module):
    model = tiny_model("bert")
    inputs, others = tiny_inputs(model, LENGTHS, 12), tiny_inputs(model, [4, 6, 3], 9, seed=1)
    planned = computing.planned

    def in_tiles(size):
        def laid_out(*args):
            structure, plan, _, samples, sketches = planned(*args)
            return structure, plan, Layout(tile=size), samples, sketches

        monkeypatch.setattr(computing, "planned", laid_out)

    in_tiles(4)
    call = {"params": "all", "check": False, "per_module": per_module, "eval_inputs": others}
    wanted = compute_gram(model, inputs, **call)
    total = len(contracted)
    call |= {"out": tmp_path / "k.h5", "checkpoint_s": 0.0}
    monkeypatch.undo()
    in_tiles(4)
    counted, contract = [], run.contract

    def stopping(factors, *args):
        if len(counted) == 2 * total // 3:
            raise Killed
        counted.append(factors.name)
        return contract(factors, *args)

    with monkeypatch.context() as patch:
        patch.setattr(run, "contract", stopping)
        with pytest.raises(Killed):
            compute_gram(model, inputs, **call)
    in_tiles(3)
    with pytest.raises(InputError, match="laid out in tiles of 4 samples, this run in tiles of 3.*memory_gib"):
        compute_gram(model, inputs, **call)
    in_tiles(4)
    finished = sorted((tmp_path / ".k.h5.parts").glob("*.tile-*"))
    damaged = bytearray(finished[0].read_bytes())
    damaged[200] ^= 1
    finished[0].write_bytes(damaged)
    got = compute_gram(model, inputs, **call)
    same(got, wanted)
    of_one_tile = total // 9  # 3 × 3 tiles of train and 1 of eval, without those above the diagonal
    assert got.meta["resumed"] == 2 * total // 3 - of_one_tile


@pytest.mark.parametrize("per_module", [False, True])
def test_another_number_of_ranks_left_the_checkpoint(tmp_path, contracted, per_module):
    model = tiny_model("bert")
    inputs, others = tiny_inputs(model, LENGTHS, 12), tiny_inputs(model, [4, 6, 3], 9, seed=1)
    call = {"params": "all", "check": False, "eval_inputs": others, "per_module": per_module}
    wanted = compute_gram(model, inputs, **call)
    call |= {"out": tmp_path / "k.h5", "checkpoint_s": 0.0}
    del contracted[:]
    contracted.stop = 10
    with pytest.raises(Killed):
        compute_gram(model, inputs, **call)
    parts = tmp_path / ".k.h5.parts"
    (saved,) = store.load_newest(parts)
    names = dict.fromkeys(part["name"] for part in saved.state["parts"])
    for rank, (a, b) in enumerate([(0, 2), (2, 7), (7, 12)]):  # each rank its rows, rank 1 its columns right to 9
        span = (0, 9) if rank == 1 else (0, min(b, 9))
        pieces = []
        for name in names:
            values = np.full((1, b - a, span[1]), np.nan)
            pieces.append(store.Part(name, (a, b), span, values, symmetric=True))
        store.overlay([saved], pieces)
        traces = {name: value / 3 for name, value in saved.state["traces"].items()}
        # The middle one did all that was counted: flops and seconds are each rank's own.
        done = {n: row[:2] + [x * (rank == 1) for x in row[2:]] for n, row in saved.state["done"].items()}
        state = saved.state | {"rank": rank, "ranks": 3, "generation": 20, "traces": traces, "done": done}
        store.save_parts(parts / f"rank-{rank:04d}-of-0003.a", state, pieces)
    del contracted[:]
    contracted.stop = 12
    with pytest.raises(Killed):
        compute_gram(model, inputs, **call)
    assert sorted(p.name for p in parts.glob("rank-*")) == ["rank-0000-of-0001.a", "rank-0000-of-0001.b"]
    contracted.stop = 10**9
    got = compute_gram(model, inputs, **call)
    assert got.meta["resumed"] == 22
    np.testing.assert_allclose(list(got.meta.pop("module_trace").values()), list(wanted.meta["module_trace"].values()))
    got.meta["module_trace"] = wanted.meta["module_trace"]
    same(got, wanted)


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


def test_another_layout_goes_on_from_the_checkpoint(tmp_path, contracted, monkeypatch):
    """Blocks split into groups of parameters: what is summed is known by parameter."""
    model = tiny_model("llama")
    inputs = tiny_inputs(model, LENGTHS, 12)
    call = {"params": "all", "check": False}
    wanted = compute_gram(model, inputs, **call)
    call |= {"out": tmp_path / "k.h5", "checkpoint_s": 0.0}
    planned = computing.planned

    def split(*args):
        structure, plan, _, samples, sketches = planned(*args)
        return structure, plan, Layout(factor_bytes=1.0), samples, sketches

    for stop in (6, 7):
        del contracted[:]
        contracted.stop = stop
        with pytest.raises(Killed):
            compute_gram(model, inputs, **call)
        monkeypatch.setattr(computing, "planned", split)
        call["memory_gib"] = 8.0
    contracted.stop = 10**9
    got = compute_gram(model, inputs, **call)
    assert got.meta["resumed"] == 13
    np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), rtol=0, atol=1e-6 * np.abs(wanted.values).max())


def test_damaged_checkpoints(tmp_path, contracted, caplog):
    model = tiny_model("bert")
    inputs = tiny_inputs(model, LENGTHS, 12)
    call = {"params": "all", "check": False, "out": tmp_path / "k.h5", "checkpoint_s": 0.0}
    wanted = compute_gram(model, inputs, **{**call, "out": None})
    for left in (1, 0):
        del contracted[:]
        contracted.stop = 7
        with pytest.raises(Killed):
            compute_gram(model, inputs, **call)
        saved = store.load_newest(tmp_path / ".k.h5.parts")[0]
        for path in [saved.path] if left else (tmp_path / ".k.h5.parts").glob("rank-*"):
            whole = bytearray(path.read_bytes())
            whole[len(whole) // 2] ^= 16
            path.write_bytes(whole)
    contracted.stop = 10**9
    with caplog.at_level(logging.WARNING):
        got = compute_gram(model, inputs, **call)
    same(got, wanted)
    said = [r.message for r in caplog.records if "is damaged" in r.message]
    assert len(said) == 3
    assert "going on from checkpoint 6" in said[0]
    assert all("starting again" in text for text in said[1:])
    assert got.meta["resumed"] == 0


def test_every_flipped_bit_of_a_checkpoint_is_seen_or_harmless(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2, 5, 7))
    state = {"done": {"a.weight": ["explicit", 3, 4.0, 0.5]}, "generation": 3, "rank": 0, "ranks": 1}
    path = tmp_path / "rank-0000-of-0001.a"
    store.save_parts(path, state, [store.Part("m", (2, 7), (0, 7), values)], {"outputs": values[0]})
    whole = path.read_bytes()
    missed = 0
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            saved = store.load(path)
            (part,) = store.read_parts(saved)
        except OSError:
            continue
        missed += 1
        assert saved.state["done"] == state["done"]
        np.testing.assert_array_equal(part.values, values)
        np.testing.assert_array_equal(saved.array("outputs"), values[0])
    assert missed < len(whole) // 4  # dates and flags of the archive
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(OSError, match="is damaged"):
            store.load(path)


def test_a_checkpoint_of_another_job_is_refused(tmp_path, contracted):
    model = tiny_model("bert")
    inputs = tiny_inputs(model, LENGTHS, 12)
    call = {"params": "all", "check": False, "out": tmp_path / "k.h5", "checkpoint_s": 0.0}
    contracted.stop = 4
    with pytest.raises(Killed):
        compute_gram(model, inputs, **call)
    for change, message in [
        ({"precision": "exact"}, "unfinished run of another job: precision is 'high' there, 'exact' here"),
        ({"params": "*.layer.*"}, "unfinished run of another job: params is"),
        ({"seed": 1}, "unfinished run of another job: seed is 0 there, 1 here"),
        ({"resume": False}, "unfinished run; allow resume, or remove it"),
        ({"checkpoint_s": -1}, "checkpoint_s: expected a number of seconds"),
    ]:
        with pytest.raises(InputError, match=message):
            compute_gram(model, inputs, **{**call, **change})
    with pytest.raises(InputError, match="another job: data is"):
        compute_gram(model, {**inputs, "input_ids": inputs["input_ids"] + 1}, **call)
    with torch.no_grad():
        model.classifier.bias += 1e-6
    with pytest.raises(InputError, match="another job: model is"):
        compute_gram(model, inputs, **call)
    assert store.load_newest(tmp_path / ".k.h5.parts")[0].state["generation"] == 4


def test_what_a_check_has_refuted_is_not_kept(tmp_path, monkeypatch):
    model = tiny_model("bert")

    def refuted(*_args, **_kwargs):
        raise CheckFailed("no")

    monkeypatch.setattr(computing.Check, "entries", refuted)
    with pytest.raises(CheckFailed):
        compute_gram(model, tiny_inputs(model, LENGTHS, 12), params="all", out=tmp_path / "k.h5", checkpoint_s=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_clean_stop(tmp_path, contracted, number):
    model = tiny_model("bert")
    inputs = tiny_inputs(model, LENGTHS, 12)
    call = {"params": "all", "check": False, "out": tmp_path / "k.h5"}
    contracted.act = lambda: len(contracted) == 6 and os.kill(os.getpid(), number)
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"stopped by {number.name}: the same command goes on from here") as stopped:
        compute_gram(model, inputs, **call)
    assert stopped.value.signal == number
    assert signal.getsignal(number) is before
    contracted.act = None
    got = compute_gram(model, inputs, **call)
    assert got.meta["resumed"] == 6
    same(got, compute_gram(model, inputs, **{**call, "out": None}))


def test_two_processes_on_one_file(tmp_path):
    held = store.Folder(tmp_path / "k.h5")
    with held:
        model = tiny_model("bert")
        with pytest.raises(InputError, match=f"k.h5 is being computed by process {os.getpid()} on"):
            compute_gram(model, tiny_inputs(model, [3, 4], 5), params="all", check=False, out=tmp_path / "k.h5")
    assert list(tmp_path.iterdir()) == []


def test_two_processes_where_there_are_no_locks(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    progress = tmp_path / ".k.h5.parts" / "progress.json"
    with store.Folder(tmp_path / "k.h5") as held:
        held.tell({"done": 0.0})
        assert "no locks on this file system" in caplog.text
        told = json.loads(progress.read_text())
        for other in ({"pid": os.getppid()}, {"host": "elsewhere"}):
            progress.write_text(json.dumps(told | other))
            with pytest.raises(InputError, match="is being computed by process"):
                store.Folder(tmp_path / "k.h5").__enter__()
        for gone in ({"pid": 2**22 + 1}, {"host": "elsewhere", "at": told["at"] - 3600}):
            progress.write_text(json.dumps(told | gone))
            with store.Folder(tmp_path / "k.h5") as again:
                progress.write_text(json.dumps(told))
                (again.path / "rank-0000-of-0001.a").write_text("work")


def test_progress_of_an_unfinished_job(tmp_path, contracted, monkeypatch):
    model = tiny_model("bert")
    monkeypatch.setattr("ntkengine.gram.checkpoint._TELL_S", 0.0)
    seen = []
    contracted.act = lambda: seen.append(store.read_progress(tmp_path / "k.h5"))
    call = {"params": "all", "check": False, "out": tmp_path / "k.h5", "checkpoint_s": 0.0}
    assert store.read_progress(tmp_path / "k.h5") is None
    contracted.stop = 9
    with pytest.raises(Killed):
        compute_gram(model, tiny_inputs(model, LENGTHS, 12), **call)
    shares = [p["done"] / p["total"] for p in seen]
    assert shares == sorted(shares)
    assert 0 < shares[-1] < 1
    assert (seen[-1]["running"], seen[-1]["pid"], seen[0]["checkpoint"]) == (True, os.getpid(), None)
    assert seen[-1]["checkpoint"] > 0
    told = tmp_path / ".k.h5.parts" / "progress.json"
    told.write_text(json.dumps({**json.loads(told.read_text()), "pid": 2**22 + 1}))
    assert store.read_progress(tmp_path / "k.h5")["running"] is False


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
    def write(rank, slot, generation, ranks=2):
        state = {"generation": generation, "rank": rank, "ranks": ranks}
        store.save_parts(tmp_path / f"rank-{rank:04d}-of-{ranks:04d}.{slot}", state, [])

    for rank, slot, generation in ((0, "a", 3), (1, "a", 3), (0, "b", 4)):
        write(rank, slot, generation)
    assert [s.state["generation"] for s in store.load_newest(tmp_path)] == [3, 3]
    write(0, "b", 2, ranks=1)
    assert [s.state["rank"] for s in store.load_newest(tmp_path)] == [0, 1]
    write(1, "b", 4)
    assert [s.state["generation"] for s in store.load_newest(tmp_path)] == [4, 4]
