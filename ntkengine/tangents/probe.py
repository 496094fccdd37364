"""Which way each parameter's gradient is taken, decided by comparing with plain autograd on a few samples.

For every selected parameter and every segment that uses it, the cheapest path whose per-sample gradients equal those of
plain autograd, one sample at a time, is kept:
    1. from the module's recorded input and output gradient, microbatch at once (outer, lookup, sum, norm);
    2. the module's own VJP, vmapped over the microbatch (leaf);
    3. as 1, one sample at a time (rows that carry no sample axis, such as routed experts);
    4. plain autograd of the segment, one sample at a time (block).
So a parameter can be slow, but never forgotten, counted twice, or attributed to the wrong sample.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from ntkengine.errors import CheckFailed, NonFinite
from ntkengine.inputs.batches import Samples
from ntkengine.inputs.parameters import leave_out
from ntkengine.inputs.readout import Readout
from ntkengine.inputs.running import call_model, wanting_gradients
from ntkengine.tangents.blocks import Stack, find_stack
from ntkengine.tangents.capture import Call, Pulled, matrix_shape
from ntkengine.tangents.rehearsal import Rehearsal, Scene, close, rounding
from ntkengine.tangents.trial import check_repeats, trim_holds, warn_of_left_padding
from ntkengine.tangents.verify import (
    Owners,
    Truth,
    agreeing,
    calls_of,
    factors_of,
    reference_gradients,
    uses_in_graph,
)

log = logging.getLogger(__name__)

GRADIENTS = 1 << 26  # gradient entries the probe and the check hold at once
_CONTAINERS = (nn.ParameterDict, nn.ParameterList, nn.ModuleDict, nn.ModuleList)


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
        negligible: those whose gradient is zero but for rounding on every probed sample.
        transposed: by parameter: whether its gradient's matrix is the parameter's transpose.
        one_by_one: microbatches must hold one sample.
        trim: padding columns may be cut.
        outputs: C.
        expand: an output with one row stands for all samples (`capture.Recorder`).
        tokens: by parameter: token axis of its factors on the probed samples.
    """

    stack: Stack
    paths: dict[int, list[Path]] = field(default_factory=lambda: defaultdict(list))
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    negligible: list[str] = field(default_factory=list)
    transposed: dict[str, bool] = field(default_factory=dict)
    one_by_one: bool = False
    trim: bool = True
    outputs: int = 0
    expand: bool = True
    tokens: dict[str, int] = field(default_factory=dict)
    per_call: dict[str, int] = field(default_factory=dict)
    held: list[float] = field(default_factory=list)

    def on(self, model: nn.Module) -> Structure:
        """Return the same structure for a copy of the model."""
        blocks = tuple(model.get_submodule(name) for name in self.stack.names)
        return replace(self, stack=replace(self.stack, blocks=blocks))


