"""The command line: exit codes, one line of error, pure JSON, nothing left behind."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
import torch

from ntkengine import cli, jobs
from ntkengine.errors import CheckFailed, NonFinite, NotConverged, Stopped
from ntkengine.gram.engine import compute_gram
from ntkengine.spectrum import condition_number, eigsh
from ntkengine.store import Folder, open_gram
from tests.brute import tiny_inputs, tiny_model
from tests.tiny import save_tiny, tiny_sentences


@pytest.fixture
def run(capsys):
    def call(*arguments):
        capsys.readouterr()  # what making the inputs printed
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return stop.value.code, shown.out, shown.err

    return call


@pytest.fixture(scope="module")
def gram_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gram") / "k.h5"
    model = tiny_model("bert", num_labels=2)
    lengths = [5, 3, 4, 6, 2, 7, 3]
    y = np.array([[-1.0], [1.0]])[[0, 1, 0, 1, 1, 0, 1]]
    compute_gram(
        model, tiny_inputs(model, lengths, 7), readout="margin", params="*.layer.*", targets=y, out=path,
        eval_inputs=tiny_inputs(model, [4, 5, 3], 5, seed=1), eval_targets=y[:3], per_module=True,
        job={"data": {"train": "train.tsv"}},
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "bert"
    save_tiny(path, kind="bert")
    return path


@pytest.fixture
def data(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        path.write_text("sentence\tlabel\n" + "".join(f"{a}\t{b}\n" for a, b in rows), encoding="utf-8")
        return path

    rows = [(text, "ab"[i % 2]) for i, text in enumerate(tiny_sentences(9, 0))]
    return write, rows


def test_help_is_quick_and_names_every_command():
    code = (
        "import sys; from ntkengine.cli import main\ntry: main(['--help'])\n"
        "finally: print([m for m in ('torch', 'numpy', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "[]"
    for name in (
        "plan",
        "gram",
        "info",
        "verify",
        "merge",
        "spectrum",
        "ridge",
        "forecast",
        "finetune",
        "report",
        "doctor",
        "demo",
    ):
        assert f" {name} " in done.stdout


@pytest.mark.parametrize("command", ["plan", "gram", "info", "spectrum", "finetune", "report", "demo"])
def test_every_command_has_help(run, command):
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert "Usage: ntkengine" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "No such command 'nothing'"),
        (["info"], "Missing argument"),
        (["info", "none.h5", "--bad"], "No such option: --bad"),
        (["spectrum", "none.h5", "-k", "x"], "Invalid value for '-k'"),
        (["info", "none.h5"], "none.h5: no such file"),
        (["verify", "none.h5"], "none.h5: no such file"),
        (["forecast", "none.toml"], "none.toml: no such file"),
        (["ridge", "none.h5", "--ridge", "best"], "ridge: expected 'loo', 'gcv' or a number, got 'best'"),
        (["report", "none.h5", "-o", "no/folder/r.html"], "folder no/folder does not exist"),
        (["gram", "--data", "a.tsv", "--out", "k.h5"], "--model: is missing"),
        (["gram", "--model", "m", "--out", "k.h5"], "--data: is missing"),
        (["gram", "--model", "m", "--data", "a.tsv"], "--out: is missing"),
        (["gram", "--model", "m", "--data", "a.tsv", "--rank", "8", "--out", "k.h5"], "--peft: is missing"),
        (["gram", "none.toml"], "none.toml: no such file"),
        (["finetune", "--model", "m", "--data", "a.tsv"], "finetune: is missing"),
        (
            ["finetune", "--model", "m", "--data", "a.tsv", "--epochs", "2"],
            "finetune: learning_rate: is missing",
        ),
        (["finetune", "--model", "m", "--data", "a.tsv", "--out", "k.h5"], "--out: is for a Gram"),
        (["finetune", "--model", "m", "--data", "a.tsv", "--learning-rate", "-1"], "learning_rate: out of range"),
        (["finetune", "--model", "m", "--data", "a.tsv", "--learning-rate", "1", "--save", "."], ".: is there already"),
        (["finetune", "--model", "m", "--data", "a", "--learning-rate", "1", "--history", "n/h"], "n/h: folder n does"),
        (["demo", "--train", "3"], "train: expected at least 10 examples, got 3"),
    ],
)
def test_bad_flags_are_one_line_and_exit_2(run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (CheckFailed("layer.0.weight\ndisagrees"), 1),
        (NonFinite("inf"), 1),
        (NotConverged("short"), 1),
        (OSError(28, "No space left on device"), 1),
        (MemoryError("8 GiB"), 1),
        (NotImplementedError("use 'sgd'"), 2),
        (FileNotFoundError(2, "No such file or directory", "x"), 2),
        (KeyboardInterrupt(), 130),
        (Stopped(15, "stopped by SIGTERM: the same command goes on from here"), 143),
        (Stopped(2), 130),
    ],
)
def test_what_fails_is_one_line_with_its_code(run, monkeypatch, gram_file, raised, code):
    def fail(*_):
        raise raised

    monkeypatch.setattr(jobs, "forecast_file", fail)
    found, out, err = run("forecast", gram_file)
    assert (found, out, err.count("\n")) == (code, "", 1)
    assert err.startswith("error: ")


def test_a_bug_is_not_hidden(monkeypatch, gram_file):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(jobs, "forecast_file", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["forecast", str(gram_file)])


def test_info_shows_everything(run, gram_file):
    code, out, err = run("info", gram_file)
    assert (code, err) == (0, "")
    for text in ("7 × 7 (trace, sgd)", "margin", "7 train, 3 eval", "job: data.train", "train.tsv", "share"):
        assert text in out
    assert "\x1b" not in out
    told = json.loads(run("info", gram_file, "--json")[1])
    assert told["shapes"]["values"] == [7, 7]
    assert told["shapes"]["cross"] == [3, 7]
    assert told["noise"] == open_gram(gram_file).noise
    assert told["meta"]["settings"] == {"data": {"train": "train.tsv"}}


def test_spectrum_json_is_the_spectrum(run, gram_file):
    code, out, _ = run("spectrum", gram_file, "-k", 3, "--json")
    told = json.loads(out)
    gram = open_gram(gram_file)
    ritz = eigsh(gram, k=3)
    assert code == 0
    np.testing.assert_allclose(told["values"], ritz.values, rtol=1e-12)
    assert told["condition"]["lower"] == condition_number(gram).lower
    assert len(run("spectrum", gram_file)[1].splitlines()) > 9
    assert run("spectrum", gram_file, "-k", 0)[0] == 2


def test_ridge_and_forecast_json(run, gram_file):
    found = jobs.forecast_file(gram_file)
    told = json.loads(run("ridge", gram_file, "--json")[1])
    np.testing.assert_allclose(told["loo_mse"], found.loo_mse, rtol=1e-12)
    assert told["ridge"] == found.ridge
    assert len(told["effective_dimension"]) == len(told["ridges"])
    told = json.loads(run("forecast", gram_file, "--json", "--ridge", "gcv")[1])
    assert told["ridge"] == found.ridge_gcv
    assert told["assumptions"] == found.assumptions
    code, out, _ = run("forecast", gram_file)
    assert code == 0
    assert f"- {found.assumptions[0]}" in out
    assert "chosen" in run("ridge", gram_file)[1]
    given = json.loads(run("ridge", gram_file, "--ridge", found.ridges[3], "--json")[1])
    assert given["ridge"] == pytest.approx(found.ridges[3])
    assert run("ridge", gram_file, "--ridge", "-1")[0] == 2


def test_forecast_takes_the_ridge_of_the_job_file(run, gram_file, tmp_path):
    job = tmp_path / "job.toml"
    tables = '[model]\npath = "m"\n[data]\ntrain = "a.tsv"\n[forecast]\nridge = "gcv"\n'
    job.write_text(f'out = "{gram_file}"\n' + tables)
    assert json.loads(run("forecast", job, "--json")[1])["ridge"] == jobs.forecast_file(gram_file, "gcv").ridge
    job.write_text(tables)
    code, _, err = run("forecast", job)
    assert (code, "out: is missing" in err) == (2, True)


def test_report_is_written(run, gram_file, tmp_path):
    code, out, err = run("report", gram_file, "-o", tmp_path / "r.html")
    assert (code, out.strip(), err) == (0, str(tmp_path / "r.html"), "")
    assert "data:image/png;base64," in (tmp_path / "r.html").read_text(encoding="utf-8")


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


def test_verify_repairs_or_opens_tiles_for_the_next_run(run, gram_file, tmp_path):
    damaged = tmp_path / "k.h5"
    damaged.write_bytes(gram_file.read_bytes())
    assert run("verify", damaged, "--repair") == (0, f"{damaged}: sound\n", "")
    with h5py.File(damaged, "r+") as file:
        file["gram"][0, 0] += 1.0
        file["cross"][0, 0] += 1.0
    code, out, err = run("verify", damaged, "--repair")
    assert (code, out) == (1, "")
    assert err == f"error: {damaged}: 0 tiles repaired, 2 opened: run the same job again to compute them\n"
    code, out, err = run("info", damaged)
    assert (code, err) == (0, "")
    assert "damaged tiles are open" in out
    model = tiny_model("bert", num_labels=2)
    call = {"readout": "margin", "params": "*.layer.*", "per_module": True, "job": {"data": {"train": "train.tsv"}}}
    y = np.array([[-1.0], [1.0]])[[0, 1, 0, 1, 1, 0, 1]]
    call |= {"eval_inputs": tiny_inputs(model, [4, 5, 3], 5, seed=1), "targets": y, "eval_targets": y[:3]}
    compute_gram(model, tiny_inputs(model, [5, 3, 4, 6, 2, 7, 3], 7), out=damaged, **call)
    assert run("verify", damaged, "--repair", "--json")[1] == json.dumps(
        {"path": str(damaged), "sound": True, "repaired": 0, "open": 0}
    ) + "\n"  # fmt: skip
    np.testing.assert_allclose(np.asarray(open_gram(damaged)), np.asarray(open_gram(gram_file)), rtol=1e-5)


def test_merge(run, gram_file, tmp_path):
    out = tmp_path / "one.h5"
    assert run("merge", gram_file, "-o", out, "--compress") == (0, f"{out}\n", "")
    np.testing.assert_array_equal(np.asarray(open_gram(out)), np.asarray(open_gram(gram_file)))
    code, _, err = run("merge", gram_file, "-o", out)
    assert (code, err) == (2, f"error: {out}: exists\n")


def test_info_of_a_running_job(run, tmp_path):
    path = tmp_path / "k.h5"
    with Folder(path) as folder:
        folder.tell({"done": 25.0, "total": 100.0, "stage": "layer.3", "started": time.time() - 60})
        code, out, err = run("info", path)
        assert (code, err) == (0, "")
        for text in ("Not complete", "running", "layer.3", "25%", "60 s ago"):
            assert text in out
        told = json.loads(run("info", path, "--json")[1])
    assert (told["complete"], told["running"], told["done"], told["checkpoint"]) == (False, True, 25.0, None)


def test_doctor(run):
    code, out, err = run("doctor", "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["torch"]["found"] == torch.__version__
    assert all(told[name]["note"] for name in ("python", "memory", "cores", "matplotlib", "mpi4py"))
    missing = [row for row in told.values() if row["note"].startswith("missing; would")]
    assert all("pip install" in row["note"] and row["found"] is None for row in missing)
    assert "Doctor" in run("doctor")[1]


def test_doctor_measures_batch_invariance(run, model_folder):
    code, out, err = run("doctor", "--model", model_folder, "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    exact, *others = told["invariance"]
    assert exact["precision"] == "float64"
    assert max(exact["batch"], exact["right"]) < 1e-12
    assert exact["left"] > 1e-3  # BERT counts positions from the first column
    assert "pad on the right" in told["advice"][0]
    for row in others:
        assert 0 < row["rounding"] < {"float32": 1e-4, "bfloat16": 0.5}[row["precision"]]
        assert row["batch"] < 20 * row["rounding"]
    assert {row["attention"] for row in others} == {"sdpa", "math"}
    code, out, err = run("doctor", "--model", model_folder)
    assert (code, err) == (0, "")
    assert "bfloat16" in out
    assert "pad on the right" in out
    code, out, err = run("doctor", "--model", "/none")
    assert (code, out) == (2, "")
    assert err.startswith("error: /none: no such model directory")


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
    assert run("gram", *flags)[0] == 0
    code, out, err = run("gram", *flags, "--precision", "exact")
    assert (code, out) == (2, "")
    assert "gram.precision is 'high' there, 'exact' here" in err
    assert run("forecast", tmp_path / "k.h5", "--json")[0] == 0
    assert run("plan", *flags)[1].count("lora_") >= 2


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


def test_a_reader_that_stops_early_is_no_error(gram_file):
    command = f"{sys.executable} -m ntkengine info {gram_file} | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "0"
