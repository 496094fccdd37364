"""A seeded slice of the campaign of malformed inputs, and the faults it has found, one by one."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.fuzzing.campaign import run_campaign
from bench.fuzzing.readers import READERS
from bench.fuzzing.seeds import JOB, make_seeds
from ntkengine.errors import InputError
from ntkengine.inputs.examples import read_examples
from ntkengine.inputs.models import load_model
from ntkengine.inputs.weights import entries
from ntkengine.jobfile import read_job
from ntkengine.report.html import render_report
from ntkengine.report.selection import selection_section
from ntkengine.store import parts_of, read_progress
from tests.tiny import edit_config, save_tiny


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    return make_seeds(tmp_path_factory.mktemp("malformed") / "seeds")


def test_sound_inputs_are_read_and_proven(seeds, tmp_path, monkeypatch):
    for k, (name, reader) in enumerate(READERS.items()):
        if name == "reading commands":  # runs the other tests' commands
            continue
        work = tmp_path / str(k)
        work.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr("bench.fuzzing.readers.broken", lambda raw, *_: raw)
            patch.setattr("bench.fuzzing.readers.broken_json", lambda text, _: text)
            replace(reader, structured=None).damage(work, seeds, np.random.default_rng(0))
        reader.read(work, seeds / reader.home)


def test_a_slice_of_the_campaign(seeds, tmp_path):
    heavy = {"reading commands": 2, "peft JSON": 4, "model folder": 4, "model folder, streamed": 4}
    counts = {name: heavy.get(name, round(300 * reader.share)) for name, reader in READERS.items()}
    tallies = run_campaign(counts, seeds, tmp_path, seed=7)
    assert {name: t.faults for name, t in tallies.items() if t.faults} == {}
    assert {name: t.inputs for name, t in tallies.items()} == counts
    assert sum(t.outcomes["read"] for t in tallies.values()) > 10


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("folds = 3", "folds = " + "9" * 5000),
        ("folds = 3", "folds = " + "[" * 3000),
        ("folds = 3", "folds = " + "[" * 70 + "]" * 70),
        ("fit = true", "fit = {}"),
        ('train = "x.tsv"', r'train = "\u0000"'),
        ("ridge = 0.5", "ridge = " + "9" * 400),
        ("r = 2", "r = 1979-05-27"),
        ('path = "model"', 'path = "~nobody-here/x"'),
        ('train = "x.tsv"', 'train = "~nobody-here/x"'),
        ('path = "model"', f'path = "./{"x" * 300}"'),
    ],
)
def test_job_files_are_refused_in_one_line(tmp_path, old, new):
    assert old in JOB
    (tmp_path / "job.toml").write_text(JOB.replace(old, new))
    with pytest.raises(InputError, match=r"job\.toml: ") as caught:
        read_job(tmp_path / "job.toml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 3000, "[" * 70 + "]" * 70, r'"\ud800"'])
def test_json_that_no_text_can_hold(tmp_path, value):
    (tmp_path / "x.jsonl").write_text(f'{{"text": "a", "label": 1}}\n{{"text": "b", "label": {value}}}\n')
    with pytest.raises(InputError, match=r"x\.jsonl:2: malformed JSON"):
        read_examples(tmp_path / "x.jsonl")


def ranking(seeds, path, **changes):
    found = json.loads((seeds / "ranking.json").read_text())
    found["choices"][0] |= changes
    path.write_text(json.dumps(found))
    return path


@pytest.mark.parametrize(
    "changes", [{"modules": 0.5}, {"train_loss": 10**400}, {"eval_loss": [0.1, 0.2, 0.3]}, {"eval_loss": [10**400] * 3}]
)
def test_rankings_that_are_none(seeds, tmp_path, changes):
    with pytest.raises(InputError, match="expected a ranking"):
        selection_section(ranking(seeds, tmp_path / "r.json", **changes))


def test_a_ranking_is_escaped_in_a_report(seeds, tmp_path):
    nasty = "<script>alert(1)</script>"
    path = ranking(seeds, tmp_path / "<b>&.json", name=nasty, modules=[nasty])
    html = render_report([selection_section(path)])
    assert "<script" not in html
    assert "<b>" not in html
    assert html.count("&lt;script&gt;") == 3


@pytest.mark.parametrize(
    "change",
    [
        {"shape": ["a", 2]}, {"shape": [-1, 2]}, {"shape": [10**9, 10**9]}, {"shape": 3}, {"dtype": 3},
        {"dtype": "F64"},
        {"data_offsets": [0]}, {"data_offsets": [16, 0]}, {"data_offsets": [0, 10**12]}, {"data_offsets": "ab"},
    ],
)  # fmt: skip
def test_headers_of_weights(tmp_path, change):
    header = json.dumps({"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | change}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(InputError, match="is not a safetensors file"):
        entries(tmp_path.glob("*.safetensors"))


def test_an_empty_tensor_is_read(tmp_path):
    save_file({"w": torch.zeros(0, 3)}, tmp_path / "model.safetensors")
    assert (
        entries(tmp_path.glob("*.safetensors"))["w"].read().shape
        == load_file(tmp_path / "model.safetensors")["w"].shape
        == (0, 3)
    )


@pytest.mark.parametrize(
    "told", ["[]", "3", '{"pid": 1}', '{"pid": 1, "host": "a", "total": []}', '{"pid": -1, "host": "a"}', "[" * 3000]
)
def test_progress_that_cannot_be_read_says_nothing(tmp_path, told):
    parts = parts_of(tmp_path / "k.h5")
    parts.mkdir()
    (parts / "progress.json").write_text(told)
    assert read_progress(tmp_path / "k.h5") == {"running": False, "checkpoint": None, "damaged": False}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": [1]}, "peft"),
        ({"target_modules": ["query"], "bias": ["a"]}, "peft"),
        ({"target_modules": ["query"], "r": 10**9}, "peft.r: expected at most .*, the model's widest layer"),
    ],
)
def test_adapters_that_cannot_be(seeds, fields, message):
    with pytest.raises(InputError, match=message):
        load_model(seeds / "model", peft={"peft_type": "LORA", **fields})


@pytest.mark.parametrize("stream", [False, True])
def test_a_models_own_code_is_not_run_unless_asked(tmp_path, stream):
    path = save_tiny(tmp_path / "m")
    edit_config(
        path, model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForSequenceClassification": "own.M"}
    )
    (path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match="pass trust_remote_code if you trust it"):
        load_model(path, stream=stream)
    assert not (tmp_path / "ran").exists()
    (path / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(path, stream=stream)


def test_a_refusal_is_one_line_that_a_terminal_can_show():
    shown = str(InputError("x.csv:\n3: \x1b[31m\u2028red\ud800 é"))
    assert shown == r"x.csv: 3: \x1b[31m\u2028red\ud800 é"
