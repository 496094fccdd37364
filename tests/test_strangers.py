"""Gram files from strangers: nothing is allocated, loaded or followed that a Gram file never has."""

from __future__ import annotations

import json
import re
import shutil
import tracemalloc

import h5py
import numpy as np
import pytest

from ntkengine import store
from ntkengine.errors import InputError
from ntkengine.gram.result import Gram
from ntkengine.store import heaps, opening
from ntkengine.store.schema import SHARD_SCHEMA

TEXT = h5py.string_dtype()


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    rng = np.random.default_rng(0)
    K = rng.normal(size=(5, 5))
    gram = Gram(K @ K.T, rng.normal(size=(5, 2)), "trace", "sgd", 0.25)
    gram.modules = {"a": gram.values / 2, "b": gram.values / 2}
    gram.targets = rng.normal(size=(5, 2))
    gram.extras = {"fold": np.arange(5)}
    gram.meta = {"precision": "high", "seconds": 1.0}
    path = tmp_path_factory.mktemp("sound") / "k.h5"
    store.write_gram(path, gram, {"seed": 0}, {"example_id": [f"row {i}" for i in range(5)]})
    return path


def again(file, name, **given):
    if name in file:
        del file[name]
    file.create_dataset(name, **given)


def packed(file, name):
    values = file[name][...]
    again(file, name, data=values, chunks=values.shape, compression="gzip")


def grown(file):
    again(file, "gram", shape=(5, 5), maxshape=(None, None), dtype="f8", data=np.eye(5), chunks=(5, 5))


def many_paths(file):
    group = file.create_group("tiles/deep")
    for _ in range(40):
        inner = group.create_group("a")
        group["b"] = inner
        group = inner


def json_of(file, name, text):
    again(file, f"json/{name}", data=text, dtype=TEXT)


def meta(**changes):
    return lambda file: json_of(file, "meta", json.dumps({"precision": "high"} | changes))


