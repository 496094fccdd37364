"""Whether a language model's own loss shifts its labels as the readout does: decoders of encoder–decoders do not."""

from __future__ import annotations

import inspect
import logging

import torch
from torch import nn

from ntkengine.inputs.batches import Samples
from ntkengine.inputs.language import SequenceLoss, TokenLoss, predicts_next
from ntkengine.inputs.readout import Readout
from ntkengine.inputs.running import evaluation

log = logging.getLogger(__name__)

_EQUAL, _APART = 1e-3, 1e-2  # relative: own loss and one of the two; and the two


def warn_of_own_loss(model: nn.Module, samples: Samples, readout: Readout) -> None:
    """Log a warning where the model's own loss of an example is not the readout's, but the other way's.

    Args:
        model: any; one that makes no loss of labels is not looked at.
        samples: the example that scores most tokens is run.
        readout: the loss of a sequence or of its tokens, which left open whether labels are shifted.

    Cost: a forward pass of one example.
    """
    group = samples.groups[0]
    labels, given = group.get("labels"), readout.given
    if readout.name != "loss" and not (isinstance(given, SequenceLoss | TokenLoss) and given.shift is None):
        return
    if labels is None or labels.ndim != 2 or "labels" not in inspect.signature(model.forward).parameters:
        return
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return
    row = int((labels >= 0).sum(1).argmax())
    one = Samples([{k: v[row : row + 1] for k, v in group.items()}], trim=False)
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    inputs = one.inputs(one.chunks[0], parameter.device, parameter.dtype)
    try:
        with evaluation(model), torch.no_grad():
            outputs = model(**inputs)
            shifts = predicts_next(outputs)
            own = float(outputs.loss)
            same, other = (float(SequenceLoss(shift=shift)(outputs, inputs)) for shift in (shifts, not shifts))
    except Exception:  # noqa: BLE001 - what the readout cannot take, it refuses itself
        return
    if abs(own - other) <= _EQUAL * abs(own) and abs(own - same) > _APART * abs(own):
        log.warning(
            "readout: the own loss of %s %s, this one %s; %s(shift=%s) for labels made for it",
            type(model).__name__,
            *(("predicts label t from position t", "label t + 1") if shifts else ("predicts label t + 1", "label t")),
            type(given or SequenceLoss()).__name__,
            not shifts,
        )
