"""The command line: help, exit codes, one line of error."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from ntkengine import cli, gramcommand, gramfiles
from ntkengine.errors import CheckFailed, NonFinite, NotConverged, Stopped


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
        "compare",
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
        (["ridge", "none.h5", "--ridge", "best"], "--ridge: expected 'loo', 'gcv' or a number > 0, got 'best'"),
        (["forecast", "none.h5", "--ridge", "-1"], "--ridge: expected 'loo', 'gcv' or a number > 0, got -1.0"),
        (["spectrum", "none.h5", "--count", "0"], "--count: expected an integer >= 1, got 0"),
        (["spectrum", "none.h5", "--which", "XX"], "--which: expected one of 'LA', 'SA', 'BE', got 'XX'"),
        (["gram", "--model", "m", "--data", "a", "--head-ridge", "-1"], "--head-ridge: expected 'loo' or a number > 0"),
        (["demo", "--out", __file__], "test_cli.py: is a file, expected a folder"),
        (["gram", "--log-dir", __file__], "test_cli.py: is a file, expected a folder"),
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
        (Stopped(15, "the same command goes on from here"), 143),
    ],
)
def test_what_fails_is_one_line_with_its_code(run, monkeypatch, gram_file, raised, code):
    def fail(*_):
        raise raised

    monkeypatch.setattr(gramfiles, "forecast_file", fail)
    found, out, err = run("forecast", gram_file)
    assert (found, out, err.count("\n")) == (code, "", 1)
    assert err.startswith("error: ")
    assert code != 143 or err == "error: stopped by SIGTERM: the same command goes on from here\n"


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (Stopped(2), "interrupted"),
        (Stopped(2, "the same command goes on from here"), "interrupted: the same command goes on from here"),
    ],
)
def test_an_interruption_is_no_error(run, monkeypatch, gram_file, raised, told):
    def fail(*_):
        raise raised

    monkeypatch.setattr(gramfiles, "forecast_file", fail)
    assert run("forecast", gram_file) == (130, "", f"{told}\n")


def test_an_interrupted_job_says_whether_it_kept_anything(run, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise KeyboardInterrupt

    for name in ("jobs.run_gram", "selectjob.run_select", "finetunejob.run_finetune"):
        monkeypatch.setattr(f"ntkengine.{name}", fail)
    words = ("--model", "m", "--data", "a.tsv")
    out = tmp_path / "k.h5"
    told = "interrupted: the same command starts anew\n"
    assert run("gram", *words, "--out", out) == (130, "", told)
    (tmp_path / ".k.h5.parts").mkdir()
    (tmp_path / ".k.h5.parts" / "rank-0000-of-0001.a").touch()
    told = "interrupted: the same command goes on from its last checkpoint\n"
    assert run("gram", *words, "--out", out) == (130, "", told)
    for command in ("select", "finetune"):
        told = "interrupted: nothing was kept, the same command starts anew\n"
        assert run(command, *words, "--learning-rate", "1") == (130, "", told)


@pytest.mark.parametrize("verbose", [False, True])
def test_what_log_dir_keeps_is_shown_only_if_asked_for(verbose, monkeypatch, tmp_path, capsys):
    root, own = logging.getLogger(), logging.getLogger("ntkengine")
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(own, "handlers", [])
    level = root.level, own.level
    try:
        cli.options(verbose=verbose)
        gramcommand._log_to(tmp_path, 0)
        logging.getLogger("ntkengine.gram").info("chosen")
        logging.getLogger("ntkengine.gram").warning("odd")
        own.handlers[0].close()
    finally:
        root.setLevel(level[0])
        own.setLevel(level[1])
    told = capsys.readouterr().err
    assert ("chosen" in told, "odd" in told) == (verbose, True)
    kept = (tmp_path / "rank-0.log").read_text()
    assert "INFO ntkengine.gram: chosen" in kept
    assert "WARNING ntkengine.gram: odd" in kept


def test_a_bug_is_not_hidden(monkeypatch, gram_file):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(gramfiles, "forecast_file", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["forecast", str(gram_file)])


@pytest.mark.parametrize(
    ("shell", "code"),
    [
        ('"$@" 2>&-', 0),
        ('"$@" >&-', 0),
        ('"$@" >&- 2>&- <&-', 0),
        ('PYTHONIOENCODING=ascii "$@"', 0),
        ('PYTHONIOENCODING=latin-1 "$@" | iconv -f latin1', 0),
    ],
)
def test_streams_that_are_closed_or_lack_signs_lose_no_work(gram_file, shell, code):
    command = [sys.executable, "-m", "ntkengine", "info", str(gram_file)]
    done = subprocess.run(["bash", "-c", shell, "bash", *command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, "")
    assert ("gradient" in done.stdout) is (">&-" not in shell or "2>&-" in shell and " >&-" not in shell)


def test_json_alone_is_on_the_output_even_without_a_stream_of_errors(tmp_path):
    command = [sys.executable, "-m", "ntkengine", "info", str(tmp_path / "none.h5"), "--json"]
    done = subprocess.run(["bash", "-c", '"$@" 2>&-', "bash", *command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")


def test_a_reader_that_stops_early_is_no_error(gram_file):
    command = f"{sys.executable} -m ntkengine info {gram_file} | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "0"