HUGE = {"shape": (10**9, 10**9), "dtype": "f8", "chunks": (256, 256), "fillvalue": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: again(f, "gram", **HUGE), r"/gram: shape .* are stored"),
        (lambda f: again(f, "outputs", shape=(10**9, 10**4), dtype="f8"), r"/outputs: shape .* 0 are stored"),
        (lambda f: again(f, "extras/fold", **HUGE), r"/extras/fold: shape .* 0 are stored"),
        (lambda f: again(f, "example_id", shape=(10**9,), dtype=TEXT), r"/example_id: 1000000000 texts are not in"),
        (lambda f: again(f, "gram", data=np.eye(5, dtype="f4")), "/gram: expected float64, got float32"),
        (lambda f: again(f, "gram", data=np.eye(6)), r"/gram: expected shape \(5, 6\), got \(6, 6\)"),
        (lambda f: again(f, "modules/1", data=np.eye(6)), r"/modules/1: expected shape \(5, 5\), got \(6, 6\)"),
        (lambda f: again(f, "targets", data=np.ones((4, 2))), r"/targets: expected shape \(5, any\), got \(4, 2\)"),
        (lambda f: again(f, "targets", data=["a"] * 5, dtype=TEXT), "/targets: expected plain numbers, got object"),
        (lambda f: again(f, "outputs", data=np.ones((5, 2), "c16")), "/outputs: expected plain numbers"),
        (lambda f: again(f, "example_id", data=np.arange(5)), "/example_id: expected texts, got int64"),
        (lambda f: again(f, "json/job", data=1.0), "/json/job: expected one text, got float64"),
        (grown, "/gram: expected an array of a fixed shape"),
        (lambda f: packed(f, "outputs"), "/outputs is packed; expected that of Gram matrices only"),
        (many_paths, "has another name too"),
        (lambda f: f.attrs.__setitem__("contraction", "sum"), "contraction: expected one of trace, full"),
        (lambda f: f.attrs.__setitem__("schema", [1.0, 2.0]), "expected schema 'ntkengine-gram/1', got"),
        (lambda f: f.attrs.__setitem__("noise", 0.0), "attributes do not match their checksum"),
        (lambda f: f["modules/1"].attrs.__setitem__("name", "a"), "/modules/1: its module's name 'a' is damaged"),
        (lambda f: f["modules/1"].attrs.update(f["modules/0"].attrs), "/modules/1: module 'a' is there twice"),
        (lambda f: f.__delitem__("modules/0"), "/modules: expected matrices 0, 1, … as in /tiles/modules, one is miss"),
        (lambda f: again(f, "cross/deep", data=1.0), "/cross is not the kind of thing"),
        (lambda f: f["outputs"].write_direct(np.ones((5, 2))), "/outputs does not match its checksum"),
        (lambda f: f["json/job"].__setitem__((), "{}"), "/json/job does not match its checksum"),
        (lambda f: again(f, "tiles/done", data=np.ones(2, bool)), r"/tiles/done: expected 1 flags, got shape \(2,\)"),
        (lambda f: json_of(f, "job", "[" * 10**5), "/json/job: malformed JSON"),
        (lambda f: json_of(f, "job", "[1]"), "/json/job: expected another kind of value, got list"),
        (lambda f: json_of(f, "plan", "{}"), "/json/plan: parameters is missing"),
        (meta(seconds="long"), "/json/meta: seconds: expected int or float, got 'long'"),
        (meta(seconds=10**400), "/json/meta: seconds: expected"),
        (meta(sketch={"features": 3}), "/json/meta: sketch: parameters: expected int, got 'None'"),
        (meta(device="\ud800"), "/json/meta: malformed JSON .*surrogates not allowed"),
    ],
)
def test_what_a_gram_never_has_is_refused(sound, tmp_path, change, message):
    path = shutil.copy(sound, tmp_path / "k.h5")
    with h5py.File(path, "r+") as file:
        change(file)
    tracemalloc.start()
    with pytest.raises(InputError, match=message) as caught:
        store.open_gram(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()
    assert "\n" not in str(caught.value)


def test_texts_named_many_times_are_not_multiplied(sound, tmp_path):
    path = shutil.copy(sound, tmp_path / "k.h5")
    with h5py.File(path, "r+") as file:
        again(file, "example_id", data=["x" * 5000, *"abcd"], dtype=TEXT)
        place = file["example_id"].id.get_offset()
    raw = bytearray(path.read_bytes())
    raw[place : place + 80] = raw[place : place + 16] * 5
    path.write_bytes(raw)
    assert len(raw) < 5 * 5000
    with pytest.raises(InputError, match="/example_id: its texts are longer than the file"):
        store.open_gram(path)


def test_a_text_whose_length_would_hang_the_library(sound, tmp_path):
    raw = sound.read_bytes()
    for at in [m.start() for m in re.finditer(b"GCOL", raw)]:
        for size in (0, 2**63, 2**64 - 32):  # of the first object
            path = tmp_path / "k.h5"
            path.write_bytes(raw[: at + 24] + size.to_bytes(8, "little") + raw[at + 32 :])
            with pytest.raises(InputError, match="is incomplete or damaged .its texts at byte"):
                store.open_gram(path)


def test_a_large_file_is_looked_at_between_its_numbers(sound, tmp_path, monkeypatch):
    monkeypatch.setattr(heaps, "_SMALL", 0)
    assert store.verify_gram(sound) == []
    raw = bytearray(sound.read_bytes())
    at = raw.index(b"GCOL")
    raw[at + 24 : at + 32] = bytes(8)
    (tmp_path / "k.h5").write_bytes(raw)
    with pytest.raises(InputError, match="its texts at byte"):
        store.open_gram(tmp_path / "k.h5")


def test_a_virtual_matrix_is_no_larger_than_its_shards(tmp_path):
    path = tmp_path / "k.h5"
    with h5py.File(path, "w") as file:
        file.attrs.update({"schema": store.SCHEMA, "contraction": "trace"})
        file.create_dataset("json/shards", data='[{"file": "s.h5"}]', dtype=TEXT)
        file["outputs"] = np.ones((3, 1))
        layout = h5py.VirtualLayout((10**9, 10**9), float)
        layout[:3, :3] = h5py.VirtualSource("s.h5", "gram", (3, 3))
        file.create_virtual_dataset("gram", layout)
    with pytest.raises(InputError, match="has 1000000000000000000 entries, its shards 9"):
        store.open_gram(path)


@pytest.mark.parametrize(("source", "message"), [("k.h5", "not one of its shards"), ("s.h5", "expected 0")])
def test_a_virtual_matrix_over_itself_is_not_followed(tmp_path, source, message):
    for name, schema in (("k.h5", store.SCHEMA), ("s.h5", SHARD_SCHEMA)):
        with h5py.File(tmp_path / name, "w") as file:
            file.attrs.update({"schema": schema, "contraction": "trace", "digest": "d"})
            text = json.dumps([{"file": source, "bytes": 0, "digest": "d"}])
            file.create_dataset("json/shards", data=text, dtype=TEXT)
            file["outputs"] = np.ones((3, 1))
            layout = h5py.VirtualLayout((3, 3), float)
            layout[:] = h5py.VirtualSource(source, "gram", (3, 3))
            file.create_virtual_dataset("gram", layout)
    with pytest.raises(InputError, match=message):
        store.open_gram(tmp_path / "k.h5")
    with pytest.raises(InputError, match="which a shard never has"):
        opening.opened(tmp_path / "s.h5", SHARD_SCHEMA)
