"""Checkpoints that must not be gone on from: damaged, of another job, refuted, or in use."""

from __future__ import annotations

import errno
import json
import logging
import os

import numpy as np
import pytest
import torch

from ntkengine import store
from ntkengine.errors import CheckFailed, InputError
from ntkengine.gram import finer
from ntkengine.gram.engine import compute_gram
from tests.brute import tiny_inputs, tiny_model
from tests.interrupted import LENGTHS, Killed, same


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

    monkeypatch.setattr(finer.Check, "entries", refuted)
    with pytest.raises(CheckFailed):
        compute_gram(model, tiny_inputs(model, LENGTHS, 12), params="all", out=tmp_path / "k.h5", checkpoint_s=0)
    assert list(tmp_path.iterdir()) == []


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
