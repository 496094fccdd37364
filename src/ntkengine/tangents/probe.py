"""Which way each parameter's gradient is taken, decided by comparing with plain autograd on a few samples.

For every selected parameter and every segment that uses it, the cheapest path whose per-sample gradients equal those of
plain autograd, one sample at a time, is kept:
    1. from the module's recorded input and output gradient, microbatch at once (outer, lookup, sum, norm,
       convolution);
    2. the module's own VJP, vmapped over the microbatch (leaf);
    3. as 1, one sample at a time (rows that carry no sample axis, such as routed experts);
    4. plain autograd of the segment, one sample at a time (block).
So a parameter can be slow, but never forgotten, counted twice, or attributed to the wrong sample.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ntkengine.errors import CheckFailed, InputError
from ntkengine.inputs.batches import Samples
from ntkengine.inputs.embeddings import sparse_tables
from ntkengine.inputs.parameters import leave_out
from ntkengine.inputs.readout import Readout
from ntkengine.inputs.running import call_model, wanting_gradients
from ntkengine.inputs.unrounded import unrounded
from ntkengine.tangents.blocks import Stack, find_stack
from ntkengine.tangents.padding import trim_holds, warn_of_kept_padding, warn_of_left_padding
from ntkengine.tangents.rehearsal import Rehearsal, close
from ntkengine.tangents.settle import GRADIENTS, Verifier
from ntkengine.tangents.structure import Structure
from ntkengine.tangents.trial import check_repeats

log = logging.getLogger(__name__)

_CONTAINERS = (nn.ParameterDict, nn.ParameterList, nn.ModuleDict, nn.ModuleList)


def probe(
    model: nn.Module,
    selected: Mapping[str, nn.Parameter],
    samples: Samples,
    readout: Readout,
    seed: int = 0,
    gradients: int = GRADIENTS,
    keep_bytes: int = 0,
) -> Structure:
    """Return the model's structure and a verified path for every selected parameter.

    Args:
        model: frozen, in eval mode (`running.evaluation`).
        selected: parameters by name.
        samples: the job's; the shortest, middle and longest are probed, and any that uses a parameter these do not.
        readout: f.
        seed: of the random cotangents.
        gradients: gradient entries to hold at once.
        keep_bytes: activations that may be kept rather than recomputed.

    Raises:
        InputError: f depends on no selected parameter.
        CheckFailed: a parameter that even plain autograd of its segment does not reproduce.
        NonFinite: a gradient of the model that is not finite.
    Cost: about ten forward and backward passes of three samples, one segment's gradients at a time.
    """
    parameter = next(iter(selected.values()))
    foreign = check_repeats(model, samples, readout, selected)
    with unrounded(parameter.dtype, foreign=foreign):
        trim = trim_holds(model, samples, readout, parameter)
        warn_of_kept_padding(model, samples, readout, parameter)
        warn_of_left_padding(model, samples, readout, parameter)
        group = int(np.argmax(samples.sizes))
        order = samples.order[group]
        rows = [(group, int(order[i])) for i in sorted({0, len(order) // 2, len(order) - 1})]
        owners = _owners(model, selected)
        while True:
            few = _pick(samples, rows, trim)
            structure = _structure(model, selected, owners, few, readout, rows, parameter, seed, gradients, keep_bytes)
            structure.trim, structure.foreign = trim, foreign
            late = _late_user(model, [selected[name] for name in structure.unused], samples, readout, parameter)
            if late is None and len(structure.unused) == len(selected):
                name = structure.unused[0]
                found = f"the outputs depend on none of the selected parameters ({name}, …)"
                raise InputError(f"params: {found}: is the readout detached?")
            if late is None:
                return structure
            if late in rows:
                name = structure.unused[0]
                msg = f"{name}: whether f depends on it could not be settled; {leave_out(name)}"
                raise CheckFailed(msg)
            rows.append(late)


def _structure(
    model: nn.Module,
    selected: Mapping[str, nn.Parameter],
    owners: dict[str, list[tuple[str, str]]],
    few: Samples,
    readout: Readout,
    rows: list[tuple[int, int]],
    parameter: nn.Parameter,
    seed: int,
    gradients: int,
    keep_bytes: int,
) -> Structure:
    inputs = few.inputs(few.chunks[0], parameter.device, parameter.dtype)
    names = [f"{row}{' of the second inputs' if group else ''}" for group, row in (rows[i] for i in few.chunks[0].rows)]
    for stack in (find_stack(model, inputs, len(rows)), Stack()):
        found = _assign(model, selected, owners, inputs, stack, readout, names, seed, gradients, keep_bytes)
        if found is not None:
            return found
    msg = "the model's forward pass could not be reproduced as one segment"
    raise CheckFailed(msg)


def _pick(samples: Samples, rows: list[tuple[int, int]], trim: bool) -> Samples:
    """Return the probed samples as one microbatch; those of another group than the first are padded to its width."""
    parts = []
    width = (
        max(v.shape[1] for g, _ in rows for v in samples.groups[g].values() if v.ndim > 1)
        if len({g for g, _ in rows}) > 1
        else 0
    )
    for g, r in rows:
        one = {k: v[r : r + 1] for k, v in samples.groups[g].items()}
        parts.append(
            {k: nn.functional.pad(v, (0, width - v.shape[1])) if width and v.ndim == 2 else v for k, v in one.items()}
        )
    return Samples([{k: torch.cat([part[k] for part in parts]) for k in parts[0]}], microbatch=len(rows), trim=trim)


def _late_user(
    model: nn.Module, unused: list[nn.Parameter], samples: Samples, readout: Readout, parameter: nn.Parameter
) -> tuple[int, int] | None:
    """Return a sample whose f depends on a parameter that the probed ones left unused (a routed expert), or None.

    Cost: nothing when every parameter was used; else one forward pass of all samples.
    """
    if not unused:
        return None
    with wanting_gradients(unused):
        for chunk in samples.chunks:
            inputs = samples.inputs(chunk, parameter.device, parameter.dtype)
            if not readout(call_model(model, inputs), inputs).requires_grad:
                continue
            for i in range(chunk.n):
                one = {k: v[i : i + 1] for k, v in inputs.items()}
                if readout(call_model(model, one), one).requires_grad:
                    return chunk.group, int(chunk.rows[i])
    return None


def _owners(model: nn.Module, selected: Mapping[str, nn.Parameter]) -> dict[str, list[tuple[str, str]]]:
    """Return (module, the parameter's name there) for each place that holds a parameter.

    Lists and dictionaries are never called: what they hold belongs to the module around them.
    """
    names = {id(p): name for name, p in selected.items()}
    owners: dict[str, list[tuple[str, str]]] = {name: [] for name in selected}
    for module_name, module in model.named_modules():
        for local, p in module._parameters.items():
            if p is not None and id(p) in names:
                owner, inside = module_name, local
                while owner and isinstance(model.get_submodule(owner), _CONTAINERS):
                    owner, _, key = owner.rpartition(".")
                    inside = f"{key}.{inside}"
                owners[names[id(p)]].append((owner, inside))
    return owners


def _assign(
    model: nn.Module,
    selected: Mapping[str, nn.Parameter],
    owners: dict[str, list[tuple[str, str]]],
    inputs: Mapping[str, Tensor],
    stack: Stack,
    readout: Readout,
    rows: list[str],
    seed: int,
    gradients: int,
    keep_bytes: int,
) -> Structure | None:
    """Return verified paths, or None when segments are tied by more than the hidden states."""
    n = len(next(iter(inputs.values())))
    modules = {m: model.get_submodule(m) for places in owners.values() for m, _ in places}
    singles = [{k: v[i : i + 1] for k, v in inputs.items()} for i in range(n)]
    with wanting_gradients(selected.values()), sparse_tables(model):
        expanded = _expanded(model, modules, inputs, stack, readout)
        # One is run again by segments as the whole batch is; the others need not, if their graphs can be kept.
        small = expanded is not None and sum(expanded.held) <= keep_bytes
        alone = [
            Rehearsal(model, modules, one, stack, readout, expand=(), keep=small and i > 0)
            for i, one in enumerate(singles)
        ]
        if not all(r.apart for r in alone):
            return None
        f = torch.cat([r.f for r in alone])
        if expanded is not None and close(expanded.f, f):
            batch, agrees = expanded, True
        else:
            batch = Rehearsal(model, modules, inputs, stack, readout, expand=(), measure=True)
            agrees = close(batch.f, f)
        if stack.blocks and not batch.whole:
            return None
        tokens = max((v.shape[0] * v.shape[1] for v in inputs.values() if v.ndim == 2), default=n)
        structure = Structure(stack, outputs=int(batch.f.shape[1]), expand=batch.expand, one_by_one=not agrees)
        structure.held = [held / tokens for held in batch.held]
        verifier = Verifier(model, selected, owners, structure, batch, alone, rows, seed, gradients)
        for segment in range(stack.head + 1):
            if not verifier.segment(segment):
                return None
    if not any(r.depends for r in alone):
        verifier.used.clear()
    structure.unused = [name for name in selected if name not in verifier.used]
    structure.negligible = [name for name in selected if name in verifier.used - verifier.felt]
    if not agrees:
        log.warning(
            "model: f of an example depends on the others of its batch (by %.1e): this is the kernel of each example "
            "alone",
            float((batch.f - f).norm()),
        )
    return structure


def _expanded(
    model: nn.Module, modules: dict[str, nn.Module], inputs: Mapping[str, Tensor], stack: Stack, readout: Readout
) -> Rehearsal | None:
    """Return all samples in one batch, rows that stand for all given to each of them; None where that cannot be."""
    try:
        return Rehearsal(model, modules, inputs, stack, readout, expand=modules, measure=True)
    except (RuntimeError, IndexError, ValueError) as error:
        log.debug("rows cannot be given to every sample: %s", error)
        return None
