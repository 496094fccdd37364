"""`--slow` also runs the tests that take minutes and fetch a model; without a GPU, kernels run in the interpreter.

And the fixtures that several files use.
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports the kernels


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes and fetch a model")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="minutes long, fetches a model: run with --slow"))


@pytest.fixture
def run(capsys):
    """Return a call of the command line that gives (exit code, output, errors)."""
    from ntkengine import cli

    def call(*arguments):
        capsys.readouterr()  # what making the inputs printed
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return stop.value.code, shown.out, shown.err

    return call


@pytest.fixture(scope="session")
def gram_file(tmp_path_factory):
    """Return the file of a small Gram with all that a file may hold, for reading only."""
    from tests.tiny import compute_small

    path = tmp_path_factory.mktemp("gram") / "k.h5"
    compute_small(path)
    return path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """Return the directory of a tiny BERT, for reading only."""
    from tests.tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("models") / "bert", kind="bert")


@pytest.fixture
def contracted(monkeypatch):
    """Return the names of contracted parameters; `contracted.stop` ends the job at one of them, `act` does more."""
    from ntkengine.gram import run
    from tests.interrupted import Killed

    class Names(list):
        stop = None
        act = None

    names = Names()
    contract = run.contract

    def counted(factors, *args):
        if names.stop is not None and len(names) == names.stop:
            raise Killed
        names.append(factors.name)
        if names.act is not None:
            names.act()
        return contract(factors, *args)

    monkeypatch.setattr(run, "contract", counted)
    return names
