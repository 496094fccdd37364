"""The pages of `docs/` and the README: examples run as printed, the file format is what is written, no dead links."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

import ntkengine as ntk
from ntkengine import gramfiles, store
from ntkengine.jobfile import make_job
from tests.test_shards import CUTS, make, sharded
from tests.tiny import save_tiny, tiny_sentences

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


def test_api_page_is_what_the_docstrings_say():
    made = runpy.run_path(str(ROOT / "scripts" / "api_docs.py"))["Reference"](ntk).page()
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == made


def test_page_of_the_job_file_is_what_the_docstrings_say():
    made = runpy.run_path(str(ROOT / "scripts" / "job_docs.py"))["page"]()
    assert (ROOT / "docs" / "job-file.md").read_text(encoding="utf-8") == made


JSON = {  # what is printed, by the heading that has its keys
    "gram, info": ("info all.h5",),
    "verify": ("verify all.h5", "verify all.h5 --repair"),
    "plan": ("plan job.toml --ranks 2",),
    "spectrum": ("spectrum all.h5",),
    "ridge": ("ridge all.h5",),
    "compare": ("compare all.h5 other.h5",),
    "forecast": ("forecast all.h5", "gram job.toml", "forecast job.toml"),
    "select": ("select job.toml --repeats 1",),
    "finetune": ("finetune job.toml --epochs 1 --linear",),
    "doctor": ("doctor",),
    "doctor --model": ("doctor --model MODEL_DIR",),
}


@pytest.fixture(scope="module")
def json_page():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        made = runpy.run_path(str(ROOT / "scripts" / "json_docs.py"))
        return {"page": made["page"](), "shapes": made["shapes"]()}


def test_page_of_json_is_what_the_docstrings_say(json_page):
    assert (ROOT / "docs" / "json.md").read_text(encoding="utf-8") == json_page["page"]


def without_a_line(found, heading, shapes):
    """Yield the keys of a printed object, and of those in it, that the page has no line for."""
    shape = shapes[heading]
    if shape.every:
        for item in found.values():
            yield from without_a_line(item, shape.every, shapes)
        return
    for key, value in found.items():
        if key not in shape.rows:
            yield f"{heading}: {key}"
            continue
        for one in value if isinstance(value, list) else [value]:
            if not isinstance(one, dict) or key in shape.free:
                continue
            if key in shape.inner:
                yield from without_a_line(one, shape.inner[key], shapes)
            else:  # a few keys, named in the line
                yield from (f"{heading}: {key}.{name}" for name in one if f"`{name}`" not in shape.rows[key])


@pytest.mark.parametrize("heading", JSON)
def test_every_key_of_json_has_a_line(heading, json_page, job_folder, tmp_path, monkeypatch, run):
    for item in job_folder.iterdir():
        (tmp_path / item.name).symlink_to(item)
    shutil.copy(job_folder / "all.h5", tmp_path / "other.h5")
    monkeypatch.chdir(tmp_path)
    shapes, printed = json_page["shapes"], set()
    for words in JSON[heading]:
        code, out, errors = run(*shlex.split(words), "--json")
        assert code == 0, errors
        found = json.loads(out)
        if heading.split(",")[0] == "forecast" and words.startswith("gram"):
            assert list(without_a_line(found, "gram, info", shapes)) == []
            continue
        assert list(without_a_line(found, heading, shapes)) == []
        printed |= set(found)
    assert shapes[heading].every or printed == set(shapes[heading].rows)


def test_every_key_of_an_unfinished_job_has_a_line(json_page, tmp_path, run):
    with store.Folder(tmp_path / "k.h5") as folder:
        folder.tell({"done": 25.0, "total": 100.0, "stage": "layer.3", "started": 1.0})
        found = json.loads(run("info", tmp_path / "k.h5", "--json")[1])
    assert set(found) == set(json_page["shapes"]["info of a job that is not complete"].rows)


def anchors(text):
    """Return the anchors of a page's headings, as a reader on the web has them."""
    found: list[str] = []
    for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        again = sum(re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", one) is not None for one in found)
        found.append(f"{anchor}-{again}" if again else anchor)
    return found


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there.read_text(encoding="utf-8")), target


def test_the_readme_has_at_most_100_lines():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 100


def test_every_page_is_in_the_index():
    text = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", text))
    assert linked == {page.name for page in PAGES} - {"README.md"}


# The file format -----------------------------------------------------------------------------------------------------


