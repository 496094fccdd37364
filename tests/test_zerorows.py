"""A padding token's row of zeros that is trained is refused by its name, and the cures are none but cures."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ntkengine as ntk
from ntkengine.errors import CheckFailed
from tests.brute import contracted, gradients, relative_error


class Bag(nn.Module):
    """Adds up the embeddings of all tokens, padding too, whose row is zero."""

    def __init__(self, padding_idx=None, *, masked=False):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.out, self.masked = nn.Embedding(20, 8, padding_idx), nn.Linear(8, 1), masked
        with torch.no_grad():
            self.table.weight[0] = 0.0

    def forward(self, input_ids, attention_mask):
        h = self.table(input_ids)
        return self.out(torch.tanh((h * attention_mask[..., None] if self.masked else h).sum(1)))


@pytest.fixture
def inputs():
    mask = (torch.arange(7) < torch.tensor([3, 5, 2, 7, 4, 6])[:, None]).long()
    ids = torch.randint(1, 20, (6, 7), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids * mask, "attention_mask": mask}


def test_the_row_is_named(inputs):
    with pytest.raises(CheckFailed, match=r"table.weight .*: padding, whose row 0 of table.weight is zero .*_idx=0"):
        ntk.compute_gram(Bag(), inputs, params="all")


@pytest.mark.parametrize("cured", [{"padding_idx": 0}, {"masked": True}], ids=str)
def test_the_cures_are_cures(inputs, cured):
    model = Bag(**cured)
    found = ntk.compute_gram(model, inputs, params="all", precision="exact")
    G = gradients(model, inputs, list(dict(model.named_parameters())))
    assert max(relative_error(found.values, contracted(G, G, "trace"))) < 1e-12


def test_a_failure_of_another_cause_is_told_as_it_is(inputs, monkeypatch):
    def fails(*_):
        msg = "out.weight (of Linear): differs from plain autograd"
        raise CheckFailed(msg)

    monkeypatch.setattr("ntkengine.gram.check.Check.sweep", fails)
    with pytest.raises(CheckFailed, match="autograd$"):
        ntk.compute_gram(Bag(), inputs, params="all")
