"""Damaged tiles: from their mirror image to the last bit, else computed again from their own samples alone."""

from __future__ import annotations

import logging

import h5py
import numpy as np
import pytest

from ntkengine import store
from ntkengine.errors import CheckFailed, InputError
from ntkengine.gram import engine
from ntkengine.gram.engine import compute_gram
from tests.brute import tiny_inputs, tiny_model

LENGTHS = [11, 3, 5, 7, 2, 9, 5, 4, 8, 6, 6, 3]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(store.tiles, "TILE", 4)


def computed(tmp_path, **settings):
    model = tiny_model("bert")
    inputs, others = tiny_inputs(model, LENGTHS, 12), tiny_inputs(model, [4, 6, 3, 5, 2], 9, seed=1)
    call = {"params": "all", "out": tmp_path / "k.h5", **settings}
    call["inputs2" if call.pop("two", False) else "eval_inputs"] = others
    held = compute_gram(model, inputs, **{**call, "out": None})
    compute_gram(model, inputs, **call)
    return held, lambda **more: compute_gram(model, inputs, **{**call, **more})


def spoil(path, *places):
    with h5py.File(path, "r+") as file:
        for name, *at in places:
            file[name][tuple(at)] += 1e-3


def near(got, held):
    for name in ("values", "cross"):
        wanted = getattr(held, name)
        if wanted is not None:
            error = np.linalg.norm(getattr(got, name)[...] - wanted)
            assert error <= 3e-6 * np.linalg.norm(wanted), name
    for parts, wanted in ((got.modules, held.modules), (got.cross_modules, held.cross_modules)):
        assert set(parts) == set(wanted)
        for name, matrix in wanted.items():
            assert np.linalg.norm(parts[name][...] - matrix) <= 3e-6 * np.linalg.norm(held.values)


def test_a_mirror_image_repairs_to_the_last_bit(tmp_path):
    held, again = computed(tmp_path, per_module=True)
    path = tmp_path / "k.h5"
    spoil(path, ("gram", 1, 9), ("modules/2", 10, 0))
    assert len(store.verify_gram(path)) == 2
    assert store.repair_gram(path) == (2, 0)
    assert store.repair_gram(path) == (0, 0)
    assert store.verify_gram(path) == []
    got = again()
    np.testing.assert_array_equal(got.values[...], held.values)
    for name in held.modules:
        np.testing.assert_array_equal(got.modules[name][...], held.modules[name])
    assert [p.name for p in tmp_path.iterdir()] == ["k.h5"]


@pytest.mark.parametrize(
    "settings",
    [
        {"per_module": True},
        {"contraction": "full"},
        {"contraction": "per-output"},
        {"two": True},
        {"transform": "asymmetric-sign"},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_open_tiles_are_computed_from_their_samples(tmp_path, monkeypatch, settings):
    held, again = computed(tmp_path, **settings)
    path = tmp_path / "k.h5"
    first = (0,) * (held.values.ndim - 2)
    places = [("gram", *first, 0, 1)]
    if held.cross is not None:
        places.append(("cross", *first, 4, 2))
    if not settings.get("two") and held.contraction != "full":
        places += [("gram", *first, 1, 9), ("gram", *first, 9, 1)]  # both of a pair
    if held.modules:
        places += [("modules/1", 1, 2), ("crosses/1", 4, 2)]
    spoil(path, *places)
    assert store.repair_gram(path) == (0, len(places))
    assert not path.exists()
    with pytest.raises(InputError, match="not complete .damaged tiles are open"):
        store.open_gram(path)
    with pytest.raises(InputError, match="not done"):
        store.open_gram(tmp_path / ".k.h5.parts" / "damaged.h5")
    swept = []
    prepare = engine.Task.prepare

    def noted(*args, **kwargs):
        task = prepare(*args, **kwargs)
        swept.append(task.samples.sizes)
        return task

    monkeypatch.setattr(engine.Task, "prepare", noted)
    got = again()
    assert swept[1][0] < len(LENGTHS)
    near(got, held)
    assert store.verify_gram(path) == []
    if not settings.get("two") and settings.get("transform") is None:
        np.testing.assert_array_equal(got.values[...], np.swapaxes(got.values[...], -1, -2))
    untouched = got.values[(*first, slice(4, 8), slice(0, 4))]
    np.testing.assert_array_equal(untouched, held.values[(*first, slice(4, 8), slice(0, 4))])
    assert [p.name for p in tmp_path.iterdir()] == ["k.h5"]


def test_tiles_of_modules_are_told_by_name(tmp_path):
    """A job over other ranks, or gone on with, may have met the modules in another order."""
    held, again = computed(tmp_path, per_module=True)
    path = tmp_path / "k.h5"
    with h5py.File(path, "r+") as file:
        for group in ("modules", "tiles/modules"):
            for old, new in (("0", "x"), ("1", "0"), ("x", "1")):
                file.move(f"{group}/{old}", f"{group}/{new}")
    spoil(path, ("modules/0", 1, 2), ("modules/0", 2, 1), ("modules/1", 1, 2), ("modules/1", 2, 1))
    assert store.repair_gram(path)[1] > 0
    got = again()
    assert store.verify_gram(path) == []
    near(got, held)


def test_a_repair_of_another_job_or_of_wrong_numbers_is_refused(tmp_path, monkeypatch, caplog):
    held, again = computed(tmp_path)
    path = tmp_path / "k.h5"
    spoil(path, ("gram", 0, 1), ("gram", 11, 11))
    assert store.repair_gram(path) == (0, 2)
    with pytest.raises(InputError, match=r"damaged.h5 is of another job: seed is 0 there, 1 here; remove it"):
        again(seed=1)
    with pytest.raises(InputError, match="allow resume"):
        again(resume=False)
    with monkeypatch.context() as patch:
        real = engine.compute_gram

        def wrong(*args, **kwargs):
            gram = real(*args, **kwargs)
            gram.values = gram.values * 1.5
            return gram

        patch.setattr(engine, "compute_gram", wrong)
        with pytest.raises(CheckFailed, match="differ from sound ones by a relative"):
            again()
    assert not path.exists()
    with caplog.at_level(logging.WARNING):
        near(again(), held)
    assert "2 damaged tiles; computing 8 samples again" in caplog.text


def test_what_is_no_tile_cannot_be_repaired(tmp_path):
    _, again = computed(tmp_path)
    path = tmp_path / "k.h5"
    spoil(path, ("outputs", 0, 0), ("gram", 0, 1))
    whole = path.read_bytes()
    with pytest.raises(InputError, match="/outputs does not match its checksum; only tiles can be repaired"):
        store.repair_gram(path)
    assert path.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["k.h5"]
