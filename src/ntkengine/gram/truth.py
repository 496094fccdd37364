"""Plain autograd on a few samples, one at a time: what the sweep must agree with before it is trusted (`check`)."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from torch import Tensor

from ntkengine.gram.autograd import plain_gradients, stacked
from ntkengine.gram.frame import Frame
from ntkengine.gram.layout import Layout
from ntkengine.gram.reduced import reducer, reductions
from ntkengine.gram.task import Task
from ntkengine.gram.transforms import SIGNS, ZERO, signed
from ntkengine.inputs.batches import Samples
from ntkengine.inputs.embeddings import tables
from ntkengine.inputs.streaming import is_streamed
from ntkengine.products import unrouted
from ntkengine.tangents.grouping import grouped
from ntkengine.tangents.sketch import Sketch
from ntkengine.tangents.structure import Structure

UNSURE = 1e-4  # of a gradient's root mean square: below it rounding may have turned an entry's sign
TURNED = {"exact": 1e-12, "fast": 3e-2}  # likewise, by the precision it was computed in
DRAWN = 2  # samples of each group
PASSES = 8  # through the model; where a budget would need more, not all gradients are compared whole
_UNSEEN = 3.0  # turned entries: none among m samples still leaves 3/m for each, at 95 %
_TILE = 1 << 16  # entries in float64 that stay in cache


class Truth:
    """Truth for a few samples: their Gram entries by plain autograd, whole and by parameter.

    Where whole gradients would take too many passes, those of drawn parameters are compared whole, of all others a few
    numbers (`gram.reduced`).

    Args:
        task: the job; its model frozen and in eval mode.
        samples: the job's samples; at most `DRAWN` of each group are drawn.
        frame: the job's frame.
        structure: from the probe.
        seed: of the draw.
        layout: the job's.
        turned: of a gradient's root mean square, below which the job's rounding may turn an entry's sign.
        whole: backward passes for parameters compared whole, where not all can be.

    Attributes:
        compared: names of the parameters compared whole; all of them unless that would take too many passes.

    Cost: for each drawn sample and output one ordinary backward pass for every `layout.gradients` entries, or one.
    """

    def __init__(
        self,
        task: Task,
        samples: Samples,
        frame: Frame,
        structure: Structure,
        seed: int,
        layout: Layout,
        turned: float = UNSURE,
        whole: int = 1,
    ) -> None:
        self.task, self.layout, self.turned, self.whole = task, layout, turned, whole
        rng = np.random.default_rng(seed)
        self.frame, self.structure, self.roots = frame, structure, task.roots
        self.model, self.selected = task.model, task.selected
        self.drawn = [
            (g, int(r)) for g, n in enumerate(samples.sizes) for r in rng.choice(n, size=min(n, DRAWN), replace=False)
        ]
        self.inputs = [{k: v[r : r + 1] for k, v in samples.groups[g].items()} for g, r in self.drawn]
        parameter = next(iter(self.model.parameters()))
        self.device, self.dtype = parameter.device, parameter.dtype
        rows = len(self.drawn) * frame.width
        self.total, self.slack, self.left, self.right, self.added, self.raw, self.changed = torch.zeros(
            7, frame.layers, rows, rows, dtype=torch.float64, device=self.device
        )
        self.parts: dict[str, Tensor] = {}
        self.sketches: dict[str, Sketch] = {}
        parts = self._choose(seed, rng)
        self.compared = [name for names in parts for name in names]
        reduced = {n: reducer(s, transposed=structure.transposed.get(n, False)) for n, s in self.sketches.items()}
        for k, names in enumerate(parts):
            given = self.model, self.selected, names, self.inputs, task.readout, frame.outputs
            found = plain_gradients(*given, foreign=structure.foreign, reduced=None if k else reduced)
            with unrouted():  # many small operations, no large product
                while found:
                    name = next(iter(found))
                    p: Tensor = self.selected[name]
                    like = p.new_empty(self.sketches[name].features) if name in self.sketches else p
                    G, touched = stacked(found.pop(name), len(self.inputs), self.frame.outputs, like)
                    self.parts[name] = self._products(G, G)
                    self.raw += self.parts[name]
                    if name in self.sketches:
                        continue
                    if self.frame.transform in SIGNS or self.roots is not None:
                        self._transform(name, G, touched)
                    else:
                        for sum_of_products in (self.total, self.left, self.right):
                            sum_of_products += self.parts[name]

    @property
    def reduced(self) -> bool:
        """Whether of some parameters only a few numbers are compared."""
        return len(self.compared) < len(self.selected)

    def _choose(self, seed: int, rng: np.random.Generator) -> list[list[str]]:
        """Return parameters to compare whole, by pass; how the others are reduced is noted."""
        places = Counter(id(p) for m in self.model.modules() for p in m._parameters.values())
        few = {n for n in tables(self.model) if n in self.selected and places[id(self.selected[n])] == 1}
        entries = {name: 0 if name in few else p.numel() for name, p in self.selected.items()}  # few rows are touched
        parts = grouped(entries, self.layout.gradients // (len(self.drawn) * self.frame.outputs))
        if len(parts) <= (1 if is_streamed(self.model) else PASSES):
            return parts
        size = min(len(parts), PASSES if self.frame.transform in SIGNS else self.whole)  # signs are of whole gradients
        parts = [parts[i] for i in sorted(rng.choice(len(parts), size=size, replace=False))]
        others = self.selected.keys() - {name for names in parts for name in names}
        self.sketches = reductions(self.structure, self.selected, sorted(others), seed)
        return [[*parts[0], *sorted(others - self.sketches.keys())], *parts[1:]]

    def _transform(self, name: str, G: Tensor, rows: Tensor | None) -> None:
        """Add a parameter's part of the job's own inner product, and what entries of unsure sign may change in it."""
        if self.frame.transform in SIGNS:
            if name in self.structure.negligible:
                return
            size = G.abs()
            mean = size.square().sum(2, keepdim=True) / self.selected[name].numel()
            nothing = size <= 2 * ZERO.get(G.dtype, 1e-3) * size.amax(2, keepdim=True)
            unsure = (nothing | (size <= UNSURE * mean.sqrt())) & (size > 0)
            sign, one = signed(G), torch.ones_like(G)
            turned = (nothing | (size <= self.turned * mean.sqrt())) & (size > 0)
            if self.frame.transform == "sign":
                G, H = sign, sign
                maybe = self._products(unsure.to(G), one)
                self.slack += 2 * (maybe + maybe.transpose(1, 2))
            else:
                H = sign
                self.slack += 2 * self._products(size, unsure.to(G))
            self.changed += self._products(G.square(), turned.to(G))
        elif self.roots is not None:
            root = self.roots[name]
            G = H = G * (root if rows is None else root[rows]).reshape(-1)
        self.total += self._products(G, H)
        self.left += self._products(G, G)
        self.right += self._products(H, H)

    def turned_norm(self) -> float:
        """Return ‖E‖_F, in the mean over draws and from above, of what turned signs may do to the job's Gram.

        A sign of column j turned in an entry p changes K_ij by twice G_ip, by independent amounts for every p. Those of
        the drawn samples that rounding might turn count as turned, and three more of entries of mean size; fewer where
        arithmetic is finer, which turns fewer.
        """
        frame, m, w = self.frame, len(self.drawn), self.frame.width
        compared, every = (sum(self.selected[n].numel() for n in names) for names in (self.compared, self.selected))
        others = torch.ones_like(self.changed[0, ::w, ::w]) - (torch.eye(m).to(self.changed) if m > 1 else 0)
        others = others.repeat_interleave(w, 0).repeat_interleave(w, 1)
        mean = (self.changed * others).sum((1, 2)) / others.sum()
        left = self.left.diagonal(dim1=1, dim2=2)
        unseen = min(1.0, self.turned / UNSURE) * _UNSEEN / m * left.mean(1) / (compared * frame.folded)
        rows, columns = ((stop - start) * w for start, stop in (frame.rows, frame.columns))
        sides = 2 if frame.transform == "sign" else 1
        return float((4.0 * sides * rows * columns * every / compared * (mean + unseen)).max().sqrt())

    def _products(self, G: Tensor, H: Tensor) -> Tensor:
        """Return (layers, m·w, m·w) inner products in float64, tile by tile."""
        m, C, p = G.shape
        out = torch.zeros(
            self.frame.layers, m * self.frame.width, m * self.frame.width, dtype=torch.float64, device=G.device
        )
        for start in range(0, p, _TILE):
            x = G[:, :, start : start + _TILE].to(torch.float64)
            y = x if H is G else H[:, :, start : start + _TILE].to(torch.float64)
            if self.frame.contraction == "per-output":
                x, y = x.transpose(0, 1), y.transpose(0, 1)
            else:
                rows = m * C if self.frame.contraction == "full" else m
                x, y = x.reshape(1, rows, -1), y.reshape(1, rows, -1)
            out += x @ y.transpose(1, 2)
        return out
