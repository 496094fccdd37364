"""Examples of the help pages and shell completion: what they say is what the parser takes."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest
import typer

from ntkengine import cli
from ntkengine.choices import CHOICES
from ntkengine.helpexamples import EXAMPLES

APP = typer.main.get_command(cli.app)


def test_every_command_has_examples():
    assert set(EXAMPLES) == set(APP.commands)


@pytest.mark.parametrize("command", sorted(EXAMPLES))
def test_examples_are_shown_whole_and_parse(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    for what, line in EXAMPLES[command]:
        assert what in out
        assert line in out
        words = shlex.split(line.split("|")[0])
        words = words[words.index("ntkengine") + 1 :]
        assert words[0] == command
        APP.commands[command].make_context(command, words[1:])


def test_an_example_with_a_wrong_flag_would_fail():
    with pytest.raises(Exception, match="No such option"):
        APP.commands["gram"].make_context("gram", ["job.toml", "--precison", "exact"])


def test_every_flag_with_choices_completes_them():
    seen = set()
    for command in APP.commands.values():
        for option in command.params:
            for name in set(option.opts) & set(CHOICES):
                seen.add(name)
                found = option.shell_complete(command.make_context("x", [], resilient_parsing=True), "")
                assert tuple(item.value for item in found) == CHOICES[name], (command.name, name)
    assert seen == set(CHOICES)


def complete(*words):
    """Return what bash is told after these words, the last one being typed."""
    environment = os.environ | {
        "COMP_WORDS": " ".join(("ntkengine", *words)),
        "COMP_CWORD": str(len(words)),
        "_NTKENGINE_COMPLETE": "complete_bash",
    }
    done = subprocess.run(
        [sys.executable, "-m", "ntkengine"], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_bash_completes_commands_flags_and_values():
    assert complete("fo") == ["forecast"]
    assert complete("gram", "--contr") == ["--contraction"]
    assert complete("gram", "job.toml", "--readout", "lo") == ["logits", "loss"]
    assert complete("gram", "--data", "tr") == []  # nothing of ours: bash goes on with file names


def test_the_script_for_bash_falls_back_to_file_names():
    # The shell is asked for by the process that started us.
    command = f"{shlex.quote(sys.executable)} -m ntkengine --show-completion; exit $?"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "complete -o default" in done.stdout
    assert "_NTKENGINE_COMPLETE=complete_bash" in done.stdout


def test_choices_are_the_registries():
    import peft

    from ntkengine import prompts
    from ntkengine.forecast import candidates
    from ntkengine.gram.backend import BACKENDS
    from ntkengine.gram.frame import CONTRACTIONS
    from ntkengine.gram.transforms import TRANSFORMS
    from ntkengine.inputs import models, readout
    from ntkengine.recipe import _CHOICES

    assert set(CHOICES["--readout"]) == set(readout.NAMED_READOUTS)
    assert CHOICES["--contraction"] == CONTRACTIONS
    assert CHOICES["--transform"] == TRANSFORMS
    assert CHOICES["--backend"] == BACKENDS
    assert CHOICES["--subsets"] == candidates.SUBSETS
    assert CHOICES["--task"] == prompts.TASKS == tuple(models._TASKS)[:3]
    assert set(CHOICES["--dtype"]) == set(models._DTYPES)
    assert (CHOICES["--optimizer"], CHOICES["--loss"]) == (_CHOICES["optimizer"], _CHOICES["loss"])
    assert {name.upper() for name in CHOICES["--peft"]} <= {kind.value for kind in peft.PeftType}


@pytest.mark.parametrize("name", ["--precision", "--contraction", "--transform", "--backend"])
def test_choices_are_what_a_call_takes(name):
    from ntkengine.errors import InputError
    from ntkengine.gram.task import refuse

    usual = {"transform": "sgd", "precision": "high", "backend": "torch", "contraction": "trace"}
    for value in CHOICES[name]:
        if value != "triton":
            refuse(**(usual | {name[2:]: value}), inputs2=None, eval_inputs=None)
    with pytest.raises(InputError, match=name[2:]):
        refuse(**(usual | {name[2:]: "none"}), inputs2=None, eval_inputs=None)


@pytest.mark.parametrize(("command", "flag"), [("select", "--precision"), ("finetune", "--memory-gib")])
def test_flags_of_a_gram_are_not_those_of_commands_that_make_none(run, command, flag):
    shown = run(command, "--help")[1]
    assert flag not in shown
    assert "--out" not in shown
    assert "--readout" in shown
    assert "--out" not in run("plan", "--help")[1]
    assert "--out" in run("gram", "--help")[1]
    value = {"--precision": "exact", "--memory-gib": "1"}[flag]
    code, _, err = run(command, "--model", "m", "--data", "d.tsv", flag, value)
    assert (code, err) == (2, f"error: {flag}: is of a Gram, {command} has no use for it\n")


def test_what_other_libraries_warn_of_is_left_out():
    warned = "import logging; logging.getLogger('torchao').warning('x')"
    code = f"from ntkengine import cli; cli.options(verbose=False); {warned}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_version_is_told(run):
    import ntkengine

    assert run("--version")[:2] == (0, f"{ntkengine.__version__}\n")
