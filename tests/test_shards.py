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
    gram.cross_modules = dict.fromkeys(gram.modules, gram.cross / 2)
    gram.eval_outputs = rng.normal(size=(40, 2))
    gram.meta = {"precision": "high"}
    return gram


def write_shard(path, rank, ranks, tiled, job):
    room = {name: (start, values.shape, values.dtype) for name, (start, values) in tiled.items()}
    with store.writing_shard(path, rank, ranks, room, job) as shard:
        for name, (_, values) in tiled.items():
            for row in range(0, values.shape[-2], store.TILE):
                shard.put(name, row, values[..., row : row + store.TILE, :])


def place(path):
    with store.Folder(path) as folder:
        store.place(path)
        folder.remove()


def sharded(path, gram):
    for rank, (a, b) in enumerate(zip(CUTS, CUTS[1:], strict=False)):
        tiled = {"gram": (a, gram.values[..., a:b, :])}
        tiled |= {f"modules/{i}": (a, matrix[..., a:b, :]) for i, matrix in enumerate(gram.modules.values())}
        if rank < 2:  # the last rank has no eval rows
            part = slice(20 * rank, 20 * rank + 20)
            tiled["cross"] = (20 * rank, gram.cross[..., part, :])
            crosses = enumerate(gram.cross_modules.values())
            tiled |= {f"crosses/{i}": (20 * rank, matrix[..., part, :]) for i, matrix in crosses}
        write_shard(path, rank, 3, tiled, JOB)
    store.link_shards(path, 3, gram, JOB, {"example_id": [f"é{i}" for i in range(700)]})
    place(path)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def written(tmp_path):
    gram, path = make(), tmp_path / "k.h5"
    sharded(path, gram)
    return gram, path


def same(got, gram):
    np.testing.assert_array_equal(np.asarray(got), gram.values)
    np.testing.assert_array_equal(got.cross[...], gram.cross)
    np.testing.assert_array_equal(got.outputs, gram.outputs)
    assert list(got.modules) == list(gram.modules)
    for name, matrix in gram.modules.items():
        np.testing.assert_array_equal(got.modules[name][...], matrix)
        np.testing.assert_array_equal(got.cross_modules[name][...], gram.cross_modules[name])
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


def test_a_link_and_another_working_folder_lead_to_the_same_shards(written, tmp_path, monkeypatch):
    gram, path = written
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link.h5"
    link.symlink_to(path)
    assert store.verify_gram(link) == []
    same(store.open_gram(link), gram)
    copy = tmp_path / "elsewhere" / "copy.h5"
    (tmp_path / "elsewhere" / "made.h5").symlink_to(copy)
    store.merge_gram(link, tmp_path / "elsewhere" / "made.h5")
    same(store.open_gram(copy), gram)
    monkeypatch.chdir(path.parent)
    lazy = store.open_gram(path.name)
    monkeypatch.chdir(tmp_path / "elsewhere")
    same(lazy, gram)


def test_links_in_a_circle_are_named(tmp_path):
    (tmp_path / "a.h5").symlink_to(tmp_path / "a.h5")
    with pytest.raises(InputError, match="a.h5: is a link that leads nowhere"):
        store.open_gram(tmp_path / "a.h5")


def test_shards_move_with_their_file(written, tmp_path, monkeypatch):
    gram, path = written
    (tmp_path / "else").mkdir()
    for item in tmp_path.glob("*.h5"):
        shutil.move(item, tmp_path / "else")
    monkeypatch.chdir("/")
    same(store.open_gram(tmp_path / "else" / "k.h5"), gram)


