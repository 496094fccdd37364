"""Readouts: which numbers of the model's output the tangent kernel differentiates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkengine.arguments import nearest_name, whole
from ntkengine.errors import InputError
from ntkengine.inputs.language import SequenceLoss
from ntkengine.inputs.promoted import Promoted

ReadoutFunction = Callable[[Any, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Readout:
    """A named map from the model's outputs to the differentiated numbers f(x; θ).

    Attributes:
        name: what a file calls it.
        function: (model_outputs, inputs) -> (N, C); row n depends on example n alone.
        given: the callable as the caller gave it; None for a named readout.
    """

    name: str
    function: ReadoutFunction
    given: Any = None

    def __call__(self, outputs: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return f, (N, C), after checking its shape against the batch."""
        with Promoted():  # its own tensors have a dtype of their own
            f = self.function(outputs, inputs)
        n = len(next(iter(inputs.values())))
        if not isinstance(f, Tensor) or f.ndim != 2 or f.shape[0] != n:
            got = f"{tuple(f.shape)}" if isinstance(f, Tensor) else type(f).__name__
            msg = f"readout {self.name!r}: expected a tensor of shape (N={n}, C), got {got}"
            raise InputError(msg)
        return f


def resolve_readout(readout: str | ReadoutFunction | Readout, contraction: str) -> Readout:
    """Return the readout of that name, summed over its C outputs for `"sum-of-outputs"`.

    Args:
        readout: `"logits"`, `"margin"` (logit₁ − logit₀), `"loss"` (per-example cross-entropy, or ½ squared error with
            one logit; for a language model the mean over the example's tokens, `SequenceLoss`; labels in
            `inputs["labels"]`), or a callable (model_outputs, inputs) -> (N, C), such as `LabelWords`.
        contraction: the Gram's contraction.

    Raises:
        InputError: an unknown name.
    """
    if isinstance(readout, Readout):
        chosen = readout
    elif callable(readout):
        own = f"{readout.__module__}.{getattr(readout, '__qualname__', type(readout).__qualname__)}"
        chosen = Readout(repr(readout) if is_dataclass(readout) else own, readout, readout)
    elif isinstance(readout, str) and readout in NAMED_READOUTS:
        chosen = Readout(readout, NAMED_READOUTS[readout])
    else:
        hint = nearest_name(str(readout), NAMED_READOUTS)
        names = ", ".join(map(repr, NAMED_READOUTS))
        msg = f"readout: expected one of {names} or a callable, got {readout!r}" + (hint and f"; {hint}")
        raise InputError(msg)
    if contraction != "sum-of-outputs":
        return chosen
    return Readout(chosen.name, lambda outputs, inputs: chosen(outputs, inputs).sum(1, keepdim=True), chosen.given)


def encode_targets(labels: Any, readout: str, num_classes: int) -> np.ndarray:
    """Return regression targets for class labels: +1 for the true class, −1 elsewhere.

    Args:
        labels: (N,) integers in [0, num_classes).
        readout: `"logits"` gives one column per class; `"margin"` one column, +1 for class 1 and −1 for class 0.
        num_classes: number of classes.

    Returns:
        (N, C) float64.

    Raises:
        InputError: labels out of range, or a readout that has no class targets.
    """
    whole("num_classes", num_classes, 1)
    y = np.asarray(labels)
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        msg = f"labels: expected (N,) integers, got shape {y.shape} of {y.dtype}"
        raise InputError(msg)
    if y.size and (y.min() < 0 or y.max() >= num_classes):
        msg = f"labels: expected values in 0..{num_classes - 1}, got {y.min()}..{y.max()}"
        raise InputError(msg)
    if readout == "margin":
        if num_classes != 2:
            msg = f"readout 'margin': expected 2 classes, got {num_classes}; use readout 'logits'"
            raise InputError(msg)
        return np.where(y == 1, 1.0, -1.0)[:, None]
    if readout == "logits":
        return np.where(np.arange(num_classes)[None, :] == y[:, None], 1.0, -1.0)
    msg = f"readout {readout!r}: class targets are defined for 'logits' and 'margin'; give targets yourself"
    raise InputError(msg)


def logits_of(outputs: Any) -> Tensor:
    """Return the logits tensor of a Hugging Face output, a dict, a tuple (its first entry), or a plain tensor."""
    if isinstance(outputs, Tensor):
        return outputs
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if logits is None and isinstance(outputs, tuple | list) and outputs and isinstance(outputs[0], Tensor):
        logits = outputs[0]
    if not isinstance(logits, Tensor):
        msg = f"readout: the model returned {type(outputs).__name__} without logits; give a callable readout"
        raise InputError(msg)
    return logits


def _class_logits(outputs: Any, _inputs: Mapping[str, Tensor]) -> Tensor:
    logits = logits_of(outputs)
    if logits.ndim != 2:
        msg = (
            f"readout 'logits': expected (N, C) class logits, got {tuple(logits.shape)}; "
            "for a language model use LabelWords, or a callable that picks positions and words"
        )
        raise InputError(msg)
    return logits


def _margin(outputs: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    logits = _class_logits(outputs, inputs)
    if logits.shape[1] != 2:
        msg = f"readout 'margin': expected 2 logits, got {logits.shape[1]}; use readout 'logits'"
        raise InputError(msg)
    return logits[:, 1:] - logits[:, :1]


def _loss(outputs: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    if logits_of(outputs).ndim == 3:
        return SequenceLoss()(outputs, inputs)
    logits = _class_logits(outputs, inputs)
    if "labels" not in inputs:
        msg = "readout 'loss': inputs have no 'labels'"
        raise InputError(msg)
    labels = inputs["labels"]
    if logits.shape[1] == 1 and labels.numel() == len(logits):
        return 0.5 * (logits - labels.to(logits.dtype).reshape(-1, 1)) ** 2
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        msg = (
            f"readout 'loss': expected labels (N,) of whole numbers, one class each, got {tuple(labels.shape)} of "
            f"{labels.dtype}; for another loss give a callable"
        )
        raise InputError(msg)
    labels = labels.long()
    if bool((labels < 0).any()) or bool((labels >= logits.shape[1]).any()):
        msg = (
            f"readout 'loss': expected labels in 0..{logits.shape[1] - 1}, got {int(labels.min())}..{int(labels.max())}"
        )
        raise InputError(msg)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")[:, None]


NAMED_READOUTS: dict[str, ReadoutFunction] = {"logits": _class_logits, "margin": _margin, "loss": _loss}
