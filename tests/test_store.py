"""The HDF5 file: complete or absent, the same numbers, refused when it is another job's, damage found."""

from __future__ import annotations

import os
import pickle

import h5py
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from ntkengine import store
from ntkengine.errors import InputError
from ntkengine.gram.engine import compute_gram
from ntkengine.store import open_gram, verify_gram, writing
from tests.brute import tiny_inputs, tiny_model

LENGTHS = [11, 3, 5, 7, 2, 9, 5]


@pytest.fixture
def job(tmp_path):
    model = tiny_model("bert")
    arguments = {
        "params": "all",
        "per_module": True,
        "out": tmp_path / "k.h5",
        "eval_inputs": tiny_inputs(model, [4, 6], 9, seed=1),
        "targets": np.eye(3)[[0, 1, 2, 0, 1, 2, 0]],
        "eval_targets": np.eye(3)[[0, 1]],
        "example_ids": [f"é.tsv:{i}" for i in range(7)],
        "extras": {"held_out_outputs": np.ones((7, 3))},
        "job": {"head": {"fit": False}},
    }
    return model, tiny_inputs(model, LENGTHS, 12), arguments


def test_file_holds_what_memory_holds(job):
    model, inputs, arguments = job
    stored = compute_gram(model, inputs, **arguments)
    held = compute_gram(model, inputs, **{**arguments, "out": None})
    assert stored.path == arguments["out"]
    np.testing.assert_array_equal(np.asarray(stored), held.values)
    np.testing.assert_array_equal(stored.cross[...], held.cross)
    assert list(stored.modules) == list(held.modules)
    for name, matrix in held.modules.items():
        np.testing.assert_array_equal(stored.modules[name][...], matrix)
    assert list(stored.cross_modules) == list(held.modules)
    np.testing.assert_allclose(sum(matrix[...] for matrix in stored.cross_modules.values()), held.cross, rtol=1e-9)
    for name, matrix in held.cross_modules.items():
        np.testing.assert_array_equal(stored.cross_modules[name][...], matrix)
    for name in ("outputs", "eval_outputs", "targets", "eval_targets"):
        np.testing.assert_array_equal(getattr(stored, name), getattr(held, name))
    np.testing.assert_array_equal(stored.extras["held_out_outputs"], np.ones((7, 3)))
    assert stored.noise == held.noise
    assert stored.meta["example_id"] == arguments["example_ids"]
    assert stored.meta["settings"] == {"head": {"fit": False}}
    assert [r.parameter for r in stored.plan.parameters] == [r.parameter for r in held.plan.parameters]
    assert verify_gram(arguments["out"]) == []
    with h5py.File(arguments["out"]) as plain:
        assert plain.attrs["schema"] == "ntkengine-gram/1"
        assert plain["gram"].shape == (7, 7)
    assert [p.name for p in arguments["out"].parent.iterdir()] == ["k.h5"]


def test_a_gram_of_a_file_pickles_as_its_path(job):
    model, inputs, arguments = job
    compute_gram(model, inputs, **arguments)
    stored = open_gram(arguments["out"])
    packed = pickle.dumps(stored)
    assert len(packed) < 20_000
    again = pickle.loads(packed)
    np.testing.assert_array_equal(again.values[2:4], stored.values[2:4])
    some = np.ix_([5, 1], [0, 2, 6])
    np.testing.assert_array_equal(again.values[some], stored.values[...][some])
    for name in stored.modules:
        np.testing.assert_array_equal(again.cross_modules[name][...], stored.cross_modules[name][...])
    arguments["out"].unlink()
    with pytest.raises(InputError, match="no such file"):
        pickle.loads(packed)


