"""The sweep: all samples through the model, one block at a time, yielding each segment's gradient factors.

Forward once under frozen weights, recording what enters each block; then from the head down re-run each block with
gradients only with respect to activations, and read off the factors of its parameters.
Cost: one forward, one recomputed forward, C activation-only backwards. Memory: hidden states N·T·d·L (or in a file),
cotangents N·C·T·d, and the factors of one segment, or of part of one.
Microbatches whose activations fit a budget keep them instead, and are spared
the recomputed forward. Shape suffixes: n samples of a microbatch, C outputs, T tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkengine.errors import CheckFailed, NonFinite
from ntkengine.inputs.batches import Chunk, Samples
from ntkengine.inputs.heap import HEAP
from ntkengine.inputs.readout import Readout
from ntkengine.inputs.resident import RESIDENT, Key
from ntkengine.inputs.running import call_model, wanting_gradients
from ntkengine.inputs.streaming import is_streamed, streamed_keys
from ntkengine.inputs.unrounded import unrounded
from ntkengine.tangents.blocks import before_blocks, first_tensor, replace_first
from ntkengine.tangents.capture import Call, Recorder
from ntkengine.tangents.factors import ParameterFactors, Use, merge
from ntkengine.tangents.grouping import grouped
from ntkengine.tangents.hidden import Hidden
from ntkengine.tangents.projection import Projection
from ntkengine.tangents.pulling import Puller
from ntkengine.tangents.rehearsal import agreement, storage
from ntkengine.tangents.sketch import Sketch
from ntkengine.tangents.structure import Path, Structure
from ntkengine.tangents.verify import Recording

KEEP_BYTES = 1 << 30

Saved = tuple[tuple[Any, ...], dict[str, Any]]


class Sweep:
    """One pass over all samples.

    Args:
        model: frozen, in eval mode, of one floating dtype.
        selected: parameters by name.
        structure: from `probe`.
        samples: microbatches; of one sample each when the structure says so.
        readout: f.
        tick: called after every microbatch of every segment.
        keep_bytes: activations to keep rather than recompute; none of a streamed model.
        hidden: where hidden states wait (`hidden.PLACES`).
        factor_bytes: by parameter, what its factors take; only needed with a limit.
        limit: bytes of factors held at once: a block over it is run again for each group of its parameters.
        sketches: by parameter, what is kept of its gradient; the others stay exact.
        skip: parameters whose factors nobody wants any more.

    Attributes:
        outputs: (S, C) float64, f in sweep order; complete after the first segment was yielded.
    """

    def __init__(
        self,
        model: nn.Module,
        selected: Mapping[str, nn.Parameter],
        structure: Structure,
        samples: Samples,
        readout: Readout,
        tick: Callable[[], None] = lambda: None,
        keep_bytes: int = KEEP_BYTES,
        hidden: str = "device",
        factor_bytes: Mapping[str, float] | None = None,
        limit: float = float("inf"),
        sketches: Mapping[str, Sketch] | None = None,
        skip: Collection[str] = (),
    ) -> None:
        self.model, self.selected, self.structure = model, selected, structure
        self.samples, self.readout, self.tick = samples, readout, tick
        self.stack = structure.stack
        self._puller = Puller(model, selected, structure)
        parameter = next(iter(model.parameters()))
        self.device, self.dtype = parameter.device, parameter.dtype
        self.outputs = np.full((samples.total, structure.outputs), np.nan)
        self.lowest = min((s for s, paths in structure.paths.items() if paths), default=self.stack.head)
        self._saved: list[dict[int, Saved]] = [{} for _ in samples.chunks]  # arguments but the hidden states
        self._hidden = Hidden(hidden)
        self._factor_bytes, self._limit = factor_bytes or {}, limit
        self._norms: list[dict[int, Tensor]] = [{} for _ in samples.chunks]  # of each segment's output, forward
        self._cotangents: list[Tensor | None] = [None for _ in samples.chunks]
        self._kept: list[Recording | None] = [None for _ in samples.chunks]
        self._keep_bytes = 0 if is_streamed(model) else keep_bytes  # kept graphs would hold its weights
        self._sketches, self._skip = sketches or {}, skip
        self._weights: list[list[Key]] = [streamed_keys(block) for block in self.stack.blocks]

    def segments(self) -> Iterator[tuple[str, list[ParameterFactors]]]:
        """Yield (segment name, factors of the parameters whose last use it was), from the head down to the input."""
        try:
            yield from self._segments()
        finally:
            self._hidden.close()

    def _segments(self) -> Iterator[tuple[str, list[ParameterFactors]]]:
        factors: dict[str, ParameterFactors] = {}
        remaining: dict[str, int] = defaultdict(int)
        for paths in self.structure.paths.values():
            for path in paths:
                remaining[path.parameter] += 1
        for segment in range(self.stack.head, self.lowest - 1, -1):
            groups = self._groups(segment)
            for k, paths in enumerate(groups):
                projections = {
                    path.parameter: Projection(self._sketches[path.parameter], self.dtype, self.device)
                    for path in paths
                    if path.parameter in self._sketches and path.parameter not in self._skip
                }
                for i, chunk in enumerate(self.samples.chunks):
                    for name, uses in self._run(segment, i, chunk, paths, last=k == len(groups) - 1).items():
                        if name in self._skip:
                            continue
                        if name in projections:
                            uses = projections[name](uses)
                        if name not in factors:
                            sizes = [c.n for c in self.samples.chunks]
                            shape = projections[name].shape if name in projections else self.structure.shapes[name]
                            factors[name] = ParameterFactors(name, shape, sizes, [[] for _ in sizes])
                        factors[name].chunks[i] = merge([*factors[name].chunks[i], *uses])
                    self.tick()
                    HEAP.relieve()
                done = []
                for path in paths:
                    remaining[path.parameter] -= 1
                    if remaining[path.parameter] == 0 and path.parameter not in self._skip:
                        done.append(factors.pop(path.parameter))
                projections.clear()
                yield self.stack.segment_name(segment), done
                del done
        if factors:
            msg = f"{next(iter(factors))}: its gradient was collected but never summed"
            raise CheckFailed(msg)

    def _groups(self, segment: int) -> list[list[Path]]:
        """Return the segment's paths in groups whose factors fit the limit, each at least one path."""
        paths = {path.parameter: path for path in self.structure.paths.get(segment, [])}
        limit = float("inf") if segment == self.stack.head else self._limit
        sizes = {name: self._factor_bytes.get(name, 0.0) for name in paths}
        return [[paths[name] for name in names] for names in grouped(sizes, limit)] or [[]]

    def _run(self, segment: int, i: int, chunk: Chunk, paths: list[Path], *, last: bool) -> dict[str, list[Use]]:
        with unrounded(self.dtype, foreign=self.structure.foreign):
            return self._taken(segment, i, chunk, paths, last=last)

    def _taken(self, segment: int, i: int, chunk: Chunk, paths: list[Path], *, last: bool) -> dict[str, list[Use]]:
        if segment == self.stack.head:
            keep = self._keep_bytes > 0 and self.lowest < segment
            return self._head_kept(i, chunk, paths) if keep else self._head(i, chunk, paths)
        kept = self._kept[i]
        if kept is not None:
            leaf = kept.cut.leaves[segment]
            wanted = [leaf] if leaf is not None and segment > self.lowest else []
            out, calls = kept.cut.outs[segment], kept.calls[segment]
            kept.drop(segment)
            with self._wanted(paths):
                return self._pull(i, out, self._cotangents[i], wanted, calls, paths, chunk)
        return self._block(segment, i, chunk, paths, last=last) if segment else self._input(i, chunk, paths, last=last)

    def _head(self, i: int, chunk: Chunk, paths: list[Path]) -> dict[str, list[Use]]:
        """Forward the whole model, save what enters each block that will be replayed, and take the head's factors."""
        inputs = self.samples.inputs(chunk, self.device, self.dtype)
        saved = self._saved[i]
        leaf: list[Tensor] = []

        def before(index: int) -> Any:
            def hook(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                hidden = self.stack.take(args, kwargs).detach()  # no graph through the blocks
                saved[index] = self.stack.put(args, kwargs, None)
                self._hidden.put(i, index, hidden)
                args, kwargs = self.stack.put(args, kwargs, hidden)
                self._norms[i][index - 1] = _norm(hidden)
                return args, kwargs

            return hook

        def after_last(_m: nn.Module, _args: Any, output: Any) -> Any:
            leaf.append(first_tensor(output).detach().requires_grad_(True))
            self._norms[i][self.stack.depth] = _norm(leaf[0])
            return replace_first(output, leaf[0])

        handles = [
            block.register_forward_pre_hook(before(s + 1), with_kwargs=True)
            for s, block in enumerate(self.stack.blocks)
            if s + 1 >= self.lowest
        ]
        if any(self._weights):
            follows = [*range(2, self.stack.depth + 1), 1 if i + 1 < len(self.samples.chunks) else 0]
            handles += [
                block.register_forward_pre_hook(partial(self._expect, s + 1, follows[s]))
                for s, block in enumerate(self.stack.blocks)
            ]
        if self.stack.blocks:
            handles.append(self.stack.blocks[-1].register_forward_hook(after_last))
        try:
            with self._recorder(paths, chunk.n) as recorder, self._wanted(paths):
                f = self.readout(call_model(self.model, inputs), inputs)
                recorder.stop()
                return self._pull(i, f, self._noted(f, chunk), leaf, recorder.calls, paths, chunk)
        finally:
            for handle in handles:
                handle.remove()

    def _head_kept(self, i: int, chunk: Chunk, paths: list[Path]) -> dict[str, list[Use]]:
        """As `_head`, keeping every segment's graph; what it holds is taken off the budget."""
        inputs = self.samples.inputs(chunk, self.device, self.dtype)
        every = [path for found in self.structure.paths.values() for path in found]
        held: dict[int, int] = {}

        def note(x: Tensor) -> Tensor:
            held.update(storage(x))
            return x.detach()  # not x itself: an output saved by its own node would never be freed

        with self._wanted(every), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            kept = Recording(
                self.model, self._modules(every), inputs, self.stack, self.readout, expand=self.structure.expand
            )
        for calls in kept.calls:
            for t in (t for found in calls.values() for call in found for t, _ in call.versions):
                note(t)
        weights = {where for p in self.model.parameters() for where in storage(p)}
        self._keep_bytes -= sum(size for where, size in held.items() if where not in weights)
        head = self.stack.head
        f, calls, leaf = kept.cut.outs[head], kept.calls[head], kept.cut.leaves[head]
        for segment in [*range(self.lowest), head]:
            kept.drop(segment)
        self._kept[i] = kept
        with self._wanted(paths):
            return self._pull(i, f, self._noted(f, chunk), [] if leaf is None else [leaf], calls, paths, chunk)

    def _noted(self, f: Tensor, chunk: Chunk) -> Tensor:
        """Store f of a microbatch and return its cotangents, one output at a time, (n, C, C)."""
        values = f.detach().to(torch.float64).cpu().numpy()
        if not np.isfinite(values).all():
            row = int(chunk.rows[np.nonzero(~np.isfinite(values).all(1))[0][0]])
            msg = f"the model's output is not finite for example {self.samples.example(chunk.group, row)}"
            raise NonFinite(msg)
        self.outputs[chunk.start : chunk.start + chunk.n] = values
        return torch.eye(f.shape[1], dtype=f.dtype, device=f.device).expand(chunk.n, -1, -1)

    def _block(self, segment: int, i: int, chunk: Chunk, paths: list[Path], *, last: bool) -> dict[str, list[Use]]:
        """Replay one block from its recorded input."""
        self._expect(segment, segment - 1 if segment > self.lowest else 0)
        args, kwargs = self._saved[i].pop(segment) if last else self._saved[i][segment]
        leaf = self._hidden.take(i, segment, keep=not last).detach().requires_grad_(True)
        args, kwargs = self.stack.put(args, kwargs, leaf)
        with self._recorder(paths, chunk.n) as recorder, self._wanted(paths):
            out = first_tensor(self.stack.blocks[segment - 1](*args, **kwargs))
            recorder.stop()
            self._same(out, i, segment, last=last)
            wanted = [leaf] if segment > self.lowest and last else []
            return self._pull(i, out, self._cotangents[i], wanted, recorder.calls, paths, chunk, last=last)

    def _input(self, i: int, chunk: Chunk, paths: list[Path], *, last: bool) -> dict[str, list[Use]]:
        """Re-run the model up to its first block."""
        inputs = self.samples.inputs(chunk, self.device, self.dtype)
        with self._recorder(paths, chunk.n) as recorder, self._wanted(paths):
            out = before_blocks(self.model, inputs, self.stack)
            recorder.stop()
            self._same(out, i, 0, last=last)
            return self._pull(i, out, self._cotangents[i], [], recorder.calls, paths, chunk, last=last)

    def _expect(self, now: int, then: int, *_hook: Any) -> None:
        """Tell what weights are needed now, and next: those of two blocks, 0 for none."""
        if any(self._weights):
            RESIDENT.expect(*(self._weights[s - 1] if s else [] for s in (now, then)))

    def _same(self, out: Tensor, i: int, segment: int, *, last: bool) -> None:
        """Refuse a replay that gives another output than the forward pass did: the block keeps a state."""
        once, again = float(self._norms[i].pop(segment) if last else self._norms[i][segment]), float(_norm(out))
        if not abs(again - once) <= agreement(out.dtype) * once:
            name = self.stack.segment_name(segment)
            msg = f"{name}: run again on the same input its output has norm {again:.6g} instead of {once:.6g}"
            raise CheckFailed(msg)

    def _recorder(self, paths: list[Path], n: int) -> Recorder:
        return Recorder(self._modules(paths), n, expand=self.structure.expand)

    def _modules(self, paths: list[Path]) -> dict[str, nn.Module]:
        return {m: self.model.get_submodule(m) for path in paths for m, _, _ in path.owners}

    def _wanted(self, paths: list[Path]) -> AbstractContextManager[None]:
        # All of them, so that the graph tells how often each is used; only those without owners are differentiated.
        return wanting_gradients([self.selected[path.parameter] for path in paths])

    def _pull(
        self,
        i: int,
        out: Tensor,
        cotangent: Tensor | None,
        leaf: list[Tensor],
        recorded: Mapping[str, list[Call]],
        paths: list[Path],
        chunk: Chunk,
        *,
        last: bool = True,
    ) -> dict[str, list[Use]]:
        """Backward through a segment; keep its input's cotangent, return the parameters' factors."""
        if last:
            self._cotangents[i] = None
        uses, down = self._puller.pull(out, cotangent, leaf, recorded, paths, chunk.n)
        if down is not None:
            self._cotangents[i] = down
        return uses


def _norm(hidden: Tensor) -> Tensor:
    return torch.linalg.vector_norm(hidden.detach(), dtype=torch.float64)
