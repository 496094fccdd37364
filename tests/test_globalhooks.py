"""Hooks that run in every module of the process are part of what a stored file was computed from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

import ntkengine as ntk
from ntkengine.errors import InputError
from ntkengine.inputs.fingerprint import fingerprint_model


def doubling(module, _args, out):
    return 2 * out if isinstance(module, nn.Linear) else None


def tripling(module, _args, out):
    return 3 * out if isinstance(module, nn.Linear) else None


@pytest.fixture
def job():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    return model, {"x": torch.randn(6, 3)}


def test_a_stored_file_is_not_taken_for_that_of_another_hook(job, tmp_path):
    model, inputs = job
    without = np.asarray(ntk.compute_gram(model, inputs, params="all", out=tmp_path / "without.h5"))
    handle = register_module_forward_hook(doubling)
    try:
        with pytest.raises(InputError, match="holds another job: model"):
            ntk.compute_gram(model, inputs, params="all", out=tmp_path / "without.h5")
        hooked = np.asarray(ntk.compute_gram(model, inputs, params="all", out=tmp_path / "hooked.h5"))
        assert not np.allclose(hooked, without)
        again = np.asarray(ntk.compute_gram(model, inputs, params="all", out=tmp_path / "hooked.h5"))
        assert np.array_equal(again, hooked)
    finally:
        handle.remove()
    with pytest.raises(InputError, match="holds another job: model"):
        ntk.compute_gram(model, inputs, params="all", out=tmp_path / "hooked.h5")


def test_hooks_are_told_apart_and_those_of_torch_only_watch(job):
    model, _ = job
    found = [fingerprint_model(model)]
    for hook in (doubling, tripling):
        handle = register_module_forward_hook(hook)
        found.append(fingerprint_model(model))
        handle.remove()
    assert len(set(found)) == 3
    with FlopCounterMode(display=False):
        assert fingerprint_model(model) == found[0]
