"""Labels reach the readout alone: a model that makes its outputs of them, too, would be another function without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ntkengine.errors import InputError, NonFinite
from ntkengine.inputs.attributes import Attributes
from ntkengine.inputs.readout import Readout
from ntkengine.inputs.running import UNUSABLE, arguments
from ntkengine.tangents.rehearsal import rounding


def check_labels(model: nn.Module, inputs: Mapping[str, Tensor], readout: Readout, f: Tensor) -> None:
    """Refuse labels that the model, where it takes any, uses for more than a loss.

    As encoder-decoders do: without decoder inputs they shift the labels, or where those are kept back, some shift the
    encoder's ids.

    Args:
        model: in eval mode.
        inputs: of some examples.
        readout: f.
        f: of these examples, (n, C).

    Raises:
        InputError: f is another when the model is given the labels.
    """
    if "labels" not in inputs or not bool(torch.isfinite(f).all()):
        return
    args, kwargs = arguments(model, inputs)
    with _as_it_was(model), torch.no_grad():
        try:
            told = readout(model(*args, **kwargs, labels=inputs["labels"]), inputs)
        except (*UNUSABLE, InputError, NonFinite, NotImplementedError):
            return  # what it cannot take is the readout's alone
    # What labels do not enter is computed alike, and f may hardly depend on what its gradient is made of.
    if told.shape == f.shape and not float((told - f).abs().max()) <= rounding(f.dtype) * float(f.abs().max()):
        off = float((told - f).norm())
        how = "decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels)"
        hint = f", as {how}" if hasattr(model, "prepare_decoder_input_ids_from_labels") else ""
        raise InputError(
            f"inputs: {type(model).__name__} makes its outputs of labels too (f is off by {off:.1e} without "
            f"them), but they only reach the readout; give what it makes of them under another name{hint}"
        )


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Within the block the model may note things in its modules and configurations; at its end they are gone."""
    before = Attributes(model)
    configs = {
        id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None and hasattr(c, "__dict__")
    }
    told = [(vars(c), dict(vars(c))) for c in configs.values()]
    try:
        yield
    finally:
        before.restore()
        for held, was in told:
            held.clear()
            held.update(was)
