"""Checks where whole gradients would not fit: a few numbers of every one, and they tell a wrong one."""

from __future__ import annotations

import re
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import ntkengine as ntk
from ntkengine.errors import CheckFailed
from ntkengine.gram import truth as truths
from ntkengine.gram.check import Check
from ntkengine.gram.planning import planned
from ntkengine.gram.task import Task
from ntkengine.inputs import streaming
from ntkengine.inputs.running import evaluation
from ntkengine.tangents.factors import Dense
from ntkengine.tangents.passes import Passes
from tests import zoo
from tests.brute import tiny_inputs, tiny_model


@contextmanager
def checking(model, inputs, **settings):
    """A check of a job whose gradients fit one parameter at a time."""
    given = {"readout": "logits", "params": "all", "contraction": "trace", "transform": "sgd"} | settings
    task = Task.prepare(model, inputs, None, None, **given, precision="high", backend="torch")
    with evaluation(task.model):
        structure, _, layout, samples, _ = planned(task, "high", False, None, 0)
        yield Check(task, samples, task.frame(structure.outputs), structure, 0, layout)


@pytest.fixture
def reduced(monkeypatch):
    monkeypatch.setattr(truths, "PASSES", 1)
    monkeypatch.setattr(truths, "grouped", lambda entries, _limit: [[name] for name in entries])


@pytest.mark.usefixtures("reduced")
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("transform", ["sgd", "sign"])
def test_every_parameter_is_compared_and_a_wrong_one_named(monkeypatch, name, transform):
    model = tiny_model(name)
    inputs = tiny_inputs(model, zoo.LENGTHS, 12)
    with checking(model, inputs, transform=transform) as truth:
        assert len(truth.compared) + len(truth.sketches) == len(truth.selected)
        assert all(p.numel() <= 64 for n, p in truth.selected.items() if n in truth.compared[1:])
        assert any(truth.structure.transposed[n] for n in truth.sketches) == (name == "gpt2")
        assert any(n in truth.sketches for n in truths.tables(model))  # sparse
        truth.sweep()
        run, wrong = Passes.run, ""

        def turned(self, *given, **more):
            found = run(self, *given, **more)
            for use in found.get(wrong, ()):
                if isinstance(use, Dense):
                    use.g = use.g * 1.002
                else:
                    use.d = use.d * 1.002
            return found

        monkeypatch.setattr(Passes, "run", turned)
        for wrong in truth.structure.shapes:
            if wrong not in truth.structure.negligible:
                with pytest.raises(CheckFailed, match=re.escape(wrong) + ".*: differs from plain autograd"):
                    truth.sweep()


@pytest.mark.usefixtures("reduced")
@pytest.mark.parametrize("name", ["t5", "mixtral", "mamba", "cnn", "mlp"])
@pytest.mark.parametrize("transform", ["sgd", "asymmetric-sign"])
def test_right_jobs_pass(name, transform):
    model = zoo.model(name)
    given = model, zoo.inputs(name, model, zoo.LENGTHS), zoo.READOUTS.get(name, "logits")
    with checking(*given[:2], readout=given[2], transform=transform) as truth:
        truth.sweep()
    assert ntk.compute_gram(*given[:2], readout=given[2], params="all", transform=transform).noise > 0


@pytest.mark.usefixtures("reduced")
def test_what_goes_wrong_in_batches_only_is_in_the_noise(monkeypatch):
    model, run, wrong = tiny_model("bert"), Passes.run, "bert.encoder.layer.0.attention.self.value.weight"
    inputs = tiny_inputs(model, zoo.LENGTHS * 6, 12)
    right = ntk.compute_gram(model, inputs, params="all")

    def left_out(self, segment, i, paths, *, last):
        found = run(self, segment, i, paths, last=last)
        if self.samples.chunks[i].n > 3 and wrong in found:
            found[wrong] = []
        return found

    monkeypatch.setattr(Passes, "run", left_out)
    gram = ntk.compute_gram(model, inputs, params="all")
    error = np.linalg.norm(gram.values - right.values, 2)
    assert 1e-4 < error / np.linalg.norm(right.values, 2) < 1e-2
    assert gram.noise > error


def test_a_streamed_model_is_compared_in_one_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "STREAMED", 256)
    loaded = tiny_model("llama")
    loaded.save_pretrained(tmp_path)
    model = ntk.load_model(tmp_path, num_labels=3, stream=True)
    inputs = tiny_inputs(model, zoo.LENGTHS, 12)
    passes = []
    grad = torch.autograd.grad

    def counted(f, inputs, *given, **more):
        passes.append(len(inputs))
        return grad(f, inputs, *given, **more)

    monkeypatch.setattr(truths, "grouped", lambda entries, _limit: [[name] for name in entries])
    with checking(model, inputs) as truth:
        monkeypatch.setattr(torch.autograd, "grad", counted)
        Check(truth.task, truth.task.samples, truth.frame, truth.structure, 0, truth.layout)
        assert passes == [len(truth.selected)] * 2 * 3  # for two examples and three outputs
        truth.sweep()
