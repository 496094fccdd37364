"""Whether padding is left alone: on the right it may be cut then, on the left nobody counts it as positions."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from ntkengine.inputs.attributes import Attributes, plain_values
from ntkengine.inputs.batches import TOKEN_KEYS, Samples
from ntkengine.inputs.readout import Readout
from ntkengine.inputs.running import call_model
from ntkengine.inputs.streaming import is_streamed
from ntkengine.tangents.rehearsal import agreement, close

log = logging.getLogger(__name__)

# Relative change of f that rounding explains when the width changes; more, and padding is looked at.
CUT = {torch.float64: 1e-7, torch.float32: 1e-5}
_TOLD = 10.0  # times as much is no rounding, and told
_LENGTHS, _WIDTHS = 12, 4  # at which cuts are tried
_FEW = 4, 2  # likewise, where each reads all weights again


def trim_holds(model: nn.Module, samples: Samples, readout: Readout, parameter: nn.Parameter) -> bool:
    """Return whether cutting padding columns leaves f, and the model's settings, unchanged.

    On examples of a dozen lengths, and in the widths of four microbatches: strided convolutions and pooling may see
    padding at some widths only. Of a streamed model on fewer; what they miss, the examples compared after the sweep
    may show.
    """
    if not any(samples.trim):
        return False
    pairs: list[tuple[Tensor, Tensor]] = []

    most = _FEW if is_streamed(model) else (_LENGTHS, _WIDTHS)
    for group, tried in _cuts(samples, *most).items():
        before, state = Attributes(model), plain_values(model)
        rows = torch.tensor([row for row, _ in tried])
        few = {k: v[rows.to(v.device)] for k, v in samples.groups[group].items()}
        try:
            whole = outputs_of(model, Samples([few], trim=False), readout, parameter)
            for i, (_, width) in enumerate(tried):
                cut = {k: v[i : i + 1, :width] if k in TOKEN_KEYS else v[i : i + 1] for k, v in few.items()}
                pairs.append((whole[i : i + 1], outputs_of(model, Samples([cut], trim=False), readout, parameter)))
                if plain_values(model) != state:  # its attention, for good, when it meets a short input
                    before.restore()
                    _warn(pairs)
                    return _uncut("the model changes with the width of its inputs")
                if pairs[-1][0].shape != pairs[-1][1].shape:
                    return _uncut("the outputs' shape depends on it")
        except (RuntimeError, IndexError, ValueError):
            return _uncut("the model wants the width it is given")
    scale = max((float(f.norm()) for f, _ in pairs), default=0.0)
    if not all(float((f - cut).norm()) <= CUT.get(f.dtype, 1e-2) * scale for f, cut in pairs):
        _warn(pairs)
        return _uncut("f depends on it")
    return True


def _warn(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Warn where f of examples as padded is not f of them cut."""
    scale = max((float(f.norm()) for f, _ in pairs), default=0.0)
    worst = max((float((f - cut).norm()) for f, cut in pairs), default=0.0) / scale if scale else 0.0
    dtype = pairs[0][0].dtype if pairs else torch.float64
    if worst > min(_TOLD * CUT.get(dtype, 1e-2), agreement(dtype)):
        log.warning(
            "inputs: padding changes f, by a relative %.0e: this is the kernel of inputs as padded, and "
            "a wider batch has another; pass examples of one length at a time for that without padding",
            worst,
        )


def outputs_of(model: nn.Module, samples: Samples, readout: Readout, parameter: nn.Parameter) -> Tensor:
    """Return f of the examples of one group, (n, C), in their order."""
    found = []
    for chunk in samples.chunks:
        inputs = samples.inputs(chunk, parameter.device, parameter.dtype)
        with torch.no_grad():
            found.append(readout(call_model(model, inputs), inputs))
    return torch.cat(found)[torch.from_numpy(samples.unsort(0))]


def _uncut(reason: str) -> bool:
    log.info("padding is kept, which takes longer: %s", reason)
    return False


