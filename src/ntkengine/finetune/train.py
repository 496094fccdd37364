"""Fine-tuning as the forecast means it: same loss, same batches, a proximal term, the linear model beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkengine.arguments import called, whole
from ntkengine.descent import check_elements
from ntkengine.errors import InputError, NonFinite
from ntkengine.finetune.history import FineTuning, Measured
from ntkengine.finetune.measuring import Examples, measure
from ntkengine.finetune.stepping import Stepper
from ntkengine.inputs.heads import warn_of_new_head
from ntkengine.inputs.parameters import select_parameters
from ntkengine.inputs.readout import ReadoutFunction, resolve_readout
from ntkengine.inputs.running import evaluation, wanting_gradients
from ntkengine.inputs.seen import noting_training
from ntkengine.inputs.sources import Source
from ntkengine.inputs.streaming import entry_of
from ntkengine.losses import as_targets
from ntkengine.recipe import Recipe

Progress = Callable[[float, float, str], None]


def fine_tune(
    model: nn.Module,
    inputs: Source,
    targets: Any,
    recipe: Recipe | dict[str, Any] | None = None,
    *,
    params: str | Iterable[str] = "trainable",
    readout: str | ReadoutFunction = "logits",
    eval_inputs: Source | None = None,
    eval_targets: Any = None,
    linear: bool = False,
    measure_every: int | None = None,
    progress: Progress | None = None,
    **fields: Any,
) -> FineTuning:
    """Fine-tune a model, in place, by a recipe.

    The model runs in eval mode throughout (no dropout), so that the loss is the one its tangent kernel describes.
    `fine_tune(model, inputs, targets, learning_rate=1e-3, proximal=0.1)` needs no recipe.

    Args:
        model: any module with float32 or float64 parameters.
        inputs: N examples, as for `compute_gram`.
        targets: (N, C), or for "cross-entropy" (N,) classes.
        recipe: the recipe, or a mapping of its fields.
        params: what is trained, as for `compute_gram`.
        readout: f, likewise.
        eval_inputs: further examples to measure on.
        eval_targets: theirs.
        linear: train the exact linearised model on the same batches along, and measure how far the two are apart.
        measure_every: steps between measurements; default: after every epoch.
        progress: called with (steps done, steps in all, stage): see `show_progress`.
        **fields: of the recipe, stronger than the one given.

    Returns:
        The run. The model keeps the parameters it ended with.

    Raises:
        InputError: arguments that cannot be used.
        CheckFailed: the model draws random numbers or keeps a state, or f of an example depends on its batch.
        NonFinite: a loss, a gradient, an output or a parameter is not finite; the model has θ_0 again.

    Cost: about a dozen forward passes of one example; a forward and a backward pass of every batch; a forward pass of
        all examples a measurement; with `linear` about three times that; two copies of the parameters trained, and the
        optimiser's.
    Source: the proximal and selective terms, Rahimi Afzal et al. 2025 (arXiv 2602.08239).
    """
    called("progress", progress)
    given = asdict(recipe) if isinstance(recipe, Recipe) else {} if recipe is None else recipe
    chosen = Recipe.of({**given, **fields} if isinstance(given, Mapping) else given)
    selected = select_parameters(model, params)
    check_trainable(selected)
    if (eval_inputs is None) != (eval_targets is None):
        raise InputError("eval_targets: expected together with eval_inputs, got one without the other")
    if measure_every is not None:
        measure_every = whole("measure_every", measure_every, 1)
    if hasattr(model, "peft_config") and params == "trainable" and not any("modules_to_save" in n for n in selected):
        warn_of_new_head(model, readout)  # which an adapter does not train
    with noting_training(model) as seen, evaluation(model, selected.values()):
        stepper = Stepper(model, selected, resolve_readout(readout, "full"), chosen, linear)
        groups = {"train": _group(stepper, "targets", inputs, targets)}
        if eval_inputs is not None:
            groups["eval"] = _group(stepper, "eval_targets", eval_inputs, eval_targets, groups["train"][1])
        seen.append(groups["train"][0].given)
        try:
            run = _trained(stepper, groups, measure_every, progress)
        except NonFinite:
            stepper.restore()
            raise
    if getattr(model, "ntk_head_new", False):
        model.ntk_head_new = False  # type: ignore[assignment]
    return run


def check_trainable(selected: Mapping[str, nn.Parameter]) -> None:
    """Refuse parameters that cannot be trained.

    Raises:
        InputError: naming the first, which is in half precision, in a file, or several elements in one.
    """
    for name, p in selected.items():
        if entry_of(p) is not None:
            raise InputError(f"params: {name} stays in its file, and cannot be trained; load it without stream")
        if p.dtype not in (torch.float32, torch.float64):
            raise InputError(f"params: expected float32 or float64 parameters to train, {name} is {p.dtype}")
        check_elements(name, p)


def _group(
    stepper: Stepper, name: str, inputs: Source, targets: Any, beside: Tensor | None = None
) -> tuple[Examples, Tensor]:
    examples = Examples(stepper.settled(inputs), stepper.parameters[0])
    with torch.no_grad():
        outputs = stepper.f(examples.batch(np.arange(1))).shape[1]
    y = as_targets(name, targets, stepper.recipe.loss, examples.n, outputs, beside)
    return examples, y.to(stepper.parameters[0].device)


def _trained(
    stepper: Stepper,
    groups: dict[str, tuple[Examples, Tensor]],
    measure_every: int | None,
    progress: Progress | None,
) -> FineTuning:
    recipe, (train, y) = stepper.recipe, groups["train"]
    steps = recipe.steps(train.n)
    every = measure_every or steps // recipe.epochs
    history: list[Measured] = []
    batches, clock, waited, seen = [], 0.0, 0.0, 0
    start: dict[str, Tensor] = {}
    begun = time.perf_counter()

    def look(step: int) -> dict[str, Tensor]:
        nonlocal waited
        at = time.perf_counter()
        measured, outputs = measure(stepper, groups, start, step=step, epoch=seen / train.n, time=clock)
        history.append(measured)
        waited += time.perf_counter() - at
        return outputs

    start = outputs = look(0)
    with wanting_gradients(stepper.parameters):
        if not train.reach(stepper.f):
            raise InputError("params: f depends on none of the selected ones: is an adapter merged, or f detached?")
        for step, rows in enumerate(recipe.batches(train.n)):
            rate = recipe.rate(step, train.n)
            batches.append(stepper.step(train.batch(rows), y[torch.from_numpy(rows)], rate))
            clock, seen = clock + rate, seen + len(rows)
            if progress is not None:
                progress(step + 1, steps, "fine-tuning")
            if (step + 1) % every == 0 or step + 1 == steps:
                outputs = look(step + 1)
    return FineTuning(
        recipe=recipe,
        history=history,
        outputs=outputs["train"].cpu().numpy(),
        eval_outputs=outputs["eval"].cpu().numpy() if "eval" in outputs else None,
        batch_losses=np.array(batches),
        seconds=time.perf_counter() - begun - waited,
        measuring_seconds=waited,
    )