@pytest.mark.parametrize("harm", ["missing", "truncated", "empty", "other run"])
def test_a_shard_that_is_not_the_one_written_is_an_error_never_zeros(written, harm):
    gram, path = written
    shard = store.shard_path(path, 1, 3)
    if harm == "missing":
        shard.unlink()
    elif harm == "truncated":
        os.truncate(shard, shard.stat().st_size // 2)
    elif harm == "empty":
        shard.write_bytes(b"")
    else:
        rows = (300, make(1).values[300:310])
        modules = {f"modules/{i}": (300, matrix[300:310]) for i, matrix in enumerate(make(1).modules.values())}
        write_shard(path, 1, 3, {"gram": rows, **modules, "cross": (20, gram.cross[20:])}, JOB)
        store.shard_path(store.staged(path), 1, 3).replace(shard)
    with pytest.raises(InputError, match="shard k.rank-0001-of-0003.h5 (is missing|has .* bytes|is of another run)"):
        store.open_gram(path)
    assert len(store.verify_gram(path)) == 1
    if harm == "missing":
        with h5py.File(path) as plain:  # whoever reads it without us
            assert np.isnan(plain["gram"][300:310]).all()


@pytest.mark.parametrize(
    ("start", "job", "match"),
    [
        (300, {**JOB, "seed": 1}, "of another job"),
        (301, JOB, "its rows of /gram start at 301, expected 300"),
        (None, JOB, "k.rank-0001-of-0003.h5: no such file"),
    ],
)
def test_shards_that_do_not_belong_together_are_not_linked(tmp_path, start, job, match):
    gram, path = make(), tmp_path / "k.h5"
    for rank, (a, b) in enumerate(zip(CUTS, CUTS[1:], strict=False)):
        if rank == 1 and start is not None:
            write_shard(path, rank, 3, {"gram": (start, gram.values[a:b])}, job)
        elif rank != 1:
            write_shard(path, rank, 3, {"gram": (a, gram.values[a:b])}, JOB)
    with pytest.raises(InputError, match=match):
        store.link_shards(path, 3, gram, JOB, {})
    place(path)
    assert names(tmp_path) == []


def test_a_shard_never_takes_the_place_of_a_file(tmp_path):
    gram, path = make(), tmp_path / "k.h5"
    other = tmp_path / "k.rank-0001-of-0003.h5"
    other.write_text("of a file that was renamed")
    with pytest.raises(InputError, match="k.rank-0001-of-0003.h5 exists but k.h5 does not"):
        store.refuse_shards(path, 3)
    with pytest.raises(InputError, match="k.rank-0001-of-0003.h5 exists but k.h5 does not"):
        sharded(path, gram)
    assert other.read_text() == "of a file that was renamed"
    other.unlink()
    store.tidy(path)  # what the next run of the job does: all is there, and only has to be named
    same(store.open_gram(path), gram)
    assert names(tmp_path) == ["k.h5", *(f"k.rank-000{r}-of-0003.h5" for r in range(3))]


@pytest.mark.parametrize("step", ["link", "unlink"])
@pytest.mark.parametrize("moved", [0, 1, 3])
def test_a_kill_between_two_names_is_made_good(tmp_path, monkeypatch, moved, step):
    gram, path = make(), tmp_path / "k.h5"
    real, left = {"link": os.link, "unlink": type(path).unlink}[step], [moved]

    def killed(self, *given, **more):
        placing = step == "unlink" or given[0].parent == tmp_path  # not into the folder, when a shard is complete
        if self.parent.name == "sharded" and placing:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        return real(self, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os if step == "link" else type(path), step, killed)
        with pytest.raises(KeyboardInterrupt):
            sharded(path, gram)
    assert path.exists() is ((moved, step) == (3, "unlink"))
    if not path.exists():
        check_left_alone(path)
    store.tidy(path)
    same(store.open_gram(path), gram)
    assert store.verify_gram(path) == []
    assert names(tmp_path) == ["k.h5", *(f"k.rank-000{r}-of-0003.h5" for r in range(3))]


def check_left_alone(path):
    with store.Folder(path):  # a process at work is left alone
        store.tidy(path)
        assert not path.exists()


def test_unfinished_shards_are_cleared_away(tmp_path):
    gram, path = make(), tmp_path / "k.h5"
    write_shard(path, 0, 3, {"gram": (0, gram.values[:300])}, JOB)
    with store.Folder(path):
        assert names(store.parts_of(path)) == ["lock"]
    assert names(tmp_path) == []
    with pytest.raises(IndexError), store.writing_shard(path, 0, 3, {"gram": (0, (300, 700), float)}, JOB) as shard:
        shard.put("gram", 0, gram.values[:256, 700 + 1 :][:, [0]])
    assert list(store.parts_of(path).rglob("*.h5*")) == []


def test_verify_names_the_tile_of_a_shard(written):
    _, path = written
    with h5py.File(store.shard_path(path, 2, 3), "r+") as file:
        file["gram"][300, 10] += 1e-9
    assert store.verify_gram(path) == ["tile 3 of /gram in k.rank-0002-of-0003.h5 does not match its checksum"]
    with pytest.raises(InputError, match="does not match its checksum; a copy would hide that"):
        store.merge_gram(path, path.with_name("one.h5"))


def test_no_flipped_bit_goes_unseen(written):
    gram, path = written
    rng = np.random.default_rng(0)
    seen = 0
    for file in sorted(path.parent.glob("*.h5")):
        whole = file.read_bytes()
        for _ in range(12):
            spoiled, at = bytearray(whole), int(rng.integers(8000))  # the first bytes tell where all others are
            spoiled[at] ^= 1 << int(rng.integers(8))
            file.write_bytes(spoiled)
            try:
                if not store.verify_gram(path):
                    same(store.open_gram(path), gram)
                    continue
            except InputError:
                pass
            seen += 1
        file.write_bytes(whole)
    assert seen > 3
    assert store.verify_gram(path) == []


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
