"""Choosing each parameter's path in a segment: the cheapest whose per-sample gradients are those of plain autograd."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ntkengine.errors import CheckFailed, NonFinite
from ntkengine.inputs.heap import HEAP
from ntkengine.inputs.parameters import leave_out
from ntkengine.products import unrouted
from ntkengine.tangents.capture import Call, Pulled
from ntkengine.tangents.grouping import grouped
from ntkengine.tangents.paths import matrix_shape
from ntkengine.tangents.rehearsal import Rehearsal, Scene, rounding
from ntkengine.tangents.structure import Path, Structure
from ntkengine.tangents.verify import (
    Met,
    Truth,
    agreeing,
    calls_of,
    factors_of,
    reference_gradients,
    uses_in_graph,
)

GRADIENTS = 1 << 26  # gradient entries the probe and the check hold at once


@dataclass
class Verifier:
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
        HEAP.relieve()
        found = [r.scene(segment) for r in self.alone]
        whole = self.batch.scene(segment)
        scenes = [scene for scene in found if scene is not None]
        if whole is None or len(scenes) < len(found):
            return False
        generator = torch.Generator().manual_seed(self.seed + segment)
        v = torch.randn(whole.out.shape, generator=generator, dtype=torch.float32).to(whole.out)
        met = [uses_in_graph(scene.out, self.selected) for scene in scenes]
        here = {name: p for name, p in self.selected.items() if any(m.counts[name] for m in met)}
        parts = grouped({name: p.numel() for name, p in here.items()}, self.gradients // len(scenes))
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
            with unrouted():  # many small operations, no large product
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
        counts: Met,
        scenes: list[Scene],
        met: Sequence[Met],
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


def _all_seen(structure: Structure, path: Path, met: Met, calls: Mapping[str, list[Call]]) -> bool:
    """Whether a graph uses a parameter nowhere but in its modules' recorded calls; a leaf may use it several times."""
    made, used = calls_of(path.owners, calls, met), met.counts[path.parameter]
    if "leaf" in path.kind:
        each = -(-used // max(made, 1))
        structure.per_call[path.parameter] = max(structure.per_call.get(path.parameter, 1), each)
    return not path.owners or used <= made * structure.per_call.get(path.parameter, 1)


def _settle_shape(structure: Structure, path: Path, p: nn.Parameter) -> None:
    shape, transposed = matrix_shape(p), path.kind == "outer-transposed"
    structure.shapes[path.parameter] = shape[::-1] if transposed else shape
    if structure.transposed.setdefault(path.parameter, transposed) != transposed:
        msg = f"{path.parameter}: is used both transposed and not; {leave_out(path.parameter)}"
        raise CheckFailed(msg)
