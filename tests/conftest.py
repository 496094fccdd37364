"""`--slow` also runs the tests that take minutes and fetch a model; without a GPU, kernels run in the interpreter."""

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
