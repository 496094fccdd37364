"""Inputs that are no texts, in the forms in which texts' token ids come too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import ntkengine as ntk
from ntkengine.errors import InputError
from ntkengine.inputs.sources import as_inputs
from ntkengine.inputs.tokenised import collated
from tests.test_loaders import Columns
from tests.zoo import inputs as zoo_inputs
from tests.zoo import model as zoo_model

LABELS = [0, 1, 0, 1, 1]


@pytest.fixture(scope="module")
def vit():
    model = zoo_model("vit")
    return model, zoo_inputs("vit", model, [4] * 5)["pixel_values"]


def rows(x):
    return [{"pixel_values": image, "label": label} for image, label in zip(x, LABELS, strict=True)]


FORMS = {
    "loader": lambda x: DataLoader(rows(x), batch_size=2),
    "loader of examples": lambda x: DataLoader(rows(x), batch_size=None),
    "batches": lambda x: [{"pixel_values": x[:3]}, {"pixel_values": x[3:]}],
    "examples": rows,
    "arrays": lambda x: [{"pixel_values": image.numpy()} for image in x],
    "data set": lambda x: Columns(pixel_values=x.tolist(), label=LABELS, image_id=list("abcde")),
    "tensor": lambda x: x,
    "array": lambda x: x.numpy(),
}


@pytest.mark.parametrize("form", FORMS)
def test_images_in_every_form(vit, form):
    model, x = vit
    found = as_inputs(FORMS[form](x), model)
    assert torch.equal(found["pixel_values"].float(), x)
    assert found.keys() <= {"pixel_values", "labels"}


def test_their_gram(vit):
    model, x = vit
    options = {"params": "*.layers.*.weight" if any(".layers." in n for n, _ in model.named_parameters()) else "all"}
    usual = ntk.compute_gram(model, {"pixel_values": x}, **options)
    again = ntk.compute_gram(model, DataLoader(rows(x), batch_size=2), **options)
    assert np.array_equal(usual.values, again.values)


def test_sounds(vit):
    model = torch.nn.Linear(3, 2)
    model.main_input_name = "input_features"
    x = torch.randn(4, 5, 3)
    for form in ([{"input_features": part} for part in x], [{"input_features": x[:1]}, {"input_features": x[1:]}]):
        assert torch.equal(collated(form, model)["input_features"], x)
    with pytest.raises(InputError, match="batch 1: expected a mapping with input_features, got a mapping of wrong"):
        collated([{"input_features": x}, {"wrong": x}], model)
    with pytest.raises(InputError, match="batches do not go together"):
        collated([{"input_features": x}, {"input_features": x[:, :4]}], model)


class Tiny(torch.nn.Module):
    """Someone's own model, with a config that is not transformers'."""

    def __init__(self):
        super().__init__()
        self.config, self.table, self.head = {"width": 4}, torch.nn.Embedding(9, 4), torch.nn.Linear(4, 2)

    def forward(self, idx, targets=None):
        return self.head(self.table(idx).mean(1))


def test_a_model_with_a_config_of_its_own():
    torch.manual_seed(0)
    model, ids = Tiny(), torch.randint(0, 9, (6, 3))
    named = ntk.compute_gram(model, {"idx": ids}, params="all", readout=lambda out, _: out)
    bare = ntk.compute_gram(model, ids, params="all", readout=lambda out, _: out)
    assert np.array_equal(named.values, bare.values)
