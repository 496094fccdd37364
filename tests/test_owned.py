"""What is somebody's stays: other jobs' work, files that appear meanwhile, names behind links, half-done repairs."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from ntkengine import store
from ntkengine.errors import InputError
from ntkengine.gram import engine, versions
from ntkengine.gram.engine import compute_gram
from ntkengine.ridge.outofcore import cholesky_on_disk
from tests.brute import tiny_inputs, tiny_model
from tests.interrupted import LENGTHS, Killed
from tests.test_shards import JOB, make, sharded


@pytest.fixture
def call(tmp_path):
    model = tiny_model("bert")
    inputs = tiny_inputs(model, LENGTHS, 12)

    def run(**more):
        given = {"params": "all", "check": False, "out": tmp_path / "k.h5", "checkpoint_s": 0.0, **more}
        return compute_gram(model, inputs, **given)

    return run


def parts(path):
    return {p.name: p.read_bytes() for p in store.parts_of(path).glob("rank-*")}


@pytest.mark.parametrize("resume", [True, False])
def test_another_file_under_the_name_takes_nothing_from_unfinished_work(tmp_path, call, contracted, resume):
    contracted.stop = 4
    with pytest.raises(Killed):
        call()
    left = parts(tmp_path / "k.h5")
    store.write_gram(tmp_path / "k.h5", make(), JOB, {})
    with pytest.raises(InputError, match=r"k\.h5 (exists|holds another job)"):
        call(resume=resume)
    assert parts(tmp_path / "k.h5") == left != {}
    (tmp_path / "k.h5").unlink()
    contracted.stop = 10**9
    assert call().meta["resumed"] > 0


def test_a_file_that_appears_meanwhile_is_not_written_over(tmp_path, call):
    wanted = np.asarray(call(out=None))

    def appears(*_):
        if not (tmp_path / "k.h5").exists():
            (tmp_path / "k.h5").write_bytes(b"mine")

    with pytest.raises(FileExistsError, match="has appeared meanwhile.*; nothing is lost"):
        call(progress=appears)
    assert (tmp_path / "k.h5").read_bytes() == b"mine"
    (tmp_path / "k.h5").rename(tmp_path / "theirs")
    found = call()
    np.testing.assert_array_equal(found.values[...], wanted)
    assert found.meta["resumed"] > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["k.h5", "theirs"]


def test_where_there_are_no_links_a_name_is_still_not_taken(tmp_path, monkeypatch):
    def refuses(*_args, **_more):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuses)
    store.write_gram(tmp_path / "a.h5", make(), JOB, {})
    store.merge_gram(tmp_path / "a.h5", tmp_path / "b.h5")
    whole = (tmp_path / "b.h5").read_bytes()
    with pytest.raises(FileExistsError, match="has appeared meanwhile"):
        store.write_gram(tmp_path / "b.h5", make(1), JOB, {})
    assert (tmp_path / "b.h5").read_bytes() == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5", "b.h5"]


def test_a_link_and_its_file_are_one_job(tmp_path, call, contracted):
    (tmp_path / "far").mkdir()
    (tmp_path / "l.h5").symlink_to(tmp_path / "far/k.h5")
    contracted.stop = 4
    with pytest.raises(Killed):
        call(out=tmp_path / "l.h5")
    contracted.stop = 10**9
    assert call(out=tmp_path / "far/k.h5").meta["resumed"] > 0
    assert (tmp_path / "l.h5").is_symlink()
    with h5py.File(tmp_path / "far/k.h5", "r+") as file:
        file["gram"][0, 1] += 1.0
    assert store.repair_gram(tmp_path / "l.h5") == (0, 1)
    assert (tmp_path / "l.h5").is_symlink()
    assert np.isfinite(call(out=tmp_path / "l.h5").values[...]).all()
    assert store.verify_gram(tmp_path / "far/k.h5") == []


def test_a_repair_killed_between_its_halves_is_finished(tmp_path, call, monkeypatch):
    wanted = np.asarray(call()).copy()
    path = tmp_path / "k.h5"
    with h5py.File(path, "r+") as file:
        file["gram"][0, 1] += 100.0
    unlink = Path.unlink

    def killed(self, missing_ok=False):
        if self == path:
            raise Killed
        unlink(self, missing_ok=missing_ok)

    with monkeypatch.context() as now:
        now.setattr(Path, "unlink", killed)
        with pytest.raises(Killed):
            store.repair_gram(path)
    assert path.exists()
    np.testing.assert_allclose(call().values[...], wanted, rtol=0, atol=3e-6 * np.abs(wanted).max())
    assert [p.name for p in tmp_path.iterdir()] == ["k.h5"]


@pytest.mark.parametrize("name", ["50%%.h5", "k%b.h5", "100%done.h5", "k\udce9.h5"])
def test_names_that_a_sharded_file_cannot_have_are_refused_at_the_start(tmp_path, name):
    with pytest.raises(InputError, match="out: expected a printable name without % for a file of several ranks"):
        store.refuse_shards(tmp_path / name, 3)


def test_a_whole_that_does_not_show_its_shards_is_damaged(tmp_path):
    """HDF5 looks for the shards of such a name elsewhere, and fills in."""
    path = tmp_path / "50%%.h5"
    sharded(path, make())
    said = [text for text in store.verify_gram(path) if "/gram does not show what 50%%.rank-" in text]
    assert len(said) == 3
    with pytest.raises(InputError, match=r"/gram: the tile at row 0, column 0 does not match"):
        store.open_gram(path).values[0, 0]


def test_names_of_examples_are_those_that_were_asked_for(call):
    ids = [f"a{i}" for i in range(len(LENGTHS))]
    call(example_ids=ids)
    assert call(example_ids=ids).meta["example_id"] == ids
    assert call().meta["example_id"] == ids
    with pytest.raises(InputError, match=r"names its examples otherwise: example_ids\[1\] is 'a1' there, 'b' here"):
        call(example_ids=[ids[0], "b", *ids[2:]])


def test_a_job_of_what_json_changes_is_known_again(call):
    for _ in range(2):
        call(job={"a": (1, 2), 3: "x"})
    with pytest.raises(InputError, match="job: expected plain JSON"):
        call(job={"a": float("nan")})


def test_other_versions_are_warned_of_and_never_do_half_each(call, contracted, monkeypatch, caplog):
    contracted.stop = 4
    with pytest.raises(Killed):
        call()
    contracted.stop = 10**9
    mine = versions.versions
    with monkeypatch.context() as now:
        now.setattr(engine, "versions", lambda *of: mine(*of) | {"transformers": "4.0"})
        with pytest.raises(InputError, match=r"unfinished run of other versions: transformers \S+ there, 4.0 here"):
            call()
    call()
    monkeypatch.setattr(engine, "versions", lambda *of: mine(*of) | {"torch": "1.0"})
    with caplog.at_level(logging.WARNING):
        call()
    assert "of other versions, and taken as it is: torch" in caplog.text


def test_a_factor_on_disk_has_no_name_and_no_bus_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        cholesky_on_disk(np.eye(40), np.ones(40), 1.0, budget_mib=1.0, scratch=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_merge_that_is_stopped_leaves_nothing(tmp_path):
    store.write_gram(tmp_path / "k.h5", make(), JOB, {})
    slow = (
        "import time; from ntkengine.store import merging; tiles = merging._copy_tiles\n"
        "def slowly(*given):\n    print('now', flush=True); time.sleep(60)\n"
        "merging._copy_tiles = slowly\nfrom ntkengine.cli import main; main()"
    )
    command = [sys.executable, "-c", slow, "merge", str(tmp_path / "k.h5"), "--out", str(tmp_path / "one.h5")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as merging:
        assert merging.stdout is not None
        assert "now" in merging.stdout.readline()
        time.sleep(0.2)
        merging.send_signal(signal.SIGTERM)
        assert merging.wait(30) == 143
    assert [p.name for p in tmp_path.iterdir()] == ["k.h5"]
