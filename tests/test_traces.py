"""Writing to a weight what it held before is no change: PEFT does at every call; another value is, wherever it lies."""

from __future__ import annotations

import peft
import pytest
import torch

import ntkengine as ntk
from ntkengine.inputs.traces import Traces
from tests.brute import tiny_inputs, tiny_model

EQUAL_WRITES = {
    "coft": peft.OFTConfig(r=2, oft_block_size=0, coft=True, target_modules=["query"]),
    "target_parameters": peft.LoraConfig(r=2, target_modules=[], target_parameters=["0.attention.self.query.weight"]),
}
TENSORS = {
    "matrix": torch.randn(6, 4),
    "odd": torch.randn(5, 3),
    "columns of one": torch.randn(4, 2, 1),
    "vector": torch.randn(7),
    "number": torch.randn(()),
    "turned": torch.randn(6, 4).T,
    "half": torch.randn(6, 8).bfloat16(),
    "double": torch.randn(6, 3).double(),
    "complex": torch.randn(6, 3, dtype=torch.complex64),
    "whole": torch.randint(9, (6, 5)),
    "truths": torch.rand(6, 5) > 0.5,
}


@pytest.mark.parametrize("kind", EQUAL_WRITES)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_adapters_that_write_what_was_there_bring_no_warning(kind, caplog):
    model = peft.get_peft_model(tiny_model("bert"), EQUAL_WRITES[kind])
    versions = {name: p._version for name, p in model.named_parameters()}
    ntk.compute_gram(model, tiny_inputs(model, [3, 5, 4], 6))
    assert any(p._version != versions[name] for name, p in model.named_parameters())
    assert "forward pass wrote" not in caplog.text


@pytest.mark.parametrize("kind", TENSORS)
def test_a_write_is_told_where_it_changes_a_value(kind):
    for place in range(TENSORS[kind].numel()):
        tensor = TENSORS[kind].clone(memory_format=torch.preserve_format)
        traces = Traces({"t": tensor, "other": torch.ones(3)})
        assert traces.changed() == []
        tensor.copy_(tensor.clone())
        assert traces.changed() == []
        entry = tensor[tuple(int(i) for i in torch.unravel_index(torch.tensor(place), tensor.shape))]
        entry.copy_(entry == 0 if tensor.dtype == torch.bool else entry + 1)
        assert traces.changed() == ["t"]


@pytest.mark.parametrize("kind", ["matrix", "odd", "vector", "turned", "half", "double"])
def test_rows_that_change_places_are_told(kind):
    tensor = TENSORS[kind].clone(memory_format=torch.preserve_format)
    traces = Traces({"t": tensor})
    tensor.copy_(tensor.roll(1, 0))
    assert traces.changed() == ["t"]


def test_what_cannot_be_compared_counts_as_changed():
    tensor = torch.eye(3).to_sparse()
    traces = Traces({"t": tensor})
    assert traces.changed() == []
    tensor.mul_(1.0)
    assert traces.changed() == ["t"]


def test_of_large_tensors_any_write_counts():
    tensors = {"large": torch.randn(100, 100), "small": torch.randn(9)}
    traces = Traces(tensors, limit=1000)
    for tensor in tensors.values():
        tensor.mul_(1.0)
    assert traces.changed() == ["large"]
