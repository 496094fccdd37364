"""Convolutions: per-sample gradients from patches, against plain autograd, whatever the geometry."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ntkengine.gram.engine import compute_gram
from ntkengine.tangents import convolution
from tests.brute import contracted, gradients, relative_error

GEOMETRIES = {
    "plain": (nn.Conv2d, {"kernel_size": 3}),
    "padded": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "stride": 2}),
    "oblong": (nn.Conv2d, {"kernel_size": (1, 3), "padding": (0, 2), "stride": (2, 1), "dilation": (1, 2)}),
    "grouped": (nn.Conv2d, {"kernel_size": 2, "groups": 2}),
    "depthwise": (nn.Conv2d, {"kernel_size": 3, "groups": 4, "bias": False}),
    "patches": (nn.Conv2d, {"kernel_size": 4, "stride": 4}),
    "sequence": (nn.Conv1d, {"kernel_size": 3, "padding": 2, "dilation": 2}),
    "grouped sequence": (nn.Conv1d, {"kernel_size": 4, "groups": 4, "padding": 3, "stride": 2}),
    "same": (nn.Conv2d, {"kernel_size": 3, "padding": "same"}),
    "reflected": (nn.Conv1d, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
    "volume": (nn.Conv3d, {"kernel_size": 2}),
}
SIDES = {nn.Conv1d: (9,), nn.Conv2d: (8, 9), nn.Conv3d: (4, 3, 3)}
GENERAL = ("same", "reflected", "volume")


def network(name: str, outputs: int) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    kind, options = GEOMETRIES[name]
    first = kind(4, 8, **options)
    x = torch.randn(7, 4, *SIDES[kind])
    return nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.Linear(first(x)[0].numel(), outputs)).eval(), x


@pytest.mark.parametrize("contraction", ["trace", "full"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_equals_plain_autograd(name, contraction, monkeypatch):
    monkeypatch.setattr(convolution, "_PATCH_BYTES", 3 * 4 * 8 * 9 * 9 * 4)  # a few samples' patches at once
    model, x = network(name, 2)
    gram = compute_gram(model, {"input": x}, contraction=contraction)
    paths = {row.parameter: row.path for row in gram.plan.parameters}
    assert paths["0.weight"] == ("explicit-leaf" if name in GENERAL else "convolution")
    assert paths.get("0.bias", "diagonal") == ("explicit-leaf" if name in GENERAL else "diagonal")
    G = gradients(model, {"input": x}, {name for name, _ in model.named_parameters()})
    assert max(relative_error(gram.values, contracted(G, G, contraction))) < 1e-6


def test_a_subclass_with_its_own_forward_takes_the_general_way():
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model, x = network("plain", 1)
    model[0] = Scaled(4, 8, 3)
    gram = compute_gram(model, {"input": x})
    assert {row.path for row in gram.plan.parameters if row.parameter == "0.weight"} == {"explicit-leaf"}
    G = gradients(model, {"input": x}, {name for name, _ in model.named_parameters()})
    assert max(relative_error(gram.values, contracted(G, G, "trace"))) < 1e-6
