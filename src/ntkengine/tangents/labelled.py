"""Labels reach the readout alone: a model that makes its outputs of them, too, would be another function without."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ntkengine.errors import InputError
from ntkengine.inputs.attributes import Attributes
from ntkengine.inputs.batches import Samples
from ntkengine.inputs.readout import Readout
from ntkengine.inputs.running import arguments, call_model
from ntkengine.tangents.rehearsal import rounding

_IGNORED = -100  # label of a token that is not scored


def check_labels(model: nn.Module, samples: Samples, readout: Readout, parameter: nn.Parameter) -> None:
    """Refuse labels that the model, where it takes any, uses for more than a loss.

    As encoder-decoders do: without decoder inputs they shift the labels, or where those are kept back, some shift the
    encoder's ids.

    Args:
        model: in eval mode.
        samples: examples.
        readout: f.
        parameter: says device and dtype.

    Raises:
        InputError: f of an example is another when the model is given its labels.

    Cost: two forward passes of up to three examples.
    """
    one = Samples(samples.groups, microbatch=1, trim=False)
    for chunk in [one.chunks[i] for i in sorted({0, len(one.chunks) // 2, len(one.chunks) - 1})]:
        inputs = one.inputs(chunk, parameter.device, parameter.dtype)
        if "labels" not in inputs or not _may_be_given(model, inputs["labels"]):
            continue
        args, kwargs = arguments(model, inputs)
        with _as_it_was(model), torch.no_grad():
            f = readout(call_model(model, inputs), inputs)
            try:
                told = readout(_without_loss(model(*args, **kwargs, labels=inputs["labels"])), inputs)
            except Exception:  # noqa: BLE001 - what it cannot take is the readout's alone
                continue
        # What labels do not enter is computed alike, and f may hardly depend on what its gradient is made of.
        off = float((told - f).norm()) if told.shape == f.shape else float("inf")
        if bool(torch.isfinite(f).all()) and not off <= rounding(f.dtype) * float(f.norm()):
            how = "decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels)"
            hint = f", as {how}" if hasattr(model, "prepare_decoder_input_ids_from_labels") else ""
            raise InputError(
                f"inputs: {type(model).__name__} makes its outputs of labels too (f of an example is off by {off:.1e} "
                f"without them), but they only reach the readout; give what it makes of them under another name{hint}"
            )


def _may_be_given(model: nn.Module, labels: Tensor) -> bool:
    """Whether no label can stop the device: a GPU that meets one without a class takes no more orders."""
    config = getattr(model, "config", None)
    if labels.device.type == "cpu":
        return True
    words = getattr(config, "vocab_size", 0)
    known = (labels == _IGNORED) | ((labels >= 0) & (labels < words))
    return bool(getattr(config, "is_encoder_decoder", False)) and labels.ndim == 2 and bool(known.all())


def _without_loss(outputs: Any) -> Any:
    """Return a model's outputs as they are without labels: the loss comes first."""
    if isinstance(outputs, Mapping) and "loss" in outputs:
        return type(outputs)(**{k: v for k, v in outputs.items() if k != "loss"})
    first = outputs[0] if isinstance(outputs, tuple) and outputs else None
    return outputs[1:] if isinstance(first, Tensor) and first.ndim == 0 else outputs


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Within the block the model may note things in its modules and configurations; at its end they are gone."""
    before, loud = Attributes(model), logging.getLogger("transformers")
    found = (getattr(m, "config", None) for m in model.modules())
    told = [(vars(c), dict(vars(c))) for c in {id(c): c for c in found if hasattr(c, "__dict__")}.values()]
    level = loud.level
    loud.setLevel(logging.ERROR)  # of a loss that nobody asked for
    try:
        yield
    finally:
        loud.setLevel(level)
        before.restore()
        for held, was in told:
            held.clear()
            held.update(was)
