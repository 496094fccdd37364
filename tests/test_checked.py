"""What is read of a Gram file matches its checksum or is refused; what is beside the damage is still read."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

from ntkengine import store
from ntkengine.cli import app
from ntkengine.errors import InputError
from ntkengine.forecast import forecast
from ntkengine.spectrum.panels import PanelOperator
from tests.test_shards import JOB, make, sharded

FOLDS = np.random.default_rng(5).standard_normal((2, 700, 700))


def write(path, kind, layers=()):
    gram = make(layers=layers)
    gram.extras = {"fold_grams": FOLDS} if kind != "sharded" else {}
    if kind == "sharded":
        sharded(path, gram)
        return gram
    store.write_gram(path, gram, JOB, {})
    if kind == "packed":
        store.merge_gram(path, path.with_name("p.h5"), compress=True)
        path.with_name("p.h5").replace(path)
    return gram


def spoil(path, name, *at):
    """Change one number by its last bits, in the shard that has it; return the tile it is in."""
    for file in [*path.parent.glob("*.rank-*"), path]:
        with h5py.File(file, "r+") as h5:
            if name not in h5 or h5[name].is_virtual:
                continue
            start, shape = int(h5[name].attrs.get("start", 0)), h5[name].shape
            row, column = at[-2] - start, at[-1]
            if 0 <= row < shape[-2]:
                where = (*at[:-2], row, column)
                h5[name][where] = np.nextafter(h5[name][where], np.inf)
                top = row // 256 * 256
                return slice(start + top, start + min(top + 256, shape[-2])), slice(column // 256 * 256, None)
    raise AssertionError(at)


INDICES = [..., 5, -1, slice(0, 4), slice(5, 600, 7), (slice(250, 310), slice(0, 3)), (3, 9)]
INDICES += [(..., 6), (slice(None), -2), ([0, 309],), (slice(0, 0), slice(None)), (np.int64(7), slice(4, 8)), ()]


@pytest.fixture(scope="module", params=["whole", "sharded", "packed"])
def sound(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "k.h5"
    return path, write(path, request.param)


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_an_index_reads_what_was_written(sound, index):
    path, gram = sound
    found = store.open_gram(path)
    np.testing.assert_array_equal(found.values[index], gram.values[index])
    np.testing.assert_array_equal(found.modules["c"][index], gram.modules["c"][index])
    assert len(found.values) == 700


@pytest.mark.parametrize("index", ["no", (1, 2, 3), 700, 1.5], ids=str)
def test_what_is_no_index_is_refused_as_h5py_does(sound, index):
    with h5py.File(sound[0]) as file, pytest.raises((IndexError, TypeError, ValueError)) as wanted:
        file["gram"][index]
    with pytest.raises(wanted.type):
        store.open_gram(sound[0]).values[index]


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_damage_is_refused_where_it_is_read_and_nowhere_else(tmp_path, kind):
    gram = write(tmp_path / "k.h5", kind)
    rows, columns = spoil(tmp_path / "k.h5", "gram", 305, 20)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(40):
        (a, b), (c, d) = np.sort(rng.integers(0, 701, (2, 2)), axis=1).tolist()
        touched = a < b and c < d and a < rows.stop and b > rows.start and c < columns.start + 256
        values = store.open_gram(tmp_path / "k.h5").values
        if touched:
            refused += 1
            with pytest.raises(InputError, match=f"k.h5: /gram: the tile at row {rows.start}, column 0 does not match"):
                values[a:b, c:d]
            continue
        np.testing.assert_array_equal(values[a:b, c:d], gram.values[a:b, c:d])
    assert 8 < refused < 32


@pytest.mark.parametrize("kind", ["whole", "sharded"])
@pytest.mark.parametrize("layers", [(), (2,)], ids=["one", "per-output"])
def test_every_matrix_looks_at_its_checksums(tmp_path, kind, layers):
    write(tmp_path / "k.h5", kind, layers)
    last = tuple(n - 1 for n in layers)
    for name in ("gram", "cross", "modules/1", "crosses/0"):
        spoil(tmp_path / "k.h5", name, *last, 39 if "cross" in name else 699, 699)
    found = store.open_gram(tmp_path / "k.h5")
    reads = {
        "gram": lambda: np.asarray(found.values),
        "cross": lambda: found.cross[...],
        "modules/1": lambda: np.asarray(found.modules["c"]),
        "crosses/0": lambda: [*found.cross_modules["a.b"]],
    }
    for name, read in reads.items():
        with pytest.raises(InputError, match=f"k.h5: /{name}: the tile at row .* does not match its checksum"):
            read()
    assert np.isfinite(found.modules["a.b"][...]).all()


def test_folds_are_looked_at_as_one(tmp_path):
    write(tmp_path / "k.h5", "whole")
    np.testing.assert_array_equal(store.open_gram(tmp_path / "k.h5").extras["fold_grams"][0], FOLDS[0])
    spoil(tmp_path / "k.h5", "extras/fold_grams", 1, 699, 699)
    with pytest.raises(InputError, match="k.h5: /extras/fold_grams does not match its checksum"):
        store.open_gram(tmp_path / "k.h5").extras["fold_grams"][0]


def test_what_streams_and_what_forecasts_refuses_damage(tmp_path):
    path = tmp_path / "k.h5"
    write(path, "whole")
    spoil(path, "gram", 699, 0)
    found = store.open_gram(path)
    with pytest.raises(InputError, match="the tile at row 512, column 0 does not match"):
        PanelOperator(found)
    with pytest.raises(InputError, match="the tile at row 512, column 0 does not match"):
        forecast(found, np.eye(2)[np.arange(700) % 2])
    result = CliRunner().invoke(app, ["spectrum", str(path)])
    assert result.exit_code == 2
    assert "verify --repair" in result.stderr


def test_a_packed_tile_that_is_no_gzip_is_refused_in_one_line(tmp_path):
    path = tmp_path / "k.h5"
    write(path, "packed")
    with h5py.File(path, "r+") as file:
        file["gram"].id.write_direct_chunk((0, 0), b"nothing of the kind" * 9)
    with pytest.raises(InputError, match="k.h5: /gram: a tile cannot be read"):
        store.open_gram(path).values[0, 0]


@pytest.mark.parametrize("lost", ["start", "crc32"])
def test_checksums_that_are_lost_are_refused_in_one_line(tmp_path, lost):
    path = tmp_path / "k.h5"
    write(path, "sharded")
    with h5py.File(store.shard_path(path, 1, 3), "r+") as file:
        if lost == "start":
            del file["gram"].attrs["start"]
        else:
            file["tiles/crc32"][0] ^= 1
            file.move("tiles/crc32", "tiles/crc33")
    with pytest.raises(InputError, match=r"k(\.rank-0001-of-0003)?\.h5: "):
        store.open_gram(path).values[0]
