"""One file for each rank: the same numbers through a virtual dataset, and never zeros for a shard that is not there."""

from __future__ import annotations

import os
import shutil

import h5py
import numpy as np
import pytest

from ntkengine import store
from ntkengine.errors import InputError
from ntkengine.gram.result import Gram

CUTS = [0, 300, 310, 700]
JOB = {"model": "m", "two_inputs": False, "seed": 0}


def make(seed: int = 0, layers: tuple[int, ...] = ()) -> Gram:
    rng = np.random.default_rng(seed)
    K = rng.normal(size=(*layers, 700, 700))
    K = K + np.swapaxes(K, -1, -2)
    gram = Gram(K, rng.normal(size=(700, 2)), "per-output" if layers else "trace", "sgd", 0.25)
    gram.modules = {"a.b": K / 4, "c": K * 0.75}
    gram.cross = rng.normal(size=(*layers, 40, 700))
    gram.eval_outputs = rng.normal(size=(40, 2))
    gram.meta = {"precision": "high"}
    return gram


def sharded(path, gram):
    for rank, (a, b) in enumerate(zip(CUTS, CUTS[1:], strict=False)):
        tiled = {"gram": (a, gram.values[..., a:b, :])}
        tiled |= {f"modules/{i}": (a, matrix[..., a:b, :]) for i, matrix in enumerate(gram.modules.values())}
        if rank < 2:  # the last rank has no eval rows
            tiled["cross"] = (20 * rank, gram.cross[..., 20 * rank : 20 * rank + 20, :])
        store.write_shard(path, rank, 3, tiled, JOB)
    store.link_shards(path, 3, gram, JOB, {"example_id": [f"é{i}" for i in range(700)]})


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def written(tmp_path):
    gram, path = make(), tmp_path / "k.h5"
    (tmp_path / "k.rank-0000-of-0007.h5").write_text("of a run with more ranks")
    sharded(path, gram)
    return gram, path


def same(got, gram):
    np.testing.assert_array_equal(np.asarray(got), gram.values)
    np.testing.assert_array_equal(got.cross[...], gram.cross)
    np.testing.assert_array_equal(got.outputs, gram.outputs)
    assert list(got.modules) == list(gram.modules)
    for name, matrix in gram.modules.items():
        np.testing.assert_array_equal(got.modules[name][...], matrix)
    assert got.noise == gram.noise
    assert got.meta["example_id"][3] == "é3"


@pytest.mark.parametrize("layers", [(), (2,)])
def test_shards_read_as_one_file(tmp_path, layers):
    gram, path = make(layers=layers), tmp_path / "k.h5"
    sharded(path, gram)
    got = store.open_gram(path)
    same(got, gram)
    np.testing.assert_array_equal(got.values[..., 305:320, 5:9], gram.values[..., 305:320, 5:9])
    assert store.verify_gram(path) == []
    with h5py.File(path) as plain:
        np.testing.assert_array_equal(plain["gram"][..., -5:, :], gram.values[..., -5:, :])
    assert names(tmp_path) == ["k.h5", *(f"k.rank-000{r}-of-0003.h5" for r in range(3))]


def test_shards_move_with_their_file(written, tmp_path, monkeypatch):
    gram, path = written
    (tmp_path / "else").mkdir()
    for item in tmp_path.glob("*.h5"):
        shutil.move(item, tmp_path / "else")
    monkeypatch.chdir("/")
    same(store.open_gram(tmp_path / "else" / "k.h5"), gram)


