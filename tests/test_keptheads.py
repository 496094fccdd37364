"""A job's fitted head is kept with its Gram: on another processor, whose last digits differ, the job is the same."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

import ntkengine as ntk
from ntkengine import jobs, store
from ntkengine.errors import InputError
from ntkengine.inputs import heads
from ntkengine.inputs.keptheads import HEAD, as_kept, head_array
from ntkengine.jobfile import read_job
from tests.test_jobs import write_rows
from tests.tiny import save_tiny, tiny_sentences

JOB = """
out = "k.h5"
[model]
path = "model"
num_labels = 2
[model.peft]
peft_type = "LORA"
r = 2
target_modules = ["query"]
[data]
train = "train.tsv"
text = "sentence"
label = "label"
[head]
fit = true
[gram]
readout = "margin"
checkpoint_s = 0
"""


@pytest.fixture
def job(tmp_path):
    save_tiny(tmp_path / "model", kind="bert")
    write_rows(tmp_path / "train.tsv", 14, 0)
    (tmp_path / "job.toml").write_text(JOB)
    return read_job(tmp_path / "job.toml")


@pytest.fixture
def elsewhere(monkeypatch):
    """Fit heads that are off by a relative error, as another processor does."""
    exact = heads._ridge

    def set_to(error):
        def off(X, Y, ridge, bias):
            W, b = exact(X, Y, ridge, bias)
            return W * (1 + error * np.random.default_rng(3).standard_normal(W.shape)), b

        monkeypatch.setattr(heads, "_ridge", off)

    return set_to


class KilledError(Exception):
    pass


def kill_when(text, share=0.5):
    def progress(done, total, stage):
        if total > 1 and (text in stage if text else done > share * total):
            raise KilledError

    return progress


def test_a_finished_file_is_opened_elsewhere(job, elsewhere):
    gram = jobs.run_gram(job)
    kept = gram.extras[HEAD]
    assert (kept.shape, kept.dtype) == ((6, 2, 33), np.float32)
    written = job.out.read_bytes()
    elsewhere(1e-5)
    assert np.array_equal(np.asarray(jobs.run_gram(job)), np.asarray(gram))
    assert job.out.read_bytes() == written
    elsewhere(0.05)  # no rounding: a head of other data
    with pytest.raises(InputError, match=r"k.h5 holds another job: model is"):
        jobs.run_gram(job)
    assert job.out.read_bytes() == written


@pytest.mark.parametrize("stage", ["", "held-out"])
def test_an_unfinished_job_goes_on_elsewhere_as_if_it_had_stayed(job, elsewhere, stage, tmp_path):
    whole = jobs.run_gram(job)
    values, extras = np.asarray(whole), {k: np.asarray(v) for k, v in whole.extras.items()}
    job.out.unlink()
    with pytest.raises(KilledError):
        jobs.run_gram(job, kill_when(stage, 0.5 / 6))  # five more Grams come after the first
    assert store.parts_of(job.out).is_dir()
    elsewhere(1e-5)
    found = jobs.run_gram(job)
    assert found.meta["resumed"] > 0
    assert np.array_equal(found.extras[HEAD], extras[HEAD])
    assert np.array_equal(np.asarray(found), values)
    for name, array in extras.items():
        assert np.array_equal(np.asarray(found.extras[name]), array), name
    assert not store.parts_of(job.out).exists()


def test_damaged_tiles_are_filled_elsewhere(job, elsewhere):
    gram = jobs.run_gram(job)
    values = np.asarray(gram)
    del gram
    with h5py.File(job.out, "r+") as file:
        file["gram"][3, 3] += 1.0  # on the diagonal of tiles: no mirror image
    assert store.repair_gram(job.out) == (0, 1)
    elsewhere(1e-5)
    np.testing.assert_allclose(np.asarray(jobs.run_gram(job)), values, rtol=1e-12)
    assert ntk.verify_gram(job.out) == []


def test_a_head_is_taken_only_where_it_is_the_same_but_for_rounding(tmp_path):
    save_tiny(tmp_path / "model", kind="bert")
    model = ntk.load_model(tmp_path / "model", num_labels=2)
    inputs = ntk.tokenize(tiny_sentences(9, 0), model)
    fit = ntk.fit_head(model, inputs, np.eye(2)[np.arange(9) % 2] - 0.5, folds=3)
    own = head_array(fit)
    assert own.dtype == np.float32
    for k, (W, b) in enumerate(fit.weights):
        assert np.array_equal(own[k, :, :-1], W)
        assert np.array_equal(own[k, :, -1], b)
    assert as_kept(fit, own) is fit
    near = own * np.float32(1 + 1e-6)
    assert all(
        np.array_equal(np.hstack([W, b[:, None]]), k)
        for (W, b), k in zip(as_kept(fit, near).weights, near, strict=True)
    )
    far = own.copy()
    far[1] *= 1.02  # one fold's
    for other in (far, own[:-1], np.full_like(own, np.nan), own[..., :-1]):
        assert as_kept(fit, other) is fit


def test_extras_given_as_arrays_are_kept_from_the_first_checkpoint_on(tmp_path):
    save_tiny(tmp_path / "model", kind="bert")
    model = ntk.load_model(tmp_path / "model", num_labels=2)
    inputs = ntk.tokenize(tiny_sentences(9, 0), model)
    call = {"params": "all", "out": tmp_path / "k.h5", "checkpoint_s": 0, "check": False}
    extras = [{"outputs": np.arange(5)}, lambda: {"late": np.ones(2)}]  # a name that a tile's checkpoint has too
    with pytest.raises(KilledError):
        ntk.compute_gram(model, inputs, extras=extras, progress=kill_when(""), **call)
    assert np.array_equal(store.read_extra(tmp_path / "k.h5", "outputs"), np.arange(5))
    assert store.read_extra(tmp_path / "k.h5", "late") is None
    found = ntk.compute_gram(model, inputs, extras=extras, **call)
    assert {name: array.tolist() for name, array in found.extras.items()} == {
        "outputs": [0, 1, 2, 3, 4],
        "late": [1, 1],
    }
    with pytest.raises(InputError, match="extras: expected arrays by name, a function that makes them, or several"):
        ntk.compute_gram(model, inputs, extras="head")
