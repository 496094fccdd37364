"""Steps of a recipe's optimiser, whatever is trained: a model, its linearisation, adapters on kept factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ntkengine.errors import InputError
from ntkengine.recipe import Recipe


class Descent:
    """A recipe's optimiser of some tensors.

    Args:
        recipe: the recipe.
        parameters: leaves that require gradients.

    Raises:
        InputError: a parameter of which several elements are one number in memory.
    """

    def __init__(self, recipe: Recipe, parameters: Sequence[Tensor]) -> None:
        self._recipe, self._parameters = recipe, list(parameters)
        for p in self._parameters:
            check_elements(f"a parameter of shape {tuple(p.shape)}", p)
        r = recipe
        self._optimizer: torch.optim.Optimizer
        if r.optimizer == "adam":
            self._optimizer = torch.optim.Adam(
                self._parameters, lr=r.learning_rate, betas=r.betas, eps=r.eps, fused=True
            )
        else:
            self._optimizer = torch.optim.SGD(self._parameters, lr=r.learning_rate, momentum=r.momentum)

    def step(self, gradients: Sequence[Tensor], moved: Sequence[Tensor], rate: float) -> None:
        """Take one step.

        Args:
            gradients: of the batch's loss, without the proximal term, which is added here.
            moved: θ_t − θ_0.
            rate: of this step.
        """
        r = self._recipe
        if r.pulls(gradients, moved):
            gradients = [g + r.proximal * m for g, m in zip(gradients, moved, strict=True)]
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        held = [p.grad for p in self._parameters]  # the caller's, who may be accumulating
        try:
            for p, g in zip(self._parameters, gradients, strict=True):
                p.grad = g
            self._optimizer.step()
        finally:
            for p, was in zip(self._parameters, held, strict=True):
                p.grad = was


def check_elements(name: str, p: Tensor) -> None:
    """Refuse a tensor of which elements share memory: optimisers write as if each had its own, some outside of it.

    Raises:
        InputError: naming it.
    """
    end = 0
    for stride, size in sorted((s, n) for s, n in zip(p.stride(), p.shape, strict=True) if n > 1):
        if stride <= end:
            raise InputError(f"params: elements of {name} share memory (strides {p.stride()}), so it cannot be trained")
        end += stride * (size - 1)


def norm(tensors: Sequence[Tensor]) -> float:
    """Return the Euclidean norm over all entries of all tensors."""
    return float(sum(float(t.double().square().sum()) for t in tensors)) ** 0.5
