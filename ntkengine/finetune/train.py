"""Fine-tuning as the forecast means it: its loss, its batches, a proximal term, the linear model beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkengine.errors import InputError, NonFinite
from ntkengine.finetune.history import FineTuning, Measured
from ntkengine.finetune.linearize import Linearized
from ntkengine.inputs.batches import Chunk, Samples
from ntkengine.inputs.parameters import select_parameters
from ntkengine.inputs.readout import ReadoutFunction, resolve_readout
from ntkengine.inputs.running import call_model, evaluation, wanting_gradients
from ntkengine.losses import as_targets, correct, divergence, losses
from ntkengine.recipe import Recipe

Progress = Callable[[float, float, str], None]


def fine_tune(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    targets: Any,
    recipe: Recipe | dict[str, Any],
    *,
    params: str | Iterable[str] = "trainable",
    readout: str | ReadoutFunction = "logits",
    eval_inputs: Mapping[str, Tensor] | None = None,
    eval_targets: Any = None,
    linear: bool = False,
    measure_every: int | None = None,
    progress: Progress | None = None,
) -> FineTuning:
    """Fine-tune a model, in place, by a recipe.

    The model runs in eval mode throughout (no dropout), so that the loss is the one its tangent kernel describes.

    Args:
        model: any module with float32 or float64 parameters.
        inputs: tensors with a leading sample axis N.
        targets: (N, C), or for "cross-entropy" (N,) classes.
        recipe: the recipe, or a mapping of its fields.
        params: what is trained, as for `compute_gram`.
        readout: f, likewise.
        eval_inputs: further examples to measure on.
        eval_targets: theirs.
        linear: train the exact linearised model on the same batches along, and measure how far the two are apart.
        measure_every: steps between measurements; default: after every epoch.
        progress: called with (steps done, steps in all, stage).

    Returns:
        The run. The model keeps the parameters it ended with.

    Raises:
        InputError: arguments that cannot be used.
        NonFinite: the loss of a batch is not finite; the model keeps the parameters before that step.

    Cost: a forward and a backward pass of every batch; a forward pass of all examples a measurement; with `linear`
        about three times that; two copies of the parameters trained, and the optimiser's.
    Source: the proximal and selective terms, Rahimi Afzal et al. 2025 (arXiv 2602.08239).
    """
    recipe = Recipe.of(recipe)
    selected = select_parameters(model, params)
    for name, p in selected.items():
        if p.dtype not in (torch.float32, torch.float64):
            raise InputError(f"params: expected float32 or float64 parameters to train, {name} is {p.dtype}")
    if (eval_inputs is None) != (eval_targets is None):
        raise InputError("eval_targets: expected together with eval_inputs, got one without the other")
    if measure_every is not None and measure_every < 1:
        raise InputError(f"measure_every: expected a number of steps >= 1, got {measure_every!r}")
    run = _Run(model, selected, resolve_readout(readout, "full"), recipe)
    with evaluation(model):
        train = _Group(run, "targets", inputs, targets)
        held = None if eval_inputs is None else _Group(run, "eval_targets", eval_inputs, eval_targets)
        if linear:
            run.linear = Linearized(model, selected, run.readout)
            run.linear_optimizer = run.make_optimizer(list(run.linear.parameters()))
        return _trained(run, train, held, measure_every, progress)


class _Run:
    """A model being trained, and its linearisation if asked for."""

    def __init__(self, model: nn.Module, selected: dict[str, nn.Parameter], readout: Any, recipe: Recipe) -> None:
        self.model, self.readout, self.recipe = model, readout, recipe
        self.parameters = list(selected.values())
        self.origin = [p.detach().clone() for p in self.parameters]
        self.optimizer = self.make_optimizer(self.parameters)
        self.linear: Linearized | None = None
        self.linear_optimizer: torch.optim.Optimizer | None = None

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the recipe's optimiser of these parameters."""
        r = self.recipe
        if r.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=r.learning_rate, betas=r.betas, eps=r.eps)
        return torch.optim.SGD(parameters, lr=r.learning_rate, momentum=r.momentum)

    def f(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the model's outputs, (n, C)."""
        return self.readout(call_model(self.model, batch), batch)

    def displacement(self) -> list[Tensor]:
        """Return θ_t − θ_0."""
        return [p.detach() - start for p, start in zip(self.parameters, self.origin, strict=True)]

    def step(self, batch: Mapping[str, Tensor], y: Tensor, rate: float) -> float:
        """Take one step of the model, and of its linearisation; return the batch's loss before it.

        Raises:
            NonFinite: the loss is not finite; nothing was changed.
        """
        loss = losses(self.f(batch), y, self.recipe.loss).mean()
        if not bool(torch.isfinite(loss)):
            raise NonFinite(f"fine_tune: the loss of a batch is {float(loss)}; a lower learning rate may help")
        if self.linear is not None and self.linear_optimizer is not None:
            linear = list(self.linear.parameters())
            value = losses(self.linear(batch), y, self.recipe.loss).mean()
            grads = torch.autograd.grad(value, linear)
            self._apply(self.linear_optimizer, linear, grads, [d.detach() for d in linear], rate)
        grads = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        self._apply(self.optimizer, self.parameters, grads, self.displacement(), rate)
        return float(loss.detach())

    def _apply(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: list[nn.Parameter],
        grads: tuple[Tensor | None, ...],
        moved: list[Tensor],
        rate: float,
    ) -> None:
        r = self.recipe
        found = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
        if r.proximal and (
            not r.selective or sum(float((g * m).sum()) for g, m in zip(found, moved, strict=True)) >= 0
        ):
            found = [g + r.proximal * m for g, m in zip(found, moved, strict=True)]
        for p, g in zip(parameters, found, strict=True):
            p.grad = g
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        for p in parameters:
            p.grad = None


class _Group:
    """Examples to train or measure on."""

    def __init__(self, run: _Run, name: str, inputs: Mapping[str, Tensor], targets: Any) -> None:
        self.run, self.samples = run, Samples([inputs])
        first = run.parameters[0]
        self.device, self.dtype = first.device, first.dtype
        self.start = self.outputs(run.f)
        loss, (rows, outputs) = run.recipe.loss, self.start.shape
        self.y = as_targets(name, targets, loss, rows, outputs).to(self.device)

    def batch(self, rows: np.ndarray) -> tuple[dict[str, Tensor], Tensor]:
        """Return the inputs and targets of some examples."""
        return self.samples.inputs(Chunk(0, rows, 0), self.device, self.dtype), self.y[torch.from_numpy(rows)]

    def scored(self, f: Tensor) -> tuple[float, float]:
        """Return the mean loss and the accuracy of outputs of all examples."""
        return float(losses(f, self.y, self.run.recipe.loss).mean()), float(correct(f, self.y).double().mean())

    @torch.no_grad()
    def outputs(self, f: Callable[[Mapping[str, Tensor]], Tensor]) -> Tensor:
        """Return f of all examples, (N, C) float64."""
        parts, rows = [], []
        for chunk in self.samples.chunks:
            parts.append(f(self.samples.inputs(chunk, self.device, self.dtype)).double())
            rows.append(chunk.rows)
        found = torch.cat(parts)
        out = torch.empty_like(found)
        out[torch.from_numpy(np.concatenate(rows)).to(found.device)] = found
        return out


def _trained(
    run: _Run, train: _Group, held: _Group | None, measure_every: int | None, progress: Progress | None
) -> FineTuning:
    recipe, n = run.recipe, train.samples.total
    steps = recipe.steps(n)
    every = measure_every or max(1, steps // recipe.epochs)
    history, losses, clock, waited = [], [], 0.0, 0.0
    begun = time.perf_counter()
    measured, outputs, eval_outputs = _measure(run, train, held, 0, 0, clock)
    history.append(measured)
    waited += time.perf_counter() - begun
    seen = 0
    with wanting_gradients(run.parameters):
        for step, rows in enumerate(recipe.batches(n)):
            rate = recipe.rate(step, n)
            losses.append(run.step(*train.batch(rows), rate))
            clock, seen = clock + rate, seen + len(rows)
            if progress is not None:
                progress(step + 1, steps, "fine-tuning")
            if (step + 1) % every == 0 or step + 1 == steps:
                at = time.perf_counter()
                measured, outputs, eval_outputs = _measure(run, train, held, step + 1, seen, clock)
                history.append(measured)
                waited += time.perf_counter() - at
    return FineTuning(
        recipe=recipe,
        history=history,
        outputs=outputs.cpu().numpy(),
        eval_outputs=None if eval_outputs is None else eval_outputs.cpu().numpy(),
        batch_losses=np.array(losses),
        seconds=time.perf_counter() - begun - waited,
        measuring_seconds=waited,
    )


def _measure(
    run: _Run, train: _Group, held: _Group | None, step: int, seen: int, clock: float
) -> tuple[Measured, Tensor, Tensor | None]:
    found: dict[str, Any] = {}
    outputs: dict[str, Tensor] = {}
    for name, group in (("train", train), ("eval", held)):
        found[f"{name}_loss"] = found[f"{name}_accuracy"] = None
        if group is None:
            continue
        f = outputs[name] = group.outputs(run.f)
        if not bool(torch.isfinite(f).all()):
            raise NonFinite(f"fine_tune: outputs are not finite after {step} steps; a lower learning rate may help")
        found[f"{name}_loss"], found[f"{name}_accuracy"] = group.scored(f)
        if run.linear is None:
            continue
        g = group.outputs(run.linear)
        found[f"linear_{name}_loss"], found[f"linear_{name}_accuracy"] = group.scored(g)
        prefix = "" if name == "train" else "eval_"
        found[f"{prefix}gap"] = float((f - g).norm())
        found[f"{prefix}divergence"] = divergence(f, g)
        moved = float((f - group.start).norm())
        if name == "train" and moved > 0:
            found["relative_gap"] = found["gap"] / moved
    if run.linear is not None:
        found["linear_displacement"] = _norm([d.detach() for d in run.linear.parameters()])
    measured = Measured(
        step=step,
        epoch=seen / train.samples.total,
        time=clock,
        displacement=_norm(run.displacement()),
        **found,
    )
    return measured, outputs["train"], outputs.get("eval")


def _norm(tensors: list[Tensor]) -> float:
    return float(sum(float(t.double().square().sum()) for t in tensors) ** 0.5)
