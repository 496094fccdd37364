"""`ntkengine gram` from flags; bad models, examples and files exit with 2 and leave nothing behind."""

from __future__ import annotations

import json

import pytest

from tests.tiny import save_tiny, tiny_sentences


@pytest.fixture
def data(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        path.write_text("sentence\tlabel\n" + "".join(f"{a}\t{b}\n" for a, b in rows), encoding="utf-8")
        return path

    rows = [(text, "ab"[i % 2]) for i, text in enumerate(tiny_sentences(9, 0))]
    return write, rows


def test_gram_from_flags_then_read(run, model_folder, data, tmp_path):
    write, rows = data
    train, held = write("train.tsv", rows), write("dev.tsv", rows[:5])
    flags = [
        "--model", model_folder, "--data", train, "--eval", held, "--text-column", "sentence", "--peft", "lora",
        "--target", "query,value", "--rank", 2, "--readout", "margin", "--out", tmp_path / "k.h5",
    ]  # fmt: skip
    code, out, err = run("plan", *flags, "--json")
    assert code == 0
    assert json.loads(out)["samples"] == 14
    code, out, err = run("gram", *flags, "--json")
    assert code == 0
    told = json.loads(out)
    assert told["shapes"]["values"] == [9, 9]
    assert told["meta"]["settings"]["model"]["peft"] == {
        "peft_type": "LORA", "r": 2, "target_modules": ["query", "value"],
    }  # fmt: skip
    assert "error" not in err
    code, out, _ = run("gram", *flags)
    assert code == 0
    assert out.rstrip().endswith(f"{tmp_path / 'k.h5'} was complete already: nothing was computed")
    assert "time (s)" not in out
    trained = tmp_path / "adam.toml"
    trained.write_text('[finetune]\noptimizer = "adam"\nlearning_rate = 1e-3\n')
    assert "- forecast does not simulate the training of [finetune]" in run("gram", trained, *flags)[1]
    code, out, err = run("gram", *flags, "--precision", "exact")
    assert (code, out) == (2, "")
    assert "gram.precision is 'high' there, 'exact' here" in err
    assert run("forecast", tmp_path / "k.h5", "--json")[0] == 0
    assert run("plan", *flags)[1].count("lora_") >= 2


def test_a_job_opens_in_another_folder_and_is_forecast_as_what_it_is(run, data, tmp_path):
    write, rows = data
    here = tmp_path / "here"
    here.mkdir()
    save_tiny(here / "model", kind="bert")
    for name, part in (("train.tsv", rows), ("dev.tsv", rows[:5]), ("other.tsv", rows[2:])):
        write(f"here/{name}", part)
    job = (
        'out = "k.h5"\n[model]\npath = "model"\n[data]\ntrain = "train.tsv"\neval = "dev.tsv"\ntext = "sentence"\n'
        '[gram]\nreadout = "margin"\nparams = "*.layer.0.*"\n'
    )
    (here / "job.toml").write_text(job)
    assert run("gram", here / "job.toml")[0] == 0
    there = tmp_path / "there"
    here.rename(there)
    for flags in ((), ("--device", "cpu")):
        code, out, err = run("gram", there / "job.toml", *flags)
        assert (code, "nothing was computed" in out) == (0, True), err
    assert run("forecast", there / "job.toml")[0] == 0
    for old, new, name in (("train.tsv", "other.tsv", "data.train"), ("margin", "logits", "gram.readout")):
        (there / "job.toml").write_text(job.replace(old, new))
        code, out, err = run("forecast", there / "job.toml")
        assert (code, out) == (2, "")
        assert f"holds another job: {name} is" in err
    (there / "job.toml").write_text(job.replace("train.tsv", "other.tsv"))
    assert run("gram", there / "job.toml")[0] == 2


def _no_weights(folder):
    (folder / "model.safetensors").unlink()


def _pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def _nan(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[0]
    weights[name].view(-1)[0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("spoil", [_no_weights, _pickled, _nan])
def test_bad_models_exit_2_and_leave_nothing(run, data, tmp_path, spoil):
    write, rows = data
    save_tiny(tmp_path / "m", kind="bert")
    spoil(tmp_path / "m")
    refused(run, tmp_path, write("train.tsv", rows), tmp_path / "m")


BAD_ROWS = {
    "empty text": lambda rows: [*rows, (" ", "a")],
    "one class": lambda rows: [(text, "a") for text, _ in rows],
    "nothing": lambda rows: [],
    "missing label": lambda rows: [*rows, ("word", "")],
    "too long": lambda rows: [*rows, (" ".join([rows[0][0]] * 400), "a")],
}


@pytest.mark.parametrize("spoil", BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_bad_examples_exit_2_and_leave_nothing(run, data, model_folder, tmp_path, spoil):
    write, rows = data
    refused(run, tmp_path, write("train.tsv", spoil(rows)), model_folder)


def test_bad_files_and_columns_exit_2_and_leave_nothing(run, data, model_folder, tmp_path):
    write, rows = data
    train = write("train.tsv", rows)
    refused(run, tmp_path, tmp_path / "none.tsv", model_folder, says="none.tsv")
    refused(run, tmp_path, train, tmp_path / "none")
    refused(run, tmp_path, train, model_folder, "--text-column", "txt", says="txt")
    refused(run, tmp_path, train, model_folder, "--label-column", "y", says="y")
    refused(run, tmp_path, train, model_folder, "--limit", "0", says="limit")
    refused(run, tmp_path, train, model_folder, "--eval", write("dev.tsv", [*rows, ("word", "c")]), says="'c'")
    refused(run, tmp_path, train, model_folder, "--backend", "cuda", says="'triton', 'torch'")
    refused(run, tmp_path, train, model_folder, "--peft", "lora", "--target", "nothing", says="nothing")


def refused(run, folder, train, model, *more, says=""):
    before = sorted(path.name for path in folder.iterdir())
    base = ["--model", model, "--data", train, "--out", folder / "k.h5"]
    column = [] if "--text-column" in more else ["--text-column", "sentence"]
    code, out, err = run("gram", *base, *column, *more)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: ")
    assert says in err
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--peft", "lorra"], "peft.peft_type: expected one of"),
        (["--dtype", "float23"], "dtype: expected one of float32"),
        (["--device", "tpu9"], "device: 'tpu9' cannot be used here"),
        (["--num-labels", "0"], "num_labels: expected an integer >= 1, got 0"),
        (["--num-labels", "1"], "model.num_labels: expected at least 2"),
        (["--head-ridge", "best"], "--head-ridge: expected 'loo' or a number > 0, got 'best'"),
        (["--memory-gib", "-1"], "memory_gib: expected a number > 0, got -1.0"),
        (["--checkpoint-s", "-1"], "checkpoint_s: expected a number of seconds"),
        (["--data", "none.tsv"], "none.tsv: no such file"),
        (["--text-column", "sentense"], "train.tsv:1: no column 'sentense'; did you mean 'sentence'?"),
        (["--model", "none/"], "none: no such model directory"),
        ([], "k.h5 holds another job: "),
    ],
)
def test_mistakes_are_told_before_a_file_of_another_job(run, data, model_folder, gram_file, tmp_path, flags, message):
    write, rows = data
    (tmp_path / "k.h5").write_bytes(gram_file.read_bytes())
    usual = {"--model": model_folder, "--data": write("train.tsv", rows), "--text-column": "sentence"}
    usual |= {"--readout": "margin", "--out": tmp_path / "k.h5"} | dict(zip(flags[::2], flags[1::2], strict=True))
    code, out, err = run("gram", *(word for pair in usual.items() for word in pair))
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert message in err
