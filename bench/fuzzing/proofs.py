"""What each reader reads, and the proof that it is right: of a malformed input that is not refused.

A proof takes the working folder and that of the sound files. It lets the product's own errors through, and raises
`ProofError` when what was read is not what is in the file.
"""

from __future__ import annotations

import contextlib
import json
import re
import tomllib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from ntkengine.errors import InputError


class ProofError(AssertionError):
    """A reader took a malformed input for something it is not."""


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
    tensors = {name: entry.read() for name, entry in entries(work.glob("*.safetensors")).items()}
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