def probe(
    model: nn.Module,
    selected: Mapping[str, nn.Parameter],
    samples: Samples,
    readout: Readout,
    seed: int = 0,
    gradients: int = GRADIENTS,
) -> Structure:
    """Return the model's structure and a verified path for every selected parameter.

    Args:
        model: frozen, in eval mode (`running.evaluation`).
        selected: parameters by name.
        samples: the job's; the shortest, middle and longest are probed, and any that uses a parameter these do not.
        readout: f.
        seed: of the random cotangents.
        gradients: gradient entries to hold at once.

    Raises:
        CheckFailed: a parameter that even plain autograd of its segment does not reproduce.
        NonFinite: a gradient of the model that is not finite.
    Cost: about ten forward and backward passes of three samples, one segment's gradients at a time.
    """
    parameter = next(iter(selected.values()))
    check_repeats(model, samples, readout, parameter)
    trim = trim_holds(model, samples, readout, parameter)
    warn_of_left_padding(model, samples, readout, parameter)
    group = int(np.argmax(samples.sizes))
    order = samples.order[group]
    rows = [(group, int(order[i])) for i in sorted({0, len(order) // 2, len(order) - 1})]
    owners = _owners(model, selected)
    while True:
        few = _pick(samples, rows, trim)
        structure = _structure(model, selected, owners, few, readout, rows, parameter, seed, gradients)
        structure.trim = trim
        late = _late_user(model, [selected[name] for name in structure.unused], samples, readout, parameter)
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
) -> Structure:
    inputs = few.inputs(few.chunks[0], parameter.device, parameter.dtype)
    names = [f"{row}{' of the second inputs' if group else ''}" for group, row in (rows[i] for i in few.chunks[0].rows)]
    for stack in (find_stack(model, inputs, len(rows)), Stack()):
        found = _assign(model, selected, owners, inputs, stack, readout, names, seed, gradients)
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
) -> Structure | None:
    """Return verified paths, or None when segments are tied by more than the hidden states."""
    n = len(next(iter(inputs.values())))
    modules = {m: model.get_submodule(m) for places in owners.values() for m, _ in places}
    singles = [{k: v[i : i + 1] for k, v in inputs.items()} for i in range(n)]
    with wanting_gradients(selected.values()):
        alone = [Rehearsal(model, modules, one, stack, readout, expand=False) for one in singles]
        if not all(r.apart for r in alone):
            return None
        batch, agrees = _batch(model, modules, inputs, stack, readout, torch.cat([r.f for r in alone]))
        if stack.blocks and not batch.whole:
            return None
        tokens = max((v.shape[0] * v.shape[1] for v in inputs.values() if v.ndim == 2), default=n)
        structure = Structure(stack, outputs=int(batch.f.shape[1]), expand=batch.expand, one_by_one=not agrees)
        structure.held = [held / tokens for held in batch.held]
        verifier = _Verifier(model, selected, owners, structure, batch, alone, rows, seed, gradients)
        for segment in range(stack.head + 1):
            if not verifier.segment(segment):
                return None
    structure.unused = [name for name in selected if name not in verifier.used]
    structure.negligible = [name for name in selected if name in verifier.used - verifier.felt]
    return structure


def _batch(
    model: nn.Module,
    modules: dict[str, nn.Module],
    inputs: Mapping[str, Tensor],
    stack: Stack,
    readout: Readout,
    f: Tensor,
) -> tuple[Rehearsal, bool]:
    """Return all samples in one batch, and whether its f is that of the samples one by one."""
    try:
        batch = Rehearsal(model, modules, inputs, stack, readout, expand=True, measure=True)
        if close(batch.f, f):
            return batch, True
    except (RuntimeError, IndexError, ValueError) as error:
        log.debug("rows cannot be given to every sample: %s", error)
    batch = Rehearsal(model, modules, inputs, stack, readout, expand=False, measure=True)
    return batch, close(batch.f, f)


@dataclass
class _Verifier:
    """Chooses a path for every parameter, segment by segment."""

    model: nn.Module
    selected: Mapping[str, nn.Parameter]
    owners: dict[str, list[tuple[str, str]]]
    structure: Structure
    batch: Rehearsal
    alone: list[Rehearsal]
    rows: list[str]
    seed: int
    gradients: int
    used: set[str] = field(default_factory=set)
    felt: set[str] = field(default_factory=set)

    def segment(self, segment: int) -> bool:
        """Settle one segment; False when it cannot be run again by itself."""
        found = [r.scene(segment) for r in self.alone]
        whole = self.batch.scene(segment)
        scenes = [scene for scene in found if scene is not None]
        if whole is None or len(scenes) < len(found):
            return False
        generator = torch.Generator().manual_seed(self.seed + segment)
        v = torch.randn(whole.out.shape, generator=generator, dtype=torch.float64).to(whole.out)
        met = [uses_in_graph(scene.out, self.selected) for scene in scenes]
        here = {name: p for name, p in self.selected.items() if any(m[name] for m in met)}
        parts = list(groups(here, self.gradients // len(scenes)))
        norms: dict[str, list[float]] = {}
        truths: list[dict[str, Truth]] = []
        for names in parts:
            truths = [reference_gradients(self.model, scenes, {name: here[name] for name in names}, v)]
            norms |= {name: truth.norms for name, truth in truths[0].items()}
        scale = max((norm for found in norms.values() for norm in found), default=0.0)
        if not math.isfinite(scale):
            name = next(name for name, found in norms.items() if not all(map(math.isfinite, found)))
            row = self.rows[next(i for i, norm in enumerate(norms[name]) if not math.isfinite(norm))]
            msg = f"{name}: the gradient is not finite for example {row}"
            raise NonFinite(msg)
        pulled = whole.pull(v)
        counts = uses_in_graph(whole.out, self.selected)
        for names in parts:
            truth = truths.pop() if len(parts) == 1 else None
            truth = truth or reference_gradients(self.model, scenes, {name: here[name] for name in names}, v)
            for name, true in truth.items():
                self._settle(segment, name, true, scale, v, whole, pulled, counts, scenes, met)
        return True

    def _settle(
        self,
        segment: int,
        name: str,
        true: Truth,
        scale: float,
        v: Tensor,
        whole: Scene,
        pulled: dict[str, list[Pulled]],
        counts: Mapping[str, int],
        scenes: list[Scene],
        met: Sequence[Mapping[str, int]],
    ) -> None:
        structure, n = self.structure, self.batch.n
        self.used.add(name)
        if max(true.norms) > rounding(true.like.dtype) * scale:
            self.felt.add(name)
        places = [(m, local) for m, local in self.owners[name] if m in whole.calls]
        choice = None
        if not structure.one_by_one:
            choice = agreeing(self.model, name, places, [pulled], [n], true, scale)
            if choice and not _all_seen(structure, Path(name, segment, choice), counts, whole.calls):
                places, choice = [], None  # used elsewhere too, though not felt on these samples
        if choice is None:
            structure.one_by_one = True
            each = [scene.pull(v[i : i + 1]) for i, scene in enumerate(scenes)]
            choice = agreeing(self.model, name, places, each, [1] * n, true, scale)
            path = Path(name, segment, choice or ())
            if not all(_all_seen(structure, path, m, s.calls) for m, s in zip(met, scenes, strict=True)):
                choice = None
        if segment == structure.stack.head and choice and not structure.one_by_one:
            # Real cotangents here, random ones below: only the head shows which tokens f looks at.
            structure.tokens[name] = factors_of(self.model, name, choice, pulled, n, true.like).tokens
        path = Path(name, segment, choice or ())
        structure.paths[segment].append(path)
        _settle_shape(structure, path, self.selected[name])


def _all_seen(structure: Structure, path: Path, met: Mapping[str, int], calls: Mapping[str, list[Call]]) -> bool:
    """Whether a graph uses a parameter nowhere but in its modules' recorded calls; a leaf may use it several times."""
    made = calls_of(path.owners, calls)
    if "leaf" in path.kind:
        each = -(-met[path.parameter] // max(made, 1))
        structure.per_call[path.parameter] = max(structure.per_call.get(path.parameter, 1), each)
    return not path.owners or met[path.parameter] <= made * structure.per_call.get(path.parameter, 1)


def groups(parameters: Mapping[str, nn.Parameter], entries: int) -> Iterator[list[str]]:
    """Yield lists of parameter names whose sizes sum to at most `entries` (at least one each)."""
    names: list[str] = []
    held = 0
    for name, p in parameters.items():
        if names and held + p.numel() > entries:
            yield names
            names, held = [], 0
        names.append(name)
        held += p.numel()
    if names:
        yield names


def _settle_shape(structure: Structure, path: Path, p: nn.Parameter) -> None:
    shape, transposed = matrix_shape(p), path.kind == "outer-transposed"
    structure.shapes[path.parameter] = shape[::-1] if transposed else shape
    if structure.transposed.setdefault(path.parameter, transposed) != transposed:
        msg = f"{path.parameter}: is used both transposed and not; {leave_out(path.parameter)}"
        raise CheckFailed(msg)
