"""Examples as microbatches: ordered by length, cut to the tokens they need, one axis for all groups.

Shape suffixes: S all samples of a job (its groups one after the other), n samples of one microbatch, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkengine.errors import InputError

MICROBATCH_TOKENS = 2048
# Keys whose second axis is the token axis; a mapping with other token-shaped tensors is never cut.
TOKEN_KEYS = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids"})


@dataclass(frozen=True)
class Chunk:
    """One microbatch: rows of one group, in sweep order.

    Attributes:
        group: index of the group.
        rows: (n,) indices into that group's tensors.
        start: first position on the sweep's sample axis.
    """

    group: int
    rows: np.ndarray
    start: int

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.rows)


class Samples:
    """The samples of a job: one or two groups (train, eval) on one sample axis, in microbatches by length.

    Args:
        groups: mappings of tensors with a common leading sample axis.
        microbatch_tokens: a microbatch holds about this many tokens (at least one sample).
        microbatch: exact number of samples per microbatch instead.
        trim: drop columns that are padding for the whole microbatch (right padding only).
        origins: where the groups are parts of a job's: for each the job's group and the rows there.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Tensor]],
        *,
        microbatch_tokens: int = MICROBATCH_TOKENS,
        microbatch: int | None = None,
        trim: bool = True,
        origins: Sequence[tuple[int, np.ndarray]] | None = None,
    ) -> None:
        self.sizes = [check_inputs(g) for g in groups]
        self.groups = [dict(g) for g in groups]
        self.origins = origins
        self.trim = [trim and _can_trim(g) for g in self.groups]
        self.lengths = [_lengths(g, n) for g, n in zip(self.groups, self.sizes, strict=True)]
        self.chunks: list[Chunk] = []
        self.order: list[np.ndarray] = []
        start = 0
        for i, n in enumerate(self.sizes):
            order = np.argsort(self.lengths[i], kind="stable")
            self.order.append(order)
            at = 0
            while at < n:
                size = microbatch or self._fit(i, order, at, microbatch_tokens)
                rows = order[at : at + size]
                self.chunks.append(Chunk(i, rows, start + at))
                at += len(rows)
            start += n
        self.total = start

    def _fit(self, group: int, order: np.ndarray, at: int, tokens: int) -> int:
        # Lengths ascend, so the last sample of a microbatch sets its width.
        lengths = self.widths(group)[order[at:]]
        used = (np.arange(len(lengths)) + 1) * lengths
        return max(1, int(np.searchsorted(used, tokens, side="right")))

    @property
    def mean_tokens(self) -> int:
        """Tokens of a sample, on average, padding cut."""
        return max(1, round(int(np.concatenate(self.lengths).sum()) / self.total))

    def span(self, group: int) -> tuple[int, int]:
        """Return the positions [start, stop) of a group on the sample axis."""
        start = sum(self.sizes[:group])
        return start, start + self.sizes[group]

    def widths(self, group: int) -> np.ndarray:
        """Return the tokens each sample of a group runs with: its own, or the group's width where padding stays."""
        return self.lengths[group] if self.trim[group] else np.full(self.sizes[group], self.width(group))

    def width(self, group: int) -> int:
        """Return the tokens of a group's samples as they are given, padding and all."""
        return _width(self.groups[group])

    def part(self, places: Sequence[tuple[int, np.ndarray]], **options: Any) -> Samples:
        """Return some of the samples, as groups of their own; empty ones are left out.

        Args:
            places: for each new group the group it is from and ascending positions on the sample axis.
            options: of the microbatches.
        """
        groups, origins = [], []
        for g, where in places:
            if not len(where):
                continue
            rows = self.order[g][where - self.span(g)[0]]
            index = torch.from_numpy(np.ascontiguousarray(rows))
            groups.append({k: v[index.to(v.device)] for k, v in self.groups[g].items()})
            origins.append((g, rows) if self.origins is None else (self.origins[g][0], self.origins[g][1][rows]))
        return Samples(groups, origins=origins, **options)

    def example(self, group: int, row: int) -> str:
        """Return what messages call a sample: its number among the user's examples."""
        if self.origins is not None:
            group, row = self.origins[group][0], int(self.origins[group][1][row])
        return f"{row}{' of the eval inputs' if group else ''}"

    def example_at(self, position: int) -> str:
        """Return `example` of a position on the sample axis."""
        group = next(g for g in range(len(self.sizes)) if position < self.span(g)[1])
        return self.example(group, int(self.order[group][position - self.span(group)[0]]))

    def inputs(self, chunk: Chunk, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the microbatch's tensors on `device`, floating ones as `dtype`, padding columns cut."""
        group = self.groups[chunk.group]
        rows = torch.from_numpy(np.ascontiguousarray(chunk.rows))
        width = int(self.lengths[chunk.group][chunk.rows].max()) if self.trim[chunk.group] else None
        batch = {}
        for key, value in group.items():
            part = value[rows.to(value.device)]
            if width is not None and key in TOKEN_KEYS:
                part = part[:, :width]
            batch[key] = part.to(device, dtype) if part.is_floating_point() else part.to(device)
        return batch

    def unsort(self, group: int) -> np.ndarray:
        """Return positions p with sweep_rows[p][i] belonging to example i of the group."""
        inverse = np.empty(self.sizes[group], dtype=np.int64)
        inverse[self.order[group]] = np.arange(self.sizes[group])
        return inverse

    def places(self, group: int, rows: Any = slice(None)) -> np.ndarray:
        """Return where examples of a group, by default all in their own order, are on the sample axis."""
        return np.asarray(self.span(group)[0] + self.unsort(group)[rows])


def check_inputs(inputs: Mapping[str, Tensor]) -> int:
    """Return N after checking that every value is a tensor with the same leading axis.

    Raises:
        InputError: not a mapping of tensors, unequal leading axes, or N = 0.
    """
    if not isinstance(inputs, Mapping) or not inputs:
        msg = f"inputs: expected a mapping of tensors with a leading sample axis, got {type(inputs).__name__}"
        raise InputError(msg)
    n = None
    for key, value in inputs.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            got = type(value).__name__ if not isinstance(value, Tensor) else "a 0-dimensional tensor"
            msg = f"inputs[{key!r}]: expected a tensor with a leading sample axis, got {got}"
            raise InputError(msg)
        if n is not None and len(value) != n:
            msg = f"inputs[{key!r}]: expected {n} samples like the other tensors, got {len(value)}"
            raise InputError(msg)
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            msg = f"inputs[{key!r}]: has values that are not finite"
            raise InputError(msg)
        n = len(value)
    if not n:
        msg = "inputs: expected at least one sample, got N = 0"
        raise InputError(msg)
    mask = inputs.get("attention_mask")
    if mask is not None and mask.ndim == 2 and bool((mask != 0).sum(1).eq(0).any()):
        row = int((mask != 0).sum(1).eq(0).nonzero()[0])
        msg = f"inputs['attention_mask']: sample {row} attends to no token"
        raise InputError(msg)
    return n


def _can_trim(inputs: Mapping[str, Tensor]) -> bool:
    mask = inputs.get("attention_mask")
    if mask is None or mask.ndim != 2:
        return False
    if any(v.ndim >= 2 and k not in TOKEN_KEYS for k, v in inputs.items()):
        return False
    if any(inputs[k].shape[1:] != mask.shape[1:] for k in TOKEN_KEYS & inputs.keys()):
        return False
    on = mask != 0
    return bool((on[:, :-1] >= on[:, 1:]).all())  # once off, off to the end: padding is on the right


def _lengths(inputs: Mapping[str, Tensor], n: int) -> np.ndarray:
    mask = inputs.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        return (mask != 0).sum(1).cpu().numpy()
    return np.full(n, _width(inputs))


def _width(inputs: Mapping[str, Tensor]) -> int:
    ids = inputs.get("input_ids")
    return int(ids.shape[1]) if ids is not None and ids.ndim > 1 else 1
