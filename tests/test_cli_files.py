"""Commands that check, mend and merge files."""

from __future__ import annotations

import json

import h5py
import numpy as np

from ntkengine.store import open_gram
from tests.tiny import compute_small


def test_verify(run, gram_file, tmp_path):
    assert run("verify", gram_file) == (0, f"{gram_file}: sound\n", "")
    damaged = tmp_path / "d.h5"
    damaged.write_bytes(gram_file.read_bytes())
    with h5py.File(damaged, "r+") as file:
        file["gram"][0, 0] += 1.0
    code, out, err = run("verify", damaged)
    assert (code, out) == (1, "")
    assert err == f"error: {damaged}: tile 0 of /gram does not match its checksum\n"
    code, out, err = run("verify", damaged, "--json")
    assert (code, err) == (1, "")
    assert json.loads(out)["sound"] is False


def test_a_gram_file_is_no_job(run, gram_file):
    told = f"error: {gram_file}: is an HDF5 file such as a Gram's, expected a job file\n"
    for command in ("gram", "plan", "finetune"):
        assert run(command, gram_file) == (2, "", told)


def test_verify_repairs_or_opens_tiles_for_the_next_run(run, gram_file, tmp_path):
    damaged = tmp_path / "k.h5"
    damaged.write_bytes(gram_file.read_bytes())
    assert run("verify", damaged, "--repair") == (0, f"{damaged}: sound\n", "")
    with h5py.File(damaged, "r+") as file:
        file["gram"][0, 0] += 1.0
        file["cross"][0, 0] += 1.0
    code, out, err = run("verify", damaged, "--repair")
    assert (code, out) == (1, "")
    assert err == (
        f"error: {damaged}: damaged tiles repaired: 0, still to be computed: 2; the file is now the unfinished run "
        f"{tmp_path / '.k.h5.parts'}: run the same job again, it computes only those, and the file is back\n"
    )
    assert ".K.H5.parts" in run("verify", "--help")[1]
    for command in (["verify"], ["spectrum"], ["ridge"], ["forecast"], ["report", gram_file], ["compare", gram_file]):
        code, out, err = run(*command, damaged)
        assert (code, out) == (2, "")
        assert err == (
            f"error: {damaged}: not complete (damaged tiles are open); the same job goes on; `ntkengine info "
            f"{damaged}` says more\n"
        )
    code, out, err = run("info", damaged)
    assert (code, err) == (0, "")
    assert "damaged tiles are open" in out
    compute_small(damaged)
    assert run("verify", damaged, "--repair", "--json")[1] == json.dumps(
        {"path": str(damaged), "sound": True, "repaired": 0, "open": 0}
    ) + "\n"  # fmt: skip
    np.testing.assert_allclose(np.asarray(open_gram(damaged)), np.asarray(open_gram(gram_file)), rtol=1e-5)


def test_merge(run, gram_file, tmp_path):
    out = tmp_path / "one.h5"
    assert run("merge", gram_file, "-o", out, "--compress") == (0, f"{out}\n", "")
    np.testing.assert_array_equal(np.asarray(open_gram(out)), np.asarray(open_gram(gram_file)))
    code, _, err = run("merge", gram_file, "-o", out)
    assert (code, err) == (2, f"error: {out}: exists; choose another name\n")


def test_what_the_system_says_is_told_in_plain_words(run, gram_file, tmp_path):
    cut, text, folder = tmp_path / "cut.h5", tmp_path / "text.h5", tmp_path / "folder.toml"
    cut.write_bytes(gram_file.read_bytes()[:-10])
    text.write_text("hello")
    folder.mkdir()
    size = gram_file.stat().st_size
    for arguments, message in [
        (["info", cut], f"{cut}: is cut off: {size - 10:,} of its {size:,} bytes are there"),
        (["info", text], f"{text}: not an HDF5 file"),
        (["info", folder], f"{folder}: is a folder, expected a Gram file"),
        (["plan", folder], f"{folder}: not a readable TOML file: is a directory"),
        (["plan", "--peft", tmp_path / "none.json"], f"--peft: {tmp_path / 'none.json'}: no such file or directory"),
    ]:
        assert run(*arguments) == (2, "", f"error: {message}\n")
