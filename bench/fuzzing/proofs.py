"""What each reader reads, and the proof that it is right: of a malformed input that is not refused.

A proof takes the working folder and that of the sound files. It lets the product's own errors through, and raises
`ProofError` when what was read is not what is in the file.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import tomllib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ntkengine import store
from ntkengine.errors import InputError


class ProofError(AssertionError):
    """A reader took a malformed input for something it is not."""


# Gram files


def _numbers(gram: Any) -> dict[str, Any]:
    found = {"gram": gram.values, "cross": gram.cross, "outputs": gram.outputs, "targets": gram.targets}
    found |= {"eval_outputs": gram.eval_outputs, "eval_targets": gram.eval_targets, "noise": gram.noise}
    for group, parts in (("modules", gram.modules), ("crosses", gram.cross_modules)):
        found |= {group: list(parts), **{f"{group}/{i}": matrix for i, matrix in enumerate(parts.values())}}
    found |= {f"extras/{name}": array for name, array in gram.extras.items()}
    found |= {name: gram.meta[name] for name in ("example_id", "eval_id") if name in gram.meta}
    return {k: _plain(v) for k, v in found.items() if v is not None} | {"how": (gram.contraction, gram.transform)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return value[0], _plain(value[1])
    if isinstance(value, str | list | float):
        return value
    array = value[...] if isinstance(value, h5py.Dataset) else np.asarray(value)
    return str(array.dtype), array.shape, array.tobytes()


def prove_gram(work: Path, seeds: Path) -> None:
    from ntkengine.filecommands import described
    from ntkengine.report.tables import gram_table

    path = work / "k.h5"
    found: dict[str, Any] = {}
    unreadable = False
    problems: list[str] | None = None
    try:
        gram = store.open_gram(path)
        try:
            try:
                found = _numbers(gram)
            except OSError:  # a tile whose own sums or packing are damaged: HDF5 says so
                unreadable = True
            gram_table(gram)
            json.dumps(described(gram)).encode()
        finally:
            gram.values.file.close()
    finally:
        with contextlib.suppress(InputError):  # it has a word on every file
            problems = store.verify_gram(path)
        with contextlib.suppress(InputError):
            store.read_job(path)
    whole = store.open_gram(seeds / "k.h5")
    wanted = _numbers(whole)
    whole.values.file.close()
    added = {name for name in found if name.startswith("extras/") and name not in wanted}
    changed = [name for name, value in found.items() if name not in added and wanted.get(name) != value]
    if unreadable:
        changed.append("a tile that cannot be read")
    if not changed or problems:
        return
    with h5py.File(path) as file:  # files from before modules had checksums
        if all(name.startswith(("modules", "crosses", "cross")) and f"tiles/{name}" not in file for name in changed):
            return
    raise ProofError(f"{changed[:3]} changed and verify finds nothing")


def prove_commands(work: Path, seeds: Path) -> None:
    from ntkengine import cli

    del seeds
    path, refused = str(work / "k.h5"), 0
    for command in (["info"], ["info", "--json"], ["spectrum"], ["ridge"], ["forecast", "--json"], ["verify"]):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main([command[0], path, *command[1:]])
            except SystemExit as stop:
                code = stop.code
        if code not in (0, 1, 2) or err.getvalue().count("\n") != (0 if code == 0 else 1):
            raise ProofError(f"{command[0]}: exit {code}, {err.getvalue()!r}")
        refused += code != 0
    if refused:
        raise InputError(err.getvalue().strip())


# Jobs


def prove_job(work: Path, seeds: Path) -> None:
    from ntkengine.jobfile import read_job

    del seeds
    path = work / "job.toml"
    job = read_job(path)
    raw = tomllib.loads(path.read_text(encoding="utf-8"))
    json.dumps(job.settings()).encode()
    for table, held in raw.items():
        for key, value in held.items() if isinstance(held, dict) else ():
            got = getattr(getattr(job, table), key)
            if isinstance(got, Path) or key == "path":
                same = str(got).endswith((str(value), str(Path(value).expanduser())))
            else:
                same = repr(got) == repr(value) or got == value  # NaN is not equal to itself
                same |= isinstance(got, float) and isinstance(value, int) and got == float(value)
            if not same and list(got if isinstance(got, tuple) else ()) != value and got == got:
                raise ProofError(f"{table}.{key}: {value!r} read as {got!r}")


def prove_peft(work: Path, seeds: Path) -> None:
    from ntkengine.inputs.models import load_model
    from ntkengine.textfile import parse_json

    text = (work / "peft.json").read_text(encoding="utf-8", errors="replace")
    fields = parse_json(text, "peft.json", dict, "an object")
    model = load_model(seeds / "model", peft=fields)
    for name, value in fields.items():
        got = getattr(model.peft_config["default"], name)
        same = sorted(map(str, got)) == sorted(map(str, value)) if isinstance(got, set) and value else got == value
        if name != "peft_type" and value is not None and not same and bool(got) != bool(value):
            raise ProofError(f"{name}: {value!r} read as {got!r}")


# Examples


def prove_examples(name: str) -> Callable[[Path, Path], None]:
    def read(work: Path, seeds: Path) -> None:
        from ntkengine.inputs.examples import read_examples, tokenize

        path = work / name
        found = read_examples(path)
        lines = re.split(r"\r\n|\r|\n", path.read_bytes().decode("utf-8-sig"))
        if not len(found.texts) == len(found.labels) == len(found.ids) > 0:
            raise ProofError("lengths differ")
        for text, label, where in zip(found.texts, found.labels, found.ids, strict=True):
            shown = found.label_names[label]
            if not isinstance(text, str) or not text.strip() or not 0 <= label < len(found.label_names):
                raise ProofError(f"{where}: {text!r}, {label!r}")
            if name.endswith("tsv"):
                line = lines[int(where.rpartition(":")[2]) - 1].split("\t")
                if text not in line or not any(_same(shown, part) for part in line):
                    raise ProofError(f"{where}: {text!r} is not in {line!r}")
            elif name.endswith("jsonl"):
                row = json.loads(lines[int(where.rpartition(":")[2]) - 1])
                if row["text"] != text or not _same(shown, row["label"]):
                    raise ProofError(f"{where}: {text!r}, {shown!r} is not {row!r}")
        json.dumps([found.texts, found.label_names, found.ids], ensure_ascii=False).encode()
        with contextlib.suppress(InputError):
            tokenize(found, tokenizer=_tokenizer(seeds))

    return read


def _same(shown: str, given: Any) -> bool:
    return shown == str(given).strip() or (isinstance(given, float) and given.is_integer() and shown == str(int(given)))


_TOKENIZERS: dict[Path, Any] = {}


def _tokenizer(seeds: Path) -> Any:
    from transformers import AutoTokenizer

    if seeds not in _TOKENIZERS:
        _TOKENIZERS[seeds] = AutoTokenizer.from_pretrained(seeds / "model")
    return _TOKENIZERS[seeds]


# Rankings

_TAGS = "html head meta title style body h1 h2 h3 p section div table tr th td ul li figure img details summary"


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        del attrs
        self.seen.add(tag)


_EXPECTED = set(
    re.findall(r"\w+", "html head meta title style body h1 h2 h3 p section div table tr th td ul li figure img")
)


def prove_ranking(work: Path, seeds: Path) -> None:
    from ntkengine.report.html import render_report
    from ntkengine.report.selection import selection_section

    del seeds
    path = work / "ranking.json"
    section = selection_section(path)
    page = render_report([section])
    page.encode()
    tags = _Tags()
    tags.feed(page)
    if tags.seen - set(_TAGS.split()):
        raise ProofError(f"tags {tags.seen}")
    raw = json.loads(path.read_text(encoding="utf-8"))
    if [row[0] for row in section.tables[0].rows] != [str(c["name"]) for c in raw["choices"]]:
        raise ProofError("other names than in the file")


# Weights


def prove_safetensors(work: Path, seeds: Path) -> None:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from ntkengine.inputs.weights import entries

    del seeds
    tensors = {name: entry.read() for name, entry in entries(work).items()}
    try:
        wanted = load_file(work / "model.safetensors")
    except SafetensorError as error:
        raise ProofError(f"the library refuses it: {error}") from error
    if tensors.keys() != wanted.keys():
        raise ProofError("other names than the library reads")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape or not torch.equal(
            tensor.view(-1).view(torch.uint8), wanted[name].reshape(-1).view(torch.uint8)
        ):
            raise ProofError(f"{name}: other values than the library reads")


def prove_model(*, stream: bool) -> Callable[[Path, Path], None]:
    def read(work: Path, seeds: Path) -> None:
        import torch
        from safetensors.torch import load_file

        from ntkengine.inputs.models import load_model

        del seeds
        model = load_model(work / "model", stream=stream)
        wanted = load_file(work / "model" / "model.safetensors")
        for name, tensor in model.state_dict().items():
            if name in wanted and wanted[name].dtype == tensor.dtype and not torch.equal(tensor, wanted[name]):
                raise ProofError(f"{name}: other values than in the file")

    return read


# What an unfinished job leaves


def prove_checkpoint(work: Path, seeds: Path) -> None:
    from ntkengine.store.checkpoints import load, read_parts

    name = "rank-0000-of-0001.a"
    saved, whole = load(work / name), load(seeds / name)
    parts, wanted = list(read_parts(saved)), list(read_parts(whole))
    if saved.state != whole.state or len(parts) != len(wanted):
        raise ProofError("another state")
    for part, sound in zip(parts, wanted, strict=True):
        if not np.array_equal(part.values, sound.values):
            raise ProofError("other sums")
    store.load_newest(work)


def prove_progress(work: Path, seeds: Path) -> None:
    from ntkengine.report.tables import progress_table

    del seeds
    parts = store.parts_of(work / "k.h5")
    parts.mkdir()
    shutil.move(work / "progress.json", parts / "progress.json")
    found = store.read_progress(work / "k.h5")
    if found is not None:
        progress_table(found)
        json.dumps(found, ensure_ascii=False).encode()