def _cuts(samples: Samples, lengths_tried: int, widths_tried: int) -> dict[int, list[tuple[int, int]]]:
    """Return (example, width) of the cuts to try, by group: at so many lengths and widths of microbatches."""
    found: dict[int, list[tuple[int, int]]] = {}
    for g, trimmed in enumerate(samples.trim):
        if not trimmed:
            continue
        lengths = samples.lengths[g]
        rows: dict[int, list[int]] = {}
        for row in samples.order[g][::-1]:
            rows.setdefault(int(lengths[row]), []).append(int(row))
        together = {int(lengths[c.rows].max()): int(c.rows[0]) for c in samples.chunks if c.group == g}
        tried, lone = found.setdefault(g, []), _spread(rows, lengths_tried)
        while len(tried) < lengths_tried and any(rows[w] for w in lone):  # of few lengths several
            tried.extend((rows[w].pop(), w) for w in lone if rows[w])
        tried.extend((together[w], w) for w in _spread(together, widths_tried))
    return found


def _spread(widths: Iterable[int], most: int) -> list[int]:
    """Return at most so many of the widths, ascending, the least and the largest among them."""
    every = sorted(widths)
    places = {round(i * (len(every) - 1) / max(1, most - 1)) for i in range(most)}
    return [every[i] for i in sorted(places)]


def warn_of_kept_padding(model: nn.Module, samples: Samples, readout: Readout, parameter: nn.Parameter) -> None:
    """Log a warning when padding on the right, which other inputs of many tokens keep, changes f of the most padded.

    Labels and embedded tokens are cut with the mask. Decoders have tokens of their own, and are left out.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return
    known = {*TOKEN_KEYS, "labels", "inputs_embeds"}
    for group, trimmed in zip(samples.groups, samples.trim, strict=True):
        mask = group.get("attention_mask")
        if trimmed or mask is None or mask.ndim != 2 or bool((mask[:, :-1] < mask[:, 1:]).any()):
            continue
        lengths = (mask != 0).sum(1)
        row = int(lengths.argmin())
        width = int(lengths[row])
        keys = {k for k, v in group.items() if k in known and v.shape[1:2] == mask.shape[1:]}
        _warn(_given_and_cut(model, group, row, keys, slice(width), readout, parameter))


def warn_of_left_padding(model: nn.Module, samples: Samples, readout: Readout, parameter: nn.Parameter) -> None:
    """Log a warning when padding on the left changes f, on the most padded sample.

    A model that counts positions from the first column gives an example other outputs, and so another kernel, in a
    wider batch. Nothing is wrong with the Gram of these very tensors, but hardly anyone wants it.
    """
    for group in samples.groups:
        mask = group.get("attention_mask")
        if mask is None or mask.ndim != 2 or "position_ids" in group:
            continue
        before = (mask != 0).int().argmax(1)
        row = int(before.argmax())
        cut = int(before[row])
        if not cut:
            continue
        keys = {k for k, v in group.items() if v.shape[1:] == mask.shape[1:]}
        pairs = _given_and_cut(model, group, row, keys, slice(cut, None), readout, parameter)
        if pairs and not close(*pairs[0]):
            f, cut_f = pairs[0]
            log.warning(
                "inputs: the model counts positions from the first column, so padding on the left changes f (example "
                "%d: by %.1e); pad on the right, or pass position_ids",
                row,
                float((f - cut_f).abs().max()),
            )
            return


def _given_and_cut(
    model: nn.Module,
    group: Mapping[str, Tensor],
    row: int,
    keys: Collection[str],
    columns: slice,
    readout: Readout,
    parameter: nn.Parameter,
) -> list[tuple[Tensor, Tensor]]:
    """Return (f of an example as given, f of some columns of some inputs); nothing where the model wants them all."""
    alone = Samples([{k: v[row : row + 1] for k, v in group.items()}], trim=False)
    one = alone.inputs(alone.chunks[0], parameter.device, parameter.dtype)
    bare = {k: v[:, columns] if k in keys else v for k, v in one.items()}
    before = Attributes(model)
    try:
        with torch.no_grad():
            f, cut_f = (readout(call_model(model, x), x) for x in (one, bare))
    except (RuntimeError, IndexError, ValueError):
        return []
    finally:
        before.restore()
    return [(f, cut_f)] if f.shape == cut_f.shape else []
