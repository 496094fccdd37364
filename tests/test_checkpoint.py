"""A job that ends early and is started again: the same numbers, nothing summed twice."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest

from ntkengine import store
from ntkengine.errors import InputError, Stopped
from ntkengine.gram import computing, run
from ntkengine.gram.engine import compute_gram
from ntkengine.gram.layout import Layout
from tests.brute import tiny_inputs, tiny_model
from tests.interrupted import LENGTHS, Killed, same


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
    assert store.verify_gram(tmp_path / "k.h5") == []


@pytest.mark.parametrize(("per_module", "into"), [(False, 0), (True, 0), (False, 5), (True, 5)])
def test_tiles_that_are_finished_are_not_swept_again(tmp_path, contracted, monkeypatch, per_module, into):
    """A damaged one is, and its checkpoints take the place of those of a tile that was begun."""
    model = tiny_model("bert")
    inputs, others = tiny_inputs(model, LENGTHS, 12), tiny_inputs(model, [4, 6, 3], 9, seed=1)
    planned = computing.planned

    def in_tiles(size):
        def laid_out(*args, **more):
            structure, plan, _, samples, sketches = planned(*args, **more)
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
        if len(counted) == 2 * total // 3 + into:
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


def test_another_layout_goes_on_from_the_checkpoint(tmp_path, contracted, monkeypatch):
    """Blocks split into groups of parameters: what is summed is known by parameter."""
    model = tiny_model("llama")
    inputs = tiny_inputs(model, LENGTHS, 12)
    call = {"params": "all", "check": False}
    wanted = compute_gram(model, inputs, **call)
    call |= {"out": tmp_path / "k.h5", "checkpoint_s": 0.0}
    planned = computing.planned

    def split(*args, **more):
        structure, plan, _, samples, sketches = planned(*args, **more)
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


@pytest.fixture
def usual_handlers():
    """The interpreter's own, also where whoever started the tests has it ignore SIGINT, as a shell does with `&`."""
    usual = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.usefixtures("usual_handlers")
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


def test_progress_of_an_unfinished_job(tmp_path, contracted, monkeypatch):
    model = tiny_model("bert")
    monkeypatch.setattr("ntkengine.gram.telling._TELL_S", 0.0)
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