@pytest.mark.parametrize("harm", ["missing", "truncated", "empty", "other run", "other job", "gap"])
def test_a_shard_that_is_not_the_one_written_is_an_error_never_zeros(written, harm):
    gram, path = written
    shard = store.shard_path(path, 1, 3)
    if harm == "missing":
        shard.unlink()
    elif harm == "truncated":
        os.truncate(shard, shard.stat().st_size // 2)
    elif harm == "empty":
        shard.write_bytes(b"")
    elif harm == "other run":
        rows = (300, make(1).values[300:310])
        modules = {f"modules/{i}": (300, matrix[300:310]) for i, matrix in enumerate(make(1).modules.values())}
        store.write_shard(path, 1, 3, {"gram": rows, **modules, "cross": (20, gram.cross[20:])}, JOB)
    else:
        store.write_shard(path, 1, 3, {"gram": (300 + (harm == "gap"), gram.values[300:310])}, {**JOB, "seed": 1})
        match = "of another job"
        if harm == "gap":
            store.write_shard(path, 1, 3, {"gram": (301, gram.values[300:310])}, JOB)
            match = "its rows of /gram start at 301, expected 300"
        with pytest.raises(InputError, match=match):
            store.link_shards(path, 3, gram, JOB, {})
    with pytest.raises(InputError, match="shard k.rank-0001-of-0003.h5 (is missing|has .* bytes|is of another run)"):
        store.open_gram(path)
    assert len(store.verify_gram(path)) == 1
    if harm == "missing":
        with h5py.File(path) as plain:  # whoever reads it without us
            assert np.isnan(plain["gram"][300:310]).all()


def test_verify_names_the_tile_of_a_shard(written):
    _, path = written
    with h5py.File(store.shard_path(path, 2, 3), "r+") as file:
        file["gram"][300, 10] += 1e-9
    assert store.verify_gram(path) == ["tile 3 of /gram in k.rank-0002-of-0003.h5 does not match its checksum"]
    with pytest.raises(InputError, match="does not match its checksum; a copy would hide that"):
        store.merge_gram(path, path.with_name("one.h5"))


@pytest.mark.parametrize("compress", [False, True])
def test_merged_into_one_file(written, tmp_path, compress):
    gram, path = written
    one = tmp_path / "one.h5"
    store.merge_gram(path, one, compress=compress)
    for item in tmp_path.glob("k.*"):
        item.unlink()
    same(store.open_gram(one), gram)
    assert store.verify_gram(one) == []
    with h5py.File(one) as plain:
        assert plain["gram"].compression == ("gzip" if compress else None)
        assert not plain["gram"].is_virtual
    with pytest.raises(InputError, match="exists"):
        store.merge_gram(one, one)
    again = tmp_path / "again.h5"
    store.merge_gram(one, again)
    same(store.open_gram(again), gram)


def test_repair_of_shards_makes_one_file(written, tmp_path):
    gram, path = written
    with h5py.File(store.shard_path(path, 2, 3), "r+") as file:
        file["modules/1"][0, 10] = np.nan  # rows 310 to 566 of the whole: of two of its tiles
    assert store.repair_gram(path) == (2, 0)
    same(store.open_gram(path), gram)
    assert store.verify_gram(path) == []
    assert names(tmp_path) == ["k.h5"]


def foreign(path, change):
    with h5py.File(path, "w") as file:
        file.attrs["schema"] = store.SCHEMA
        change(file)
    return path


def test_files_from_strangers_lead_nowhere(tmp_path):
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["gram"] = np.eye(3)
    (tmp_path / "raw").write_bytes(np.eye(3).tobytes())

    def virtual(file, name="secret.h5"):
        layout = h5py.VirtualLayout((3, 3), float)
        layout[:] = h5py.VirtualSource(name, "gram", (3, 3))
        file.create_virtual_dataset("gram", layout)

    def smuggled(file):
        virtual(file, str(secret))
        file.create_dataset("json/shards", data=f'[{{"file": "{secret}"}}]', dtype=h5py.string_dtype())

    def filtered(file):
        file.create_dataset("gram", data=np.arange(9).reshape(3, 3), chunks=(3, 3), scaleoffset=4)

    for change, message in [
        (lambda f: f.__setitem__("gram", h5py.ExternalLink("secret.h5", "gram")), "/gram is a link"),
        (lambda f: f.__setitem__("modules/0", h5py.SoftLink("/gram")), "/modules/0 is a link"),
        (virtual, "reads 'secret.h5', which is not one of its shards"),
        (smuggled, "which is not one of its shards"),
        (filtered, "/gram is packed by filter 6"),
        (lambda f: f.create_dataset("gram", (3, 3), float, external=[("raw", 0, 72)]), "numbers in other files"),
    ]:
        path = foreign(tmp_path / "k.h5", change)
        for read in (store.open_gram, store.verify_gram, store.read_job):
            with pytest.raises(InputError, match=message):
                read(path)


def test_shards_are_looked_for_in_their_folder_alone(written, monkeypatch):
    monkeypatch.setenv("HDF5_VDS_PREFIX", "/tmp")
    with pytest.raises(InputError, match="HDF5_VDS_PREFIX is set"):
        store.open_gram(written[1])
