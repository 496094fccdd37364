"""Plain autograd on a few samples, one at a time: what the sweep must agree with before it is trusted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkengine.errors import CheckFailed
from ntkengine.gram.autograd import plain_gradients, stacked
from ntkengine.gram.frame import Frame, gram_rows
from ntkengine.gram.layout import Layout
from ntkengine.gram.reduced import reducer, reductions
from ntkengine.gram.run import Sums, sum_gram
from ntkengine.gram.spread import Spread
from ntkengine.gram.task import Task
from ntkengine.gram.transforms import SIGNS, ZERO, signed
from ntkengine.gram.turned import turned_norm
from ntkengine.inputs.batches import Samples
from ntkengine.inputs.embeddings import tables
from ntkengine.inputs.parameters import leave_out
from ntkengine.inputs.streaming import is_streamed
from ntkengine.products import unrouted
from ntkengine.tangents.grouping import grouped
from ntkengine.tangents.sketch import Sketch
from ntkengine.tangents.structure import Structure

# Relative to √(K_ii K_jj); below lies rounding (quantised layers round to float32 inside even in float64).
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
# Share of the whole gradient below which one parameter's may be nothing but rounding.
FLOOR = {torch.float64: 1e-5, torch.float32: 1e-4}
UNSURE = 1e-4  # of a gradient's root mean square: below it rounding may have turned an entry's sign
TURNED = {"exact": 1e-12, "fast": 3e-2}  # likewise, by the precision it was computed in
DEVIATIONS = 10.0  # of a sketched entry; a wrong sketch is off by all of it
DRAWN = 2  # samples of each group
_PASSES = 8  # through the model; where a budget would need more, not all gradients are compared whole
_TILE = 1 << 16  # entries in float64 that stay in cache


class Check:
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
    ) -> None:
        self.task, self.layout, self.turned = task, layout, turned
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

    def _choose(self, seed: int, rng: np.random.Generator) -> list[list[str]]:
        """Return parameters to compare whole, by pass; how the others are reduced is noted."""
        few, signs = tables(self.model), self.frame.transform in SIGNS
        entries = {name: 0 if name in few else p.numel() for name, p in self.selected.items()}  # few rows are touched
        parts = grouped(entries, self.layout.gradients // (len(self.drawn) * self.frame.outputs))
        if len(parts) <= (1 if is_streamed(self.model) else _PASSES):
            return parts
        size = min(len(parts), _PASSES if signs else 1)  # what rounding does to signs is seen in whole gradients
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
        """Return what signs that rounding may have turned do to the job's Gram, ‖E‖_F (`turned`)."""
        compared, every = (sum(self.selected[n].numel() for n in names) for names in (self.compared, self.selected))
        left = self.left.diagonal(dim1=1, dim2=2)
        seen = min(1.0, self.turned / UNSURE)
        return turned_norm(self.changed, left, self.frame, len(self.drawn), compared, every, seen)

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

    def sweep(self) -> None:
        """Sweep the drawn samples alone and compare raw gradients, parameter by parameter.

        Raises:
            CheckFailed: naming the parameter and the examples.
        """
        # One at a time: of few samples together, a routed row may be taken for one that all of them share.
        # And of both groups in one: the layouts agree, or they would not have been one job's groups.
        origins = [(g, np.array([r])) for g, r in self.drawn]
        few = Samples(self.inputs, microbatch=1, trim=self.structure.trim, origins=origins)
        m = len(self.drawn)
        frame = Frame((0, m), (0, m), self.frame.outputs, self.frame.contraction)
        raw = replace(self.task, roots=None, kernels=False)
        given: dict[str, Any] = {"keep_bytes": self.layout.keep_bytes, "sketches": self.sketches}
        sums = sum_gram(raw, self.structure, few, frame, group=lambda name: name, **given)
        with unrouted():  # many small operations, no large product
            for name, truth in self.parts.items():
                part = sums.parts.get(name)
                self._compare(name, torch.zeros_like(truth) if part is None else part.finish())

    def gradients(self, name: str, of: Callable[[int, int], Tensor]) -> None:
        """Compare the drawn samples' gradients of a parameter with plain autograd.

        Args:
            name: the parameter's.
            of: takes a group and an example's number in it; returns (C, entries), in any one order of the entries.

        Raises:
            CheckFailed: naming the examples.
        """
        if name in self.parts and name not in self.sketches:
            G = torch.stack([of(g, r) for g, r in self.drawn])
            self._compare(name, self._products(G, G))

    def features(self, tiles: Tensor, samples: Samples) -> None:
        """Add to the drawn samples' entries those of features (N, C, p), in sweep order, of all samples."""
        places = torch.tensor(self._places(samples), device=tiles.device)
        G = tiles[places]
        self.added += self._products(G, G)

    def added_entries(self, dtype: torch.dtype) -> None:
        """Compare what `features` added up to, over all parameters, with plain autograd.

        Args:
            dtype: what they were computed in.

        Raises:
            CheckFailed: naming the examples.
        """
        every = range(len(self.drawn))
        self._entries(self.added, every, every, dtype)

    def allow(self, sketches: Mapping[str, Sketch]) -> None:
        """Let entries differ by what a sketch may cost, many times its standard deviation."""
        variance = torch.zeros_like(self.slack)
        for name in sketches.keys() & self.parts.keys():
            size = self.parts[name].diagonal(dim1=1, dim2=2)
            variance += sketches[name].variance * size[:, :, None] * size[:, None, :]
        self.slack += DEVIATIONS * variance.sqrt()

    def entries(self, sums: Sums | Spread, samples: Samples, dtype: torch.dtype) -> None:
        """Compare the finished Gram's entries between drawn samples with plain autograd.

        Args:
            sums: finished sums of the whole job.
            samples: its samples.
            dtype: what it ran in.

        Raises:
            CheckFailed: naming the examples.
        """
        frame, places = self.frame, np.array(self._places(samples))
        rows = [i for i, p in enumerate(places) if frame.rows[0] <= p < frame.rows[1]]
        columns = [i for i, p in enumerate(places) if frame.columns[0] <= p < frame.columns[1]]
        picked = sums.pick(*(gram_rows(places[which], frame.width) for which in (rows, columns)))
        got = torch.from_numpy(picked).to(self.device)
        self._entries(got, rows, columns, dtype)

    def _places(self, samples: Samples) -> list[int]:
        """Return the drawn samples' positions in the sweep."""
        return [int(samples.places(g, r)) for g, r in self.drawn]

    def _entries(self, got: Tensor, rows: Sequence[int], columns: Sequence[int], dtype: torch.dtype) -> None:
        """Compare the job's own entries between drawn samples, by their numbers."""
        if len(self.compared) < len(self.selected):
            return  # entries of the Gram sum over all parameters
        i, j = (
            torch.from_numpy(gram_rows(np.array(x, dtype=int), self.frame.width)).to(self.device)
            for x in (rows, columns)
        )
        truth, slack = (x[:, i][:, :, j] for x in (self.total, self.slack))
        left, right = (x.diagonal(dim1=1, dim2=2).sqrt() for x in (self.left, self.right))
        got = truth + (got - truth).sign() * ((got - truth).abs() - slack).clamp_min(0)  # NaN stays NaN
        sides = left[:, i], right[:, j]
        hint = "" if dtype in TOLERANCE else f"; {str(dtype)[6:]} may be too coarse for this model: precision='high'"
        self._judge("the Gram matrix", got, truth, *sides, rows, columns, TOLERANCE.get(dtype, 5e-2), hint)

    def _compare(self, name: str, got: Tensor) -> None:
        truth = self.parts[name]
        floor = FLOOR.get(self.dtype, 1e-2) * self.raw.diagonal(dim1=1, dim2=2).sqrt()
        scale = truth.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt() + floor
        every = list(range(len(self.drawn)))
        self._judge(name, got, truth, scale, scale, every, every, TOLERANCE[self.dtype])

    def _judge(
        self,
        name: str,
        got: Tensor,
        truth: Tensor,
        left: Tensor,
        right: Tensor,
        rows: Sequence[int],
        columns: Sequence[int],
        tolerance: float,
        hint: str = "",
    ) -> None:
        tiny = torch.finfo(torch.float64).tiny
        error = (got - truth).abs() / (left[:, :, None] * right[:, None, :] + tiny)
        worst = int(error.nan_to_num(nan=float("inf")).argmax())
        value = float(error.view(-1)[worst])
        if value <= tolerance:
            return
        i, j = worst // error.shape[2] % error.shape[1] // self.frame.width, worst % error.shape[2] // self.frame.width
        (gi, ri), (gj, rj) = self.drawn[rows[i]], self.drawn[columns[j]]
        names = [f"{r}{' (second inputs)' if g else ''}" for g, r in ((gi, ri), (gj, rj))]
        owner = name.rpartition(".")[0] if name in self.selected else None
        what = name if owner is None else f"{name} (of {type(self.model.get_submodule(owner)).__name__})"
        msg = f"{what}: differs from plain autograd by {value:.1e} relative, between examples {names[0]} and {names[1]}"
        if owner is not None:
            msg += f"; {leave_out(name)}"
        if self.dtype != torch.float64 and value < 1e-2:
            msg += "; this small, it may be the model's own rounding: precision='exact' tells"
        raise CheckFailed(msg + hint)