def test_same_job_is_not_computed_again_and_another_is_refused(job, monkeypatch):
    model, inputs, arguments = job
    first = np.asarray(compute_gram(model, inputs, **arguments))
    written = arguments["out"].read_bytes()
    again = compute_gram(model, inputs, **arguments)
    np.testing.assert_array_equal(np.asarray(again), first)
    for change, message in [
        ({"contraction": "full"}, "contraction is 'trace' there, 'full' here"),
        ({"precision": "exact"}, "precision is 'high' there, 'exact' here"),
        ({"params": "*.layer.*"}, "params is"),
        ({"readout": lambda out, _: out.logits}, "readout is"),
        ({"targets": np.zeros((7, 3))}, "targets_sha256 is"),
        ({"resume": False}, "exists"),
    ]:
        with pytest.raises(InputError, match=message):
            compute_gram(model, inputs, **{**arguments, **change})
    with pytest.raises(InputError, match="data is"):
        compute_gram(model, {**inputs, "input_ids": inputs["input_ids"] + 1}, **arguments)
    with torch.no_grad():
        model.classifier.bias += 1e-6
    with pytest.raises(InputError, match="model is"):
        compute_gram(model, inputs, **arguments)
    assert arguments["out"].read_bytes() == written


@pytest.mark.parametrize("place", ["create", "name"])
def test_a_failed_write_keeps_the_work_and_leaves_no_file(job, monkeypatch, place):
    model, inputs, arguments = job
    out = arguments["out"]

    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if place == "create":
            patch.setattr(writing, "tile_shape", fail)
        else:
            link = os.link
            patch.setattr(os, "link", lambda a, b: fail() if b == out else link(a, b))
        with pytest.raises(OSError, match="No space left on device.*nothing is lost"):
            compute_gram(model, inputs, **arguments)
    assert [p.name for p in out.parent.iterdir()] == [".k.h5.parts"]
    again = compute_gram(model, inputs, **arguments)
    assert again.meta["resumed"] == len(again.plan.parameters)
    np.testing.assert_array_equal(np.asarray(again), compute_gram(model, inputs, **{**arguments, "out": None}).values)
    assert [p.name for p in out.parent.iterdir()] == ["k.h5"]


def test_verify_finds_damage(job):
    model, inputs, arguments = job
    compute_gram(model, inputs, **arguments)
    with h5py.File(arguments["out"], "r+") as file:
        file["gram"][2, 3] += 1e-12 * file["gram"][2, 3] + 1e-300
        file["modules/1"][0, 0] += 1.0
        file["cross"][1, 0] += 1.0
        file["outputs"][0, 0] += 1.0
        file["extras/held_out_outputs"][0, 0] = np.nan
        file.attrs["noise"] = 0.0
        del file["tiles/modules/2"]  # as files had none once
        file["modules/2"][0, 0] = np.nan
    problems = verify_gram(arguments["out"])
    assert problems == [
        "tile 0 of /gram does not match its checksum",
        "tile 0 of /cross does not match its checksum",
        "tile 0 of /modules/1 does not match its checksum",
        "/modules/2 has values that are not finite",
        "/extras/held_out_outputs does not match its checksum",
        "/outputs does not match its checksum",
        "the root's attributes do not match their checksum",
    ]


def test_files_that_are_not_ours(tmp_path):
    (tmp_path / "text.h5").write_text("hello")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["gram"] = np.eye(3)
    with h5py.File(tmp_path / "half.h5", "w") as file:
        file.attrs["schema"] = store.SCHEMA
    for name, message in [
        ("none.h5", "no such file"),
        ("text.h5", "not an HDF5 file"),
        ("other.h5", "expected schema 'ntkengine-gram/1', got None"),
        ("half.h5", "incomplete or damaged"),
    ]:
        with pytest.raises(InputError, match=message):
            open_gram(tmp_path / name)


def test_an_adapter_of_another_scale_is_another_model(tmp_path):
    inputs = None
    for alpha in (4, 16):
        torch.manual_seed(0)
        model = get_peft_model(tiny_model("bert"), LoraConfig(r=2, lora_alpha=alpha, target_modules=["query"])).eval()
        inputs = inputs or tiny_inputs(model, LENGTHS, 12)
        if alpha == 4:
            compute_gram(model, inputs, out=tmp_path / "k.h5")
    with pytest.raises(InputError, match="holds another job: model is"):
        compute_gram(model, inputs, out=tmp_path / "k.h5")
