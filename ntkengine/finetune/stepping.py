"""A model being trained by a recipe, one step at a time, and its linearisation on the same batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ntkengine.errors import NonFinite
from ntkengine.finetune.linearize import Linearized
from ntkengine.inputs.readout import Readout
from ntkengine.inputs.running import call_model
from ntkengine.losses import losses
from ntkengine.recipe import Recipe


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
        self._model, self._readout = model, readout
        self._origin = [p.detach().clone() for p in self.parameters]
        self._optimizer = self._make_optimizer(self.parameters)
        self.linear = Linearized(model, selected, readout) if linear else None
        if self.linear is not None:
            self._linear_optimizer = self._make_optimizer(list(self.linear.parameters()))

    def f(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the model's outputs, (n, C)."""
        return self._readout(call_model(self._model, batch), batch)

    def displacement(self) -> list[Tensor]:
        """Return θ_t − θ_0."""
        return [p.detach() - start for p, start in zip(self.parameters, self._origin, strict=True)]

    def step(self, batch: Mapping[str, Tensor], y: Tensor, rate: float) -> float:
        """Take one step of the model, and of its linearisation; return the batch's loss before it.

        Raises:
            NonFinite: a loss or a gradient is not finite; nothing was changed.
        """
        loss, grads = self._gradients("the", self.f(batch), y, self.parameters)
        if self.linear is not None:
            linear = list(self.linear.parameters())
            _, linear_grads = self._gradients("the linearised model's", self.linear(batch), y, linear)
            self._apply(self._linear_optimizer, linear, linear_grads, [d.detach() for d in linear], rate)
        self._apply(self._optimizer, self.parameters, grads, self.displacement(), rate)
        return loss

    def _make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        r = self.recipe
        if r.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=r.learning_rate, betas=r.betas, eps=r.eps)
        return torch.optim.SGD(parameters, lr=r.learning_rate, momentum=r.momentum)

    def _gradients(
        self, whose: str, f: Tensor, y: Tensor, parameters: list[nn.Parameter]
    ) -> tuple[float, list[Tensor]]:
        loss = losses(f, y, self.recipe.loss).mean()
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        if not bool(torch.stack([torch.isfinite(x).all() for x in (loss, *grads)]).all()):
            what = f"loss of a batch is {loss.item()}" if not bool(torch.isfinite(loss)) else "gradient is not finite"
            raise NonFinite(f"fine_tune: {whose} {what}; a lower learning rate may help")
        return loss.item(), grads

    def _apply(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: list[nn.Parameter],
        grads: list[Tensor],
        moved: list[Tensor],
        rate: float,
    ) -> None:
        r = self.recipe
        if r.pulls(grads, moved):
            grads = [g + r.proximal * m for g, m in zip(grads, moved, strict=True)]
        for p, g in zip(parameters, grads, strict=True):
            p.grad = g
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        for p in parameters:
            p.grad = None


def norm(tensors: Sequence[Tensor]) -> float:
    """Return the Euclidean norm over all entries of all tensors."""
    return _inner(tensors, tensors) ** 0.5


def _inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return float(sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True)))