def table(text: str, heading: str) -> Iterator[tuple[list[str], list[str]]]:
    """Yield (names in the first cell, all cells) of the tables after a heading, or after a line that starts so."""
    part = text.split(f"\n{heading}", 1)[1]
    part = re.split(r"\n## |\n`/json/|\nA shard has", part[1:])[0]
    for line in part.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        names = re.findall(r"`([^`]+)`", cells[0])
        if line.startswith("|") and names:
            yield names, cells


def described(text: str, heading: str) -> tuple[dict[str, tuple[str, frozenset[str]]], set[str]]:
    """Return (kind and attributes by dataset or group, the root's attributes) that the page tells after a heading."""
    inside, root = {}, set()
    for names, cells in table(text, heading):
        if not names[0].startswith("/"):
            root |= set(names)
            continue
        kind = re.sub("`", "", cells[2]) or "group"
        inside |= {name: (kind, frozenset(re.findall(r"`(\w+)`", cells[3]))) for name in names}
    return inside, root


def found_in(path: Path) -> tuple[dict[str, tuple[str, frozenset[str]]], set[str]]:
    """Return the same of what is in a file."""
    inside = {}

    def note(name: str, item: h5py.Group | h5py.Dataset) -> None:
        kind = "group"
        if isinstance(item, h5py.Dataset):
            kind = "string" if h5py.check_string_dtype(item.dtype) else str(item.dtype)
        inside["/" + re.sub(r"(modules|crosses)/\d+", r"\1/<i>", name)] = kind, frozenset(item.attrs)

    with h5py.File(path) as file:
        file.visititems(note)
        return inside, set(file.attrs)


def text_of(path: Path, name: str) -> dict:
    with h5py.File(path) as file:
        return json.loads(file[f"json/{name}"].asstr()[()])


@pytest.fixture(scope="module")
def format_page() -> str:
    return (ROOT / "docs" / "file-format.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shards") / "k.h5"
    sharded(path, make())
    return path


def test_file_format_names_all_that_is_written(format_page, job_folder, shards):
    whole, whole_root = found_in(job_folder / "all.h5")
    assert {name for name, _ in whole.items() if name.startswith("/extras/")} == {
        f"/extras/{name}" for name in ("fold", "fold_grams", "fold_outputs", "head_weights")
    }
    over, over_root = found_in(shards)
    inside, _ = described(format_page, "## Datasets and groups")
    assert inside == whole | {"/json/shards": over["/json/shards"]}
    assert over.items() <= inside.items()
    _, root = described(format_page, "## Attributes of the root")
    assert root == whole_root
    assert over_root == root - {"sketch"}
    shard, shard_root = described(format_page, "A shard has")
    got, got_root = found_in(store.shard_path(shards, 0, len(CUTS) - 1))
    assert shard == got
    assert shard_root == got_root


def test_every_row_of_a_forecast_is_explained(job_folder):
    recipe = ntk.Recipe(learning_rate=1e-3, epochs=1)
    text = (ROOT / "docs" / "forecast.md").read_text(encoding="utf-8")
    told = [names[0] for names, _ in table(text, "## What each row means")]
    shown = [label for label, _ in gramfiles.forecast_file(job_folder / "all.h5", recipe=recipe).table()]
    assert told == list(dict.fromkeys(re.sub("^(share of trace, ).*", r"\1…", label) for label in shown))


def test_file_format_names_the_keys_of_its_texts(format_page, job_folder, shards):
    told = {
        name: {key for names, _ in table(format_page, f"`/json/{name}`") for key in names} for name in ("job", "meta")
    }
    assert told["job"] == set(text_of(job_folder / "all.h5", "job"))
    assert told["meta"] == set(text_of(job_folder / "all.h5", "meta")) | {"ranks"}  # of a job over several processes
    for fact in text_of(shards, "shards"):
        assert {key for names, _ in table(format_page, "## Sharded files") for key in names} == set(fact)
    plan = text_of(job_folder / "all.h5", "plan")
    assert set(plan) == set(ntk.Plan.__dataclass_fields__) | {"flops", "seconds"}


# Examples ------------------------------------------------------------------------------------------------------------


BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]*?) -->\n)?```(?P<kind>python|bash|toml)\n(?P<code>.*?)```", re.DOTALL)


