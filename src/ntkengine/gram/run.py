"""One sweep summed into Gram matrices."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ntkengine.errors import NonFinite
from ntkengine.gram.blocks import TOTAL
from ntkengine.gram.frame import Frame
from ntkengine.gram.keeper import Keeper
from ntkengine.gram.layout import Layout
from ntkengine.gram.strategies import choose, contract, kind_of
from ntkengine.gram.task import Task
from ntkengine.gram.tiles import Accumulator
from ntkengine.inputs.batches import Samples
from ntkengine.inputs.parameters import module_of
from ntkengine.products import unrouted
from ntkengine.tangents.factors import ParameterFactors
from ntkengine.tangents.paths import matrix_shape
from ntkengine.tangents.sketch import Sketch
from ntkengine.tangents.structure import Structure
from ntkengine.tangents.sweep import KEEP_BYTES, Sweep


@dataclass
class Sums:
    """What a sweep added up to.

    Attributes:
        total: the Gram, in sweep order.
        parts: Grams by group name, when asked for.
        traces: trace over the square by parameter.
        outputs: (S, C) float64 in sweep order.
        done: by parameter: (strategy, tokens, flops, seconds) as executed.
        pass_seconds: time outside the contractions.
    """

    total: Accumulator
    parts: dict[str, Accumulator] = field(default_factory=dict)
    traces: dict[str, float] = field(default_factory=dict)
    outputs: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    done: dict[str, tuple[str, int, float, float]] = field(default_factory=dict)
    pass_seconds: float = 0.0

    def part(self, name: str) -> Accumulator:
        """Return the sums of a group, empty ones the first time."""
        if name not in self.parts:
            total = self.total
            self.parts[name] = Accumulator(total.frame, total.K.device, total.workspace, kernels=total.kernels)
        return self.parts[name]

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Within the block `pick` and `norm` may be called (`spread.Spread` has to ask for them)."""
        yield

    def serve(self) -> None:
        """Nobody asks for entries that are here."""

    def whole(self, part: str = TOTAL) -> np.ndarray | None:
        """Return the Gram, or a part of it, (layers, rows, columns)."""
        return (self.total if part == TOTAL else self.parts[part]).K.cpu().numpy()

    @property
    def frame(self) -> Frame:
        """The Gram's."""
        return self.total.frame

    def pick(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Return (layers, rows, columns) entries of the Gram at positions of the whole axis, in Gram rows."""
        at = (torch.from_numpy(x - first) for x, first in ((rows, self.total.r0), (columns, self.total.c0)))
        i, j = (x.to(self.total.K.device) for x in at)
        return self.total.K[:, i[:, None], j[None, :]].cpu().numpy()

    def diagonal(self) -> np.ndarray:
        """Return the diagonal of the square, (layers, n)."""
        return self.total.K.diagonal(dim1=1, dim2=2).cpu().numpy()

    def times(self, x: np.ndarray) -> np.ndarray:
        """Return the square times a vector for each layer, (layers, n)."""
        K = self.total.K[:, : x.shape[1]]
        return torch.matmul(K, torch.from_numpy(x).to(K.device)[..., None])[..., 0].cpu().numpy()

    def norm(self, *, square: bool = False) -> float:
        """Return the Gram's Frobenius norm, or that of its square of columns against themselves."""
        return float(
            torch.linalg.vector_norm(self.total.K[:, : self.total.c1 - self.total.c0] if square else self.total.K)
        )


def by_module(traces: Mapping[str, float]) -> dict[str, float]:
    """Return traces over the square by module from those by parameter."""
    found: dict[str, float] = {}
    for name, value in traces.items():
        found[module_of(name)] = found.get(module_of(name), 0.0) + value
    return found


def sum_gram(
    task: Task,
    structure: Structure,
    samples: Samples,
    frame: Frame,
    *,
    group: Callable[[str], str] | None = None,
    tick: Callable[[float, str], None] = lambda _flops, _stage: None,
    pass_flops: float = 0.0,
    keep_bytes: int = KEEP_BYTES,
    layout: Layout | None = None,
    factor_bytes: Mapping[str, float] | None = None,
    sketches: Mapping[str, Sketch] | None = None,
    keeper: Keeper | None = None,
) -> Sums:
    """Return the Gram of all samples in the frame.

    Args:
        task: its model frozen and in eval mode; whatever samples it has.
        structure: from the probe, on that model.
        samples: microbatches.
        frame: rows, columns and contraction.
        group: parameter name -> the part it is also kept under; None keeps no parts.
        tick: called with flops done and the segment's name.
        pass_flops: flops of the passes, spread over the microbatches for `tick`.
        keep_bytes: activations the sweep may keep rather than recompute.
        layout: where hidden states wait, and what is held at once.
        factor_bytes: by parameter, for the layout's limit.
        sketches: by parameter, what is kept of its gradient; the others stay exact.
        keeper: told of the sums as they grow; may have some of them from before.

    Raises:
        NonFinite: naming the parameter and the example.
        Stopped: the keeper was asked to stop.
    """
    start = time.perf_counter()
    device = task.device
    sums = Sums(Accumulator(frame, device, kernels=task.kernels))
    keeper = keeper or Keeper()
    keeper.start(sums)
    if sums.done:
        tick(sum(flops for _, _, flops, _ in sums.done.values()), "checkpoint")
    before, spent = sums.pass_seconds, 0.0
    steps = len(samples.chunks) * structure.swept
    layout = layout or Layout()

    def passed() -> None:
        tick(pass_flops / steps, "passes")
        keeper.passing(sums)

    sweep = Sweep(
        task.model,
        task.selected,
        structure,
        samples,
        task.readout,
        passed,
        keep_bytes,
        layout.hidden,
        factor_bytes,
        layout.factor_bytes,
        sketches,
        frozenset(sums.done),
    )
    room = math.inf if task.kernels else layout.copies
    with keeper.waits():
        for segment, found in sweep.segments():
            while found:
                factors = found.pop()
                began = time.perf_counter()
                with torch.cuda.device(device) if device.type == "cuda" else unrouted():
                    _add(factors, sums, frame, group, sweep, samples, task.roots, room)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                strategy, tokens, flops, _ = sums.done[factors.name]
                sums.done[factors.name] = strategy, tokens, flops, time.perf_counter() - began
                spent += time.perf_counter() - began
                sums.pass_seconds = before + time.perf_counter() - start - spent
                tick(flops, segment)
                keeper.step(sums)
                del factors  # before the next block's are collected
        sums.total.workspace.clear()
        sums.outputs = sweep.outputs
        sums.pass_seconds = before + time.perf_counter() - start - spent
        keeper.finish(sums)
    return sums


def _add(
    factors: ParameterFactors,
    sums: Sums,
    frame: Frame,
    group: Callable[[str], str] | None,
    sweep: Sweep,
    samples: Samples,
    roots: Mapping[str, Tensor] | None,
    room: float,
) -> None:
    kind = kind_of(factors.name, factors.kind, frame, sweep.structure.negligible)
    entry = sweep.dtype.itemsize
    strategy, flops = choose(kind, factors.shape, factors.tokens, samples.total, frame, room=room, entry=entry)
    sums.done[factors.name] = strategy, factors.tokens, flops, 0.0
    target = sums.total if group is None else sums.part(group(factors.name))
    before = target.trace()
    contract(factors, strategy, target, root_of(factors.name, roots, sweep.structure))
    after = target.trace() if frame.square else float(target.K.sum())
    if not np.isfinite(after):
        raise NonFinite(_where(factors.name, target, frame, samples))
    if frame.square:
        sums.traces[factors.name] = after - before


def root_of(name: str, roots: Mapping[str, Tensor] | None, structure: Structure) -> Tensor | None:
    """Return the square root of a parameter's preconditioner in the shape of its gradient's matrix."""
    if roots is None:
        return None
    root = roots[name].reshape(matrix_shape(roots[name]))
    return root.T if structure.transposed[name] else root


def _where(name: str, target: Accumulator, frame: Frame, samples: Samples) -> str:
    bad = (~torch.isfinite(target.K)).any(0)
    square = bad[: bad.shape[1]].diagonal() if frame.square else bad.any(1)
    rows = (square if bool(square.any()) else bad.any(1)).nonzero()
    columns = bad.all(0).nonzero()
    if not frame.square and len(columns) and len(rows) == len(bad):  # it is a column that spoils all rows
        position = frame.columns[0] + int(columns[0]) // frame.width
    else:
        position = frame.rows[0] + int(rows[0]) // frame.width if len(rows) else frame.rows[0]
    return f"{name}: the gradient is not finite for example {samples.example_at(position)}"
