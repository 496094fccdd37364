"""A model being trained by a recipe, one step at a time, and its linearisation on the same batches."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ntkengine.descent import Descent
from ntkengine.errors import NonFinite
from ntkengine.finetune.linearize import Linearized
from ntkengine.inputs.batches import Samples
from ntkengine.inputs.readout import Readout
from ntkengine.inputs.running import call_model
from ntkengine.inputs.sources import Source
from ntkengine.losses import losses
from ntkengine.recipe import Recipe
from ntkengine.tangents.trial import settled


class Stepper:
    """A model being trained, and its linearisation if asked for.

    Attributes:
        parameters: what is trained, in the model's order.
        linear: the linearised model, or None.
    """

    def __init__(
        self, model: nn.Module, selected: dict[str, nn.Parameter], readout: Readout, recipe: Recipe, linear: bool
    ) -> None:
        self.recipe, self.parameters = recipe, list(selected.values())
        self._model, self._readout, self._selected = model, readout, selected
        self._origin = [p.detach().clone() for p in self.parameters]
        self._steps = 0
        self._descent = Descent(recipe, self.parameters)
        self.linear = Linearized(model, selected, readout) if linear else None
        if self.linear is not None:
            self._linear_descent = Descent(recipe, list(self.linear.parameters()))

    def f(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the model's outputs, (n, C)."""
        return self._readout(call_model(self._model, batch), batch)

    def settled(self, inputs: Source) -> Samples:
        """Return examples in microbatches, as `settled` does."""
        return settled(self._model, inputs, self._readout, self._selected)

    def displacement(self) -> list[Tensor]:
        """Return θ_t − θ_0."""
        return [p.detach() - start for p, start in zip(self.parameters, self._origin, strict=True)]

    def restore(self) -> None:
        """Put back θ_0."""
        with torch.no_grad():
            for p, start in zip(self.parameters, self._origin, strict=True):
                p.copy_(start)

    def step(self, batch: Mapping[str, Tensor], y: Tensor, rate: float) -> float:
        """Take one step of the model, and of its linearisation; return the batch's loss before it.

        Raises:
            NonFinite: a loss or a gradient is not finite; nothing was changed.
        """
        self._steps += 1
        loss, grads = self._gradients("the", self.f(batch), y, self.parameters)
        if self.linear is not None:
            linear = list(self.linear.parameters())
            _, linear_grads = self._gradients("the linearised model's", self.linear(batch), y, linear)
            self._linear_descent.step(linear_grads, [d.detach() for d in linear], rate)
        self._descent.step(grads, self.displacement(), rate)
        return loss

    def _gradients(
        self, whose: str, f: Tensor, y: Tensor, parameters: list[nn.Parameter]
    ) -> tuple[float, list[Tensor]]:
        loss = losses(f, y, self.recipe.loss).mean()
        reached = loss.requires_grad  # or the batch's examples meet none of them
        found = torch.autograd.grad(loss, parameters, allow_unused=True) if reached else [None] * len(parameters)
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        if not bool(torch.stack([torch.isfinite(x).all() for x in (loss, *grads)]).all()):
            what = f"loss of a batch is {loss.item()}" if not bool(torch.isfinite(loss)) else "gradient is not finite"
            raise NonFinite(f"fine_tune: {whose} {what}{hint(self._steps - 1)}")
        return loss.item(), grads


def hint(steps: int) -> str:
    """Return what may help after so many steps: before the first, the learning rate has no part in it."""
    return "; a lower learning rate may help" if steps else ", before any training"
