"""First contact: whether the model runs on these inputs, repeats itself, and minds the examples beside one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ntkengine.errors import CheckFailed, InputError
from ntkengine.inputs.attributes import Attributes, Place, empty, held_tensors
from ntkengine.inputs.batches import Samples
from ntkengine.inputs.readout import Readout
from ntkengine.inputs.running import FIRST_CALLS, call_model, coarsest, explained, wanting_gradients
from ntkengine.inputs.sources import Source, as_inputs
from ntkengine.inputs.unrounded import unrounded, watching
from ntkengine.tangents.labelled import check_labels
from ntkengine.tangents.padding import CUT, outputs_of, trim_holds
from ntkengine.tangents.rehearsal import agreement, close, rounding

_SIZES = {"token_type_ids": "type_vocab_size", "position_ids": "max_position_embeddings"}
_PLACES = 8  # emptied one by one at most


def settled(model: nn.Module, inputs: Source, readout: Readout, selected: Mapping[str, nn.Parameter]) -> Samples:
    """Return the examples in microbatches that give each the f it has as given, alone; padding is cut where it may be.

    Args:
        model: within `evaluation`.
        inputs: examples, in any form that `as_inputs` takes.
        readout: f.
        selected: parameters, whose first says the device and dtype.

    Raises:
        InputError, CheckFailed: as `check_repeats`, or f of an example depends on the others of its batch.

    Cost: about a dozen forward passes of one example.
    """
    inputs = as_inputs(inputs, model)
    given, parameter = Samples([inputs]), next(iter(selected.values()))
    check_repeats(model, given, readout, selected)
    trim = trim_holds(model, given, readout, parameter)
    order = given.order[0]
    rows = torch.from_numpy(order[sorted({0, len(order) // 2, len(order) - 1})])
    few = {k: v[rows.to(v.device)] for k, v in inputs.items()}

    def outputs(size: int, *, trim: bool) -> Tensor:
        return outputs_of(model, Samples([few], microbatch=size, trim=trim), readout, parameter)

    f = outputs(1, trim=False)
    dtype, alone = coarsest(model, f), f.double()
    if trim:
        cut = outputs(1, trim=True).double()
        trim = bool(((cut - alone).norm(dim=1) <= CUT.get(f.dtype, 1e-2) * alone.norm(dim=1).max()).all())
        alone = cut if trim else alone
    together = outputs(len(rows), trim=trim).double()
    allowed = agreement(dtype) * alone.norm(dim=1) + rounding(dtype) * alone.abs().max()
    for row, off, most in zip(rows.tolist(), (together - alone).norm(dim=1), allowed, strict=True):
        if off > most:  # never where f is not finite
            msg = (
                f"model: f of example {row} depends on the other examples of its batch, by {float(off):.1e}: it is no "
                "function of the example"
            )
            raise CheckFailed(msg)
    return given if trim else Samples([inputs], trim=False)


def check_repeats(model: nn.Module, samples: Samples, readout: Readout, selected: Mapping[str, nn.Parameter]) -> bool:
    """Run one sample twice; return whether kernels of other libraries than torch run.

    Raises:
        InputError: the model or the readout cannot be run on it, or keeps what depends on parameters for later calls.
        CheckFailed: the second output is another: the model draws random numbers, or keeps a state.
    """
    dtype = next(iter(selected.values())).dtype
    try:
        return _check_repeats(model, samples, readout, selected)
    except InputError:
        if dtype != torch.float64:
            raise
    with unrounded(dtype):  # as it will run, unless it has kernels of others: its own float32 may not go with float64
        return _check_repeats(model, samples, readout, selected)


def _check_repeats(model: nn.Module, samples: Samples, readout: Readout, selected: Mapping[str, nn.Parameter]) -> bool:
    if torch.is_inference_mode_enabled():
        msg = "model: gradients cannot be taken inside torch.inference_mode()"
        raise InputError(msg)
    one = Samples(samples.groups, microbatch=1, trim=False)
    chunk = one.chunks[0]
    parameter = next(iter(selected.values()))
    inputs = one.inputs(chunk, parameter.device, parameter.dtype)
    before, left, found = Attributes(model), [held_tensors(model)], []
    versions = [p._version for p in model.parameters()]
    where = f"example {int(chunk.rows[0])} in {str(parameter.dtype).removeprefix('torch.')}"
    bare = "labels" in inputs and getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    hint = " (labels only reach the readout: give decoder_input_ids too)" if bare else ""
    with explained(model, where, hint=hint), torch.no_grad(), watching() as libraries:
        found.append(readout(call_model(model, inputs), inputs))
        if [p._version for p in model.parameters()] != versions:  # RWKV's first call scales them, and notes it
            FIRST_CALLS[model] = before.changed()
            before, left = Attributes(model), [held_tensors(model)]
            found = [readout(call_model(model, inputs), inputs)]
        left.append(held_tensors(model))
        found.append(readout(call_model(model, inputs), inputs))
        left.append(held_tensors(model))
    before.restore()
    _run_suspects(model, samples, readout, parameter)
    start, once, twice = ({place: x for place, (_, x) in held.items()} for held in left)
    kept = [place for place, x in once.items() if x is twice.get(place) and x is not start.get(place)]
    if kept:
        with wanting_gradients(selected.values()):
            call_model(model, inputs)
        _refuse_kept(held_tensors(model), kept)
        before.restore()
    stayed = [place for place, x in start.items() if once.get(place) is x]  # the others are made in every call
    for places in [stayed, *([place] for place in stayed[:_PLACES])] if stayed else ():
        empty(model, places)  # a call before this one may have filled them
        now = None
        try:
            with wanting_gradients(selected.values()):
                call_model(model, inputs)
            now = held_tensors(model)
        except (RuntimeError, LookupError, TypeError, AttributeError, ValueError):
            pass  # it needs them
        finally:
            before.restore()
        if now is not None:
            _refuse_kept(now, places)
            break
    f, again = found
    if not f.is_floating_point() or not f.shape[1]:
        msg = f"readout {readout.name!r}: expected (N, C) real numbers with C ≥ 1, got {tuple(f.shape)} of {f.dtype}"
        raise InputError(msg)
    if bool(torch.isfinite(f).all()) and not close(again, f):
        msg = (
            f"model: {type(model).__name__} gives another output on the same input, by {float((again - f).norm()):.1e}:"
            " it draws random numbers or keeps a state, and so has no tangent kernel"
        )
        raise CheckFailed(msg)
    check_labels(model, samples, readout, parameter)
    return bool(libraries)


def _refuse_kept(now: Mapping[Place, tuple[str, Tensor]], places: Sequence[Place]) -> None:
    """Refuse tensors in attributes that a call with gradients has made from parameters."""
    for name, x in (now[place] for place in places if place in now):
        if x.requires_grad:
            msg = (
                f"model: {name} keeps what one call computed from the parameters for the calls after it, which then "
                "have no gradient; compute it in every call"
            )
            raise InputError(msg)


def _run_suspects(model: nn.Module, samples: Samples, readout: Readout, parameter: nn.Parameter) -> None:
    """Run what a model may not be able to: an example with ids beyond its table, two at once without a padding token.

    Raises:
        InputError: it cannot.
    """
    suspects = []
    sizes = _table_sizes(model)
    for g, group in enumerate(samples.groups):
        for name in sizes.keys() & group.keys():
            ids = group[name]
            if ids.ndim == 2:
                beyond = ((ids >= sizes[name]) | (ids < 0)).any(1).nonzero()[:1, 0]
                suspects += [(g, beyond, f"example {samples.example(g, int(row))}") for row in beyond]
    if getattr(getattr(model, "config", None), "pad_token_id", 0) is None and samples.sizes[0] > 1:
        suspects.append((0, torch.arange(2), "two examples at once"))
    for g, rows, what in suspects:
        few = Samples([{k: v[rows.to(v.device)] for k, v in samples.groups[g].items()}], microbatch=2, trim=False)
        inputs = few.inputs(few.chunks[0], parameter.device, parameter.dtype)
        before = Attributes(model)
        with explained(model, what), torch.no_grad():
            readout(call_model(model, inputs), inputs)
        before.restore()


def _table_sizes(model: nn.Module) -> dict[str, int]:
    """Return how many ids a model has rows for, by input, as far as it says; a multimodal one may take others."""
    config = getattr(model, "config", None)
    found = {name: getattr(config, key, None) for name, key in _SIZES.items()}
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        table = None
    if isinstance(table, nn.Embedding):
        found |= dict.fromkeys(("input_ids", "decoder_input_ids"), table.num_embeddings)
    return {name: size for name, size in found.items() if isinstance(size, int)}
