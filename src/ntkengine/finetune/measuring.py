"""What a model and its linearisation give on a set of examples, and how far the two are apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from ntkengine.descent import norm
from ntkengine.errors import NonFinite
from ntkengine.finetune.history import Measured
from ntkengine.finetune.stepping import Stepper, hint
from ntkengine.forecast.scores import tells_classes
from ntkengine.inputs.batches import Chunk, Samples
from ntkengine.losses import correct, divergence, losses

Outputs = Callable[[Mapping[str, Tensor]], Tensor]


class Examples:
    """Examples on a device, in microbatches by length.

    Args:
        samples: of one group, as `settled` returns them.
        like: a parameter whose device and dtype they take.
    """

    def __init__(self, samples: Samples, like: Tensor) -> None:
        self._samples, self._device, self._dtype = samples, like.device, like.dtype
        self.n, self.given = samples.total, samples.groups[0]

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Return the inputs of some examples."""
        return self._samples.inputs(Chunk(0, rows, 0), self._device, self._dtype)

    def reach(self, f: Outputs) -> bool:
        """Whether f of any example has a gradient."""
        return any(f(self.batch(chunk.rows)).requires_grad for chunk in self._samples.chunks)

    @torch.no_grad()
    def outputs(self, f: Outputs) -> Tensor:
        """Return f of all examples, (N, C) float64."""
        found = torch.cat([f(self.batch(chunk.rows)).double() for chunk in self._samples.chunks])
        rows = np.concatenate([chunk.rows for chunk in self._samples.chunks])
        out = torch.empty_like(found)
        out[torch.from_numpy(rows).to(found.device)] = found
        return out


def measure(
    stepper: Stepper,
    groups: Mapping[str, tuple[Examples, Tensor]],
    start: Mapping[str, Tensor],
    *,
    step: int,
    epoch: float,
    time: float,
) -> tuple[Measured, dict[str, Tensor]]:
    """Return the measurement, and the model's outputs (N, C) float64 of each group.

    Args:
        stepper: the model and its linearisation.
        groups: "train", and maybe "eval": the examples and their targets.
        start: outputs before training; empty when this is before training.
        step: as of `Measured`.
        epoch: likewise.
        time: likewise.

    Raises:
        NonFinite: an output or a parameter is not finite.
    """
    loss, outputs = stepper.recipe.loss, {}
    classes = tells_classes(*(y for _, y in groups.values()))
    found: dict[str, float | None] = dict.fromkeys(("eval_loss", "eval_accuracy"))
    for name, (examples, y) in groups.items():
        f = outputs[name] = examples.outputs(stepper.f)
        if not bool(torch.isfinite(f).all()):
            raise NonFinite(f"fine_tune: outputs are not finite after {step} steps{hint(step)}")
        found[f"{name}_loss"], found[f"{name}_accuracy"] = _scored(f, y, loss, classes)
        if stepper.linear is None:
            continue
        g = examples.outputs(stepper.linear)
        found[f"linear_{name}_loss"], found[f"linear_{name}_accuracy"] = _scored(g, y, loss, classes)
        prefix = "" if name == "train" else "eval_"
        found[f"{prefix}gap"] = gap = float((f - g).norm())
        found[f"{prefix}divergence"] = divergence(f, g)
        moved = float((f - start.get(name, f)).norm())
        found[f"{prefix}relative_gap"] = gap / moved if moved > 0 else None
    if stepper.linear is not None:
        found["linear_displacement"] = norm([d.detach() for d in stepper.linear.parameters()])
    moved = norm(stepper.displacement())
    if not math.isfinite(moved):  # an entry that no output reads may be
        raise NonFinite(f"fine_tune: parameters are not finite after {step} steps{hint(step)}")
    return Measured(step=step, epoch=epoch, time=time, displacement=moved, **found), outputs  # type: ignore[arg-type]


def _scored(f: Tensor, y: Tensor, loss: str, classes: bool) -> tuple[float, float | None]:
    """Return the mean loss and the accuracy of outputs, None without classes."""
    return float(losses(f, y, loss).mean()), float(correct(f, y).double().mean()) if classes else None