def blocks(page: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (mark, kind, code) of a page's examples."""
    for found in BLOCK.finditer(page.read_text(encoding="utf-8")):
        yield found["mark"] or "", found["kind"], found["code"]


def commands(code: str) -> Iterator[list[str]]:
    """Yield the arguments of each call of `ntkengine` in a block for the shell."""
    lines = code.replace("\\\n", " ").replace(";", "\n").splitlines()
    for words in (shlex.split(line, comments=True) for line in lines):
        if "ntkengine" in words:
            yield words[words.index("ntkengine") + 1 :]


def parse(arguments: list[str]) -> None:
    """Have the command line read flags and arguments, and do nothing."""
    import typer

    from ntkengine import cli

    group = typer.main.get_command(cli.app)
    command = group.commands[arguments[0]]
    command.make_context(arguments[0], list(arguments[1:]))


def write_data(folder: Path) -> None:
    """Write what the pages call MODEL_DIR, train.tsv, dev.tsv, test.tsv and job.toml."""
    save_tiny(folder / "MODEL_DIR", head=False)
    for name, count, seed in (("train", 24, 0), ("dev", 16, 1), ("test", 10, 2)):
        texts = tiny_sentences(count, seed)
        rows = [f"{text}\t{('negative', 'positive')[i % 2]}" for i, text in enumerate(texts)]
        (folder / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    for mark, _, code in blocks(ROOT / "docs" / "tutorial.md"):
        if mark.startswith("file: "):
            (folder / mark.removeprefix("file: ")).write_text(code)


@pytest.fixture(scope="module")
def job_folder(tmp_path_factory) -> Path:
    """Return a folder with the small data, and `all.h5`: a Gram file with everything that a file may hold."""
    from ntkengine import cli

    folder = tmp_path_factory.mktemp("docs")
    write_data(folder)
    words = f"gram --model {folder}/MODEL_DIR --data {folder}/train.tsv --eval {folder}/dev.tsv --text-column sentence"
    words += f" --readout margin --params all --per-module --sketch 64 --out {folder}/all.h5"
    with pytest.raises(SystemExit) as stop:
        cli.main(shlex.split(words))
    assert stop.value.code == 0
    return folder


@pytest.mark.parametrize("kind", ["python", "bash", "toml"])
@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_run_as_printed(page, kind, job_folder, tmp_path, monkeypatch, run):
    found = [(mark, code) for mark, other, code in blocks(page) if other == kind]
    for item in job_folder.iterdir() if found else ():
        name = "k.h5" if page.name == "file-format.md" and item.name == "all.h5" else item.name
        (tmp_path / name).symlink_to(item)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for mark, code in found:
        assert not mark or re.match("file: .|not run: .|needs .", mark), mark
        needed = mark.removeprefix("needs ").split(", ") if mark.startswith("needs ") else []
        waits = mark.startswith("not run") or any(importlib.util.find_spec(name) is None for name in needed)
        if kind == "python":
            compiled = compile(code, page.name, "exec")
            if not waits:
                exec(compiled, names)
        elif kind == "toml":
            make_job(tomllib.loads(code))
        for arguments in commands(code) if kind == "bash" else ():
            if waits:
                parse(arguments)
                continue
            done, _, errors = run(*arguments)
            assert done == 0, (arguments, errors)


def test_marked_commands_are_parsed():
    parse(["gram", "job.toml", "--readout", "margin"])
    with pytest.raises(Exception, match="No such option"):
        parse(["gram", "job.toml", "--no-such-flag"])


def test_errors_of_the_faq_are_said_somewhere():
    text = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8").split("## Errors")[1]
    said = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    quoted = re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)
    assert len(quoted) > 10
    assert [words for words in quoted if words not in said] == []


def test_the_fetched_files_may_be_fetched_again(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from ntkengine import assets

    part = ntk.Examples(tiny_sentences(1000), np.arange(1000) % 2, ["negative", "positive"], [""] * 1000, "x")
    demo = SimpleNamespace(model_dir=save_tiny(tmp_path / "cached"), snippets=tmp_path / "texts")
    monkeypatch.setattr(assets, "fetch_demo", lambda: demo)
    monkeypatch.setattr(assets, "movie_snippets", lambda *_, **__: (part[:384], part))
    monkeypatch.chdir(tmp_path)
    mark, code = next((mark, code) for mark, kind, code in blocks(ROOT / "docs" / "tutorial.md") if kind == "python")
    assert mark.startswith("not run")
    for _ in range(2):
        exec(compile(code, "tutorial.md", "exec"), {})
    assert b"\r" not in (tmp_path / "train.tsv").read_bytes()
    assert ntk.read_examples("dev.tsv", text="sentence", label="label").label_names == ["negative", "positive"]
    assert (tmp_path / "MODEL_DIR" / "config.json").is_file()
