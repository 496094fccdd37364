"""One segment of the model run on one microbatch, and the factors of its parameters read off.

The head is run first, in a forward pass of the whole model that records what enters each block; every other segment is
replayed from that record, or taken from graphs that were kept.
Shape suffixes: n samples of a microbatch, C outputs, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkengine.errors import CheckFailed, NonFinite
from ntkengine.inputs.batches import Samples
from ntkengine.inputs.readout import Readout
from ntkengine.inputs.resident import RESIDENT, Key
from ntkengine.inputs.running import call_model, wanting_gradients
from ntkengine.inputs.streaming import is_streamed, streamed_keys
from ntkengine.inputs.unrounded import unrounded
from ntkengine.tangents.blocks import first_tensor
from ntkengine.tangents.boundaries import Others, at_boundaries, before_blocks
from ntkengine.tangents.capture import Call, Recorder
from ntkengine.tangents.factors import Use
from ntkengine.tangents.hidden import Hidden
from ntkengine.tangents.pulling import Puller
from ntkengine.tangents.rehearsal import agreement, storage
from ntkengine.tangents.structure import Path, Structure
from ntkengine.tangents.verify import Recording


class Passes:
    """The passes of a sweep, and what waits between them.

    Args:
        model: frozen, in eval mode, of one floating dtype.
        selected: parameters by name.
        structure: from `probe`.
        samples: microbatches.
        readout: f.
        keep_bytes: activations to keep rather than recompute; none of a streamed model.
        hidden: where hidden states wait (`hidden.PLACES`).

    Attributes:
        outputs: (S, C) float64, f in sweep order; complete after the head was run on every microbatch.
        lowest: the last segment that has parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        selected: Mapping[str, nn.Parameter],
        structure: Structure,
        samples: Samples,
        readout: Readout,
        keep_bytes: int,
        hidden: str,
    ) -> None:
        self.model, self.selected, self.structure = model, selected, structure
        self.samples, self.readout = samples, readout
        self.stack = structure.stack
        self._puller = Puller(model, selected, structure)
        parameter = next(iter(model.parameters()))
        self.device, self.dtype = parameter.device, parameter.dtype
        self.outputs = np.full((samples.total, structure.outputs), np.nan)
        self.lowest = min((s for s, paths in structure.paths.items() if paths), default=self.stack.head)
        self._saved: list[dict[int, Others]] = [{} for _ in samples.chunks]  # arguments but the hidden states
        self._hidden = Hidden(hidden)
        self._norms: list[dict[int, Tensor]] = [{} for _ in samples.chunks]  # of each segment's output, forward
        self._cotangents: list[Tensor | None] = [None for _ in samples.chunks]
        self._kept: list[Recording | None] = [None for _ in samples.chunks]
        self._keep_bytes = 0 if is_streamed(model) else keep_bytes  # kept graphs would hold its weights
        self._weights: list[list[Key]] = [streamed_keys(block) for block in self.stack.blocks]

    def close(self) -> None:
        """Let go of the hidden states."""
        self._hidden.close()

    def run(self, segment: int, i: int, paths: list[Path], *, last: bool) -> dict[str, list[Use]]:
        """Return factors of a segment's parameters on one microbatch.

        Args:
            segment: from the head down, every microbatch of one before those of the next.
            i: the microbatch.
            paths: the parameters wanted.
            last: whether the segment is not run again on this microbatch, for others of its parameters.

        Raises:
            NonFinite: f is not.
            CheckFailed: a segment run again gives another output.
        """
        with unrounded(self.dtype, foreign=self.structure.foreign):
            return self._taken(segment, i, paths, last=last)

    def _taken(self, segment: int, i: int, paths: list[Path], *, last: bool) -> dict[str, list[Use]]:
        if segment == self.stack.head:
            keep = self._keep_bytes > 0 and self.lowest < segment
            return self._head_kept(i, paths) if keep else self._head(i, paths)
        kept = self._kept[i]
        if kept is not None:
            leaf = kept.cut.leaves[segment]
            wanted = [leaf] if leaf is not None and segment > self.lowest else []
            out, calls = kept.cut.outs[segment], kept.calls[segment]
            kept.drop(segment)
            with self._wanted(paths):
                return self._pull(i, out, wanted, calls, paths)
        return self._replay(segment, i, paths, last=last)

    def _head(self, i: int, paths: list[Path]) -> dict[str, list[Use]]:
        """Forward the whole model, save what enters each block that will be replayed, and take the head's factors."""
        inputs, leaf = self._inputs(i), list[Tensor]()

        def enter(segment: int, hidden: Tensor, others: Others | None) -> Tensor:
            hidden = hidden.detach()  # no graph through the blocks
            if others is None:
                leaf.append(hidden.requires_grad_(True))
            else:
                self._saved[i][segment] = others
                self._hidden.put(i, segment, hidden)
            self._norms[i][segment - 1] = _norm(hidden)
            return hidden

        cut, told = at_boundaries(self.stack, enter, self.lowest), self._announced(i)
        with cut, told, self._recorder(i, paths) as recorder, self._wanted(paths):
            f = self.readout(call_model(self.model, inputs), inputs)
            recorder.stop()
            self._note(i, f)
            return self._pull(i, f, leaf, recorder.calls, paths)

    @contextmanager
    def _announced(self, i: int) -> Iterator[None]:
        """Within the block, tell before each block what weights it needs, and the next one."""
        follows = [*range(2, self.stack.depth + 1), 1 if i + 1 < len(self.samples.chunks) else 0]
        handles = [
            block.register_forward_pre_hook(partial(self._expect, s + 1, follows[s]))
            for s, block in enumerate(self.stack.blocks if any(self._weights) else ())
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _head_kept(self, i: int, paths: list[Path]) -> dict[str, list[Use]]:
        """As `_head`, keeping every segment's graph; what it holds is taken off the budget."""
        inputs = self._inputs(i)
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
            self._note(i, f)
            return self._pull(i, f, [] if leaf is None else [leaf], calls, paths)

    def _note(self, i: int, f: Tensor) -> None:
        """Store f of a microbatch, and its cotangents, one output at a time, (n, C, C)."""
        chunk = self.samples.chunks[i]
        values = f.detach().to(torch.float64).cpu().numpy()
        if not np.isfinite(values).all():
            row = int(chunk.rows[np.nonzero(~np.isfinite(values).all(1))[0][0]])
            msg = f"the model's output is not finite for example {self.samples.example(chunk.group, row)}"
            raise NonFinite(msg)
        self.outputs[chunk.start : chunk.start + chunk.n] = values
        self._cotangents[i] = torch.eye(f.shape[1], dtype=f.dtype, device=f.device).expand(chunk.n, -1, -1)

    def _replay(self, segment: int, i: int, paths: list[Path], *, last: bool) -> dict[str, list[Use]]:
        """Run one block again from its recorded input, or for segment 0 the model up to its first block."""
        leaf: list[Tensor] = []
        if segment:
            self._expect(segment, segment - 1 if segment > self.lowest else 0)
            args, kwargs = self._saved[i].pop(segment) if last else self._saved[i][segment]
            hidden = self._hidden.take(i, segment, keep=not last).detach().requires_grad_(True)
            args, kwargs = self.stack.put(args, kwargs, hidden)
            leaf = [hidden] if segment > self.lowest and last else []
        with self._recorder(i, paths) as recorder, self._wanted(paths):
            if segment:
                out = first_tensor(self.stack.blocks[segment - 1](*args, **kwargs))
            else:
                out = before_blocks(self.model, self._inputs(i), self.stack)
            recorder.stop()
            self._same(out, i, segment, last=last)
            return self._pull(i, out, leaf, recorder.calls, paths, last=last)

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

    def _inputs(self, i: int) -> dict[str, Tensor]:
        return self.samples.inputs(self.samples.chunks[i], self.device, self.dtype)

    def _recorder(self, i: int, paths: list[Path]) -> Recorder:
        return Recorder(self._modules(paths), self.samples.chunks[i].n, expand=self.structure.expand)

    def _modules(self, paths: list[Path]) -> dict[str, nn.Module]:
        return {m: self.model.get_submodule(m) for path in paths for m, _, _ in path.owners}

    def _wanted(self, paths: list[Path]) -> AbstractContextManager[None]:
        # All of them, so that the graph tells how often each is used; only those without owners are differentiated.
        return wanting_gradients([self.selected[path.parameter] for path in paths])

    def _pull(
        self,
        i: int,
        out: Tensor,
        leaf: list[Tensor],
        recorded: Mapping[str, list[Call]],
        paths: list[Path],
        *,
        last: bool = True,
    ) -> dict[str, list[Use]]:
        """Backward through a segment; keep its input's cotangent, return the parameters' factors."""
        cotangent = self._cotangents[i]
        if last:
            self._cotangents[i] = None
        uses, down = self._puller.pull(out, cotangent, leaf, recorded, paths, self.samples.chunks[i].n)
        if down is not None:
            self._cotangents[i] = down
        return uses


def _norm(hidden: Tensor) -> Tensor:
    return torch.linalg.vector_norm(hidden.detach(), dtype=torch.float64)
