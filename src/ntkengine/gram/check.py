"""The sweep, and what it added up to, held against plain autograd on a few samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkengine.errors import CheckFailed
from ntkengine.gram.frame import Frame, gram_rows
from ntkengine.gram.run import Sums, sum_gram
from ntkengine.gram.spread import Spread
from ntkengine.gram.truth import Truth
from ntkengine.inputs.batches import Samples
from ntkengine.inputs.parameters import leave_out
from ntkengine.products import unrouted
from ntkengine.tangents.sketch import Sketch

# Relative to √(K_ii K_jj); below lies rounding (quantised layers round to float32 inside even in float64).
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
# Share of the whole gradient below which one parameter's may be nothing but rounding.
FLOOR = {torch.float64: 1e-5, torch.float32: 1e-4}
DEVIATIONS = 10.0  # of a sketched entry; a wrong sketch is off by all of it


class Check(Truth):
    """Compares a sweep's gradients and Gram entries with those of plain autograd; for its arguments see `Truth`."""

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
        if self.reduced:
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
