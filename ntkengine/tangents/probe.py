"""Which way each parameter's gradient is taken, decided by comparing with plain autograd on a few samples.

For every selected parameter and every segment that uses it, the cheapest path whose per-sample gradients equal those of
plain autograd, one sample at a time, is kept:
    1. from the module's recorded input and output gradient, microbatch at once (outer, lookup, sum, norm);
    2. the module's own VJP, vmapped over the microbatch (leaf);
    3. and 4. the same, one sample at a time (rows that carry no sample axis, such as routed experts);
    5. plain autograd of the segment, one sample at a time (block).
So a parameter can be slow, but never forgotten, counted twice, or attributed to the wrong sample.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ntkengine.errors import CheckFailed, NonFinite
from ntkengine.inputs.batches import Samples
from ntkengine.inputs.readout import Readout
from ntkengine.tangents.blocks import Stack, call_model, cut_forward, find_stack, wanting_gradients
from ntkengine.tangents.capture import matrix_shape
from ntkengine.tangents.verify import (
    Owners,
    Recording,
    agreeing,
    agreeing_alone,
    close,
    factors_of,
    reference_gradients,
)


@dataclass(frozen=True)
class Path:
    """How one parameter's gradient is taken in one segment.

    Attributes:
        parameter: the parameter's name.
        segment: the segment that uses it.
        owners: (module, the parameter's own name there, path kind) for every module whose calls are used; empty for
            plain autograd of the segment.
    """

    parameter: str
    segment: int
    owners: Owners

    @property
    def kind(self) -> str:
        """The path's name in a plan."""
        return "+".join(sorted({k for _, _, k in self.owners})) or "block"


@dataclass
class Structure:
    """What the sweep needs to know about a model.

    Attributes:
        stack: its blocks.
        paths: by segment.
        shapes: by parameter: (R, I) of its gradient's matrix.
        unused: selected parameters that f does not depend on (their gradient is zero).
        one_by_one: microbatches must hold one sample.
        trim: padding columns may be cut.
        outputs: C.
        tokens: by parameter: token axis of its factors on the probed samples.
    """

    stack: Stack
    paths: dict[int, list[Path]] = field(default_factory=lambda: defaultdict(list))
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    one_by_one: bool = False
    trim: bool = True
    outputs: int = 0
    tokens: dict[str, int] = field(default_factory=dict)

    def on(self, model: nn.Module) -> Structure:
        """Return the same structure for a copy of the model."""
        blocks = tuple(model.get_submodule(name) for name in self.stack.names)
        return replace(self, stack=replace(self.stack, blocks=blocks))


def probe(
    model: nn.Module, selected: Mapping[str, nn.Parameter], samples: Samples, readout: Readout, seed: int = 0
) -> Structure:
    """Return the model's structure and a verified path for every selected parameter.

    Args:
        model: frozen, in eval mode (`blocks.evaluation`).
        selected: parameters by name.
        samples: the job's samples; the shortest, middle and longest of the first group are probed.
        readout: f.
        seed: of the random cotangents.

    Raises:
        CheckFailed: a parameter that even plain autograd of its segment does not reproduce.
        NonFinite: a gradient of the model that is not finite.
    Cost: about ten forward and backward passes of three samples, one segment's gradients at a time.
    """
    parameter = next(iter(selected.values()))
    trim = _trim_holds(model, samples, readout, parameter)
    order = samples.order[0]
    rows = order[sorted({0, len(order) // 2, len(order) - 1})]
    few = Samples(
        [{k: v[torch.from_numpy(rows).to(v.device)] for k, v in samples.groups[0].items()}], microbatch=3, trim=trim
    )
    inputs = few.inputs(few.chunks[0], parameter.device, parameter.dtype)
    n = len(rows)
    stack = find_stack(model, inputs, n) if n > 1 else find_stack(model, {k: v[:1] for k, v in inputs.items()}, 1)
    owners = _owners(model, selected)
    for attempt in (stack, Stack()):
        found = _assign(model, selected, owners, inputs, attempt, readout, seed)
        if found is not None:
            found.trim = trim
            return found
    msg = "the model's forward pass could not be reproduced as one segment"
    raise CheckFailed(msg)


def _owners(model: nn.Module, selected: Mapping[str, nn.Parameter]) -> dict[str, list[tuple[str, str]]]:
    names = {id(p): name for name, p in selected.items()}
    owners: dict[str, list[tuple[str, str]]] = {name: [] for name in selected}
    for module_name, module in model.named_modules():
        for local, p in module._parameters.items():
            if p is not None and id(p) in names:
                owners[names[id(p)]].append((module_name, local))
    return owners


def _assign(
    model: nn.Module,
    selected: Mapping[str, nn.Parameter],
    owners: dict[str, list[tuple[str, str]]],
    inputs: Mapping[str, Tensor],
    stack: Stack,
    readout: Readout,
    seed: int,
) -> Structure | None:
    """Return verified paths, or None when segments are tied by more than the hidden states."""
    n = len(next(iter(inputs.values())))
    modules = {m: model.get_submodule(m) for places in owners.values() for m, _ in places}
    singles = [{k: v[i : i + 1] for k, v in inputs.items()} for i in range(n)]
    batch = Recording(model, modules, inputs, stack, readout)
    with wanting_gradients(selected.values()):
        return _verified(model, selected, owners, modules, stack, readout, seed, singles, batch)


def _verified(
    model: nn.Module,
    selected: Mapping[str, nn.Parameter],
    owners: dict[str, list[tuple[str, str]]],
    modules: dict[str, nn.Module],
    stack: Stack,
    readout: Readout,
    seed: int,
    singles: list[dict[str, Tensor]],
    batch: Recording,
) -> Structure | None:
    n = batch.n
    references = [cut_forward(model, one, stack, readout) for one in singles]
    if not all(r.sealed for r in references):
        return None
    if stack.blocks and any(out.shape[0] != n for out in batch.cut.outs):
        return None
    alone: list[Recording] = []  # recorded on demand
    structure = Structure(stack, outputs=int(references[0].outs[-1].shape[1]))
    f_one = torch.cat([r.outs[-1].detach() for r in references])
    structure.one_by_one = not close(batch.cut.outs[-1].detach(), f_one, float(f_one.abs().max()))
    generator = torch.Generator().manual_seed(seed)
    used: set[str] = set()
    for segment in range(len(batch.cut.outs)):
        out = batch.cut.outs[segment]
        v = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
        truth = reference_gradients(references, segment, selected, v)
        if truth is None:
            return None
        scale = max((float(g.norm()) for grads in truth.values() for g in grads), default=0.0)
        pulled = batch.pull(segment, v)
        for name, grads in truth.items():
            used.add(name)
            if any(not bool(torch.isfinite(g).all()) for g in grads):
                msg = f"{name}: its gradient is not finite on the probed samples"
                raise NonFinite(msg)
            here = [(m, local) for m, local in owners[name] if m in batch.calls[segment]]
            choice = None if structure.one_by_one else agreeing(model, name, here, pulled, n, grads, scale)
            if choice is None:
                if not alone:
                    alone = [Recording(model, modules, one, stack, readout) for one in singles]
                structure.one_by_one = True
                choice = agreeing_alone(
                    model, name, here, [r.pull(segment, v[i : i + 1]) for i, r in enumerate(alone)], grads, scale
                )
            if segment == stack.head and choice and not structure.one_by_one:
                # Real cotangents here, random ones below: only the head shows which tokens f looks at.
                structure.tokens[name] = factors_of(model, name, choice, pulled, n, grads[0]).tokens
            path = Path(name, segment, choice or ())
            structure.paths[segment].append(path)
            _settle_shape(structure, path, selected[name])
    structure.unused = [name for name in selected if name not in used]
    return structure


def _settle_shape(structure: Structure, path: Path, p: nn.Parameter) -> None:
    shape = matrix_shape(p)
    shape = shape[::-1] if path.kind == "outer-transposed" else shape
    if structure.shapes.setdefault(path.parameter, shape) != shape:
        msg = f"{path.parameter}: is used both transposed and not; exclude it from params"
        raise CheckFailed(msg)


def _trim_holds(model: nn.Module, samples: Samples, readout: Readout, parameter: nn.Parameter) -> bool:
    """Whether cutting padding columns leaves f unchanged, on the shortest sample."""
    if not any(samples.trim):
        return False
    with torch.no_grad():
        f = []
        for trim in (True, False):
            one = Samples(samples.groups, microbatch=1, trim=trim)
            inputs = one.inputs(one.chunks[0], parameter.device, parameter.dtype)
            f.append(readout(call_model(model, inputs), inputs))
    return close(f[0], f[1], float(f[1].abs().max()))
