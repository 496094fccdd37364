"""Factors as one run of bytes: what travels, and what it becomes on the other side.

A parcel holds one piece of a shard (`shards.Piece`) of several parameters; its label, plain tuples, says what is where
and is known to all ranks before the parcel is sent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ntkengine.cluster.shards import Piece
from ntkengine.inputs.batches import Samples
from ntkengine.tangents.factors import Dense, Lookup, Outer, ParameterFactors, Use

_ALIGN = 64  # bytes; a view of a run of bytes as another dtype starts at a whole entry
_FIELDS: dict[type, tuple[str, ...]] = {Outer: ("a", "d"), Lookup: ("ids", "d"), Dense: ("g",)}
_KINDS = {kind.__name__: kind for kind in _FIELDS}

Held = tuple[str, tuple[tuple[str, tuple[int, ...]], ...]]  # a use: its kind, and dtype and shape of each tensor
Label = tuple[tuple[tuple[int, tuple[Held, ...]], ...], ...]  # by parameter, by slice: samples, uses


@dataclass(frozen=True)
class Slice:
    """Neighbours in one microbatch.

    Attributes:
        chunk: number of the microbatch.
        start: first sample in it.
        stop: behind the last.
    """

    chunk: int
    start: int
    stop: int


def slices_of(piece: Piece, samples: Samples, local: Samples) -> list[Slice]:
    """Return where a piece lies in its rank's own microbatches, in the piece's order.

    Args:
        piece: of this rank.
        samples: the job's.
        local: the rank's own, in the job's order.
    """
    if local.origins is None:
        msg = "expected samples that are part of a job's"
        raise ValueError(msg)
    group = next(i for i, (g, _) in enumerate(local.origins) if g == piece.group)
    rows = samples.order[piece.group][piece.positions - samples.span(piece.group)[0]]
    place = np.empty(samples.sizes[piece.group], dtype=np.int64)
    place[local.origins[group][1][local.order[group]]] = np.arange(local.sizes[group])
    wanted = np.sort(local.span(group)[0] + place[rows])
    found: list[Slice] = []
    for i, chunk in enumerate(local.chunks):
        first, last = np.searchsorted(wanted, [chunk.start, chunk.start + chunk.n])
        inside = wanted[first:last] - chunk.start
        runs = np.split(inside, np.nonzero(np.diff(inside) != 1)[0] + 1)
        found += [Slice(i, int(run[0]), int(run[-1]) + 1) for run in runs if len(run)]
    return found


def cut(factors: ParameterFactors, slices: Sequence[Slice]) -> ParameterFactors:
    """Return some of the samples, without a copy."""
    chunks = [[_cut(use, s) for use in factors.chunks[s.chunk]] for s in slices]
    return ParameterFactors(factors.name, factors.shape, [s.stop - s.start for s in slices], chunks)


def join(parts: Sequence[ParameterFactors]) -> ParameterFactors:
    """Return the samples of several shards one after the other."""
    sizes = [n for part in parts for n in part.sizes]
    return ParameterFactors(parts[0].name, parts[0].shape, sizes, [c for part in parts for c in part.chunks])


def label_of(found: Sequence[ParameterFactors]) -> Label:
    """Return the label of one piece of some parameters."""
    return tuple(
        tuple((n, tuple(_held(use) for use in uses)) for n, uses in zip(f.sizes, f.chunks, strict=True)) for f in found
    )


def size_of(label: Label) -> int:
    """Return the parcel's bytes."""
    return sum(_bytes(dtype, shape) for _, dtype, shape in _tensors(label))


def pack(found: Sequence[ParameterFactors], out: Tensor) -> None:
    """Write one piece of some parameters into a parcel.

    Args:
        found: as `label_of` was given.
        out: flat uint8, of `size_of` bytes.
    """
    at = 0
    for f in found:
        for uses in f.chunks:
            for use in uses:
                for name in _FIELDS[type(use)]:
                    x = getattr(use, name)
                    _view(out, at, x.dtype, x.shape).copy_(x)
                    at += _bytes(_dtype_name(x), x.shape)


def unpack(label: Label, parcel: Tensor, like: Sequence[ParameterFactors]) -> list[ParameterFactors]:
    """Return a parcel's factors: views of it.

    Args:
        label: the parcel's.
        parcel: flat uint8.
        like: this rank's own factors of the same parameters, for names and shapes.
    """
    found = []
    tensors = iter(_tensors(label))
    at = 0
    for own, slices in zip(like, label, strict=True):
        chunks: list[list[Use]] = []
        for _, uses in slices:
            chunk: list[Use] = []
            for kind, held in uses:
                made = []
                for _ in held:
                    _, dtype, shape = next(tensors)
                    made.append(_view(parcel, at, getattr(torch, dtype), shape))
                    at += _bytes(dtype, shape)
                chunk.append(_KINDS[kind](*made))
            chunks.append(chunk)
        found.append(ParameterFactors(own.name, own.shape, [n for n, _ in slices], chunks))
    return found


def _cut(use: Use, s: Slice) -> Use:
    return type(use)(*(getattr(use, name)[s.start : s.stop] for name in _FIELDS[type(use)]))


def _held(use: Use) -> Held:
    tensors = (getattr(use, name) for name in _FIELDS[type(use)])
    return type(use).__name__, tuple((_dtype_name(x), tuple(x.shape)) for x in tensors)


def _tensors(label: Label) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(k, t, shape) for slices in label for _, uses in slices for k, held in uses for t, shape in held]


def _dtype_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _bytes(dtype: str, shape: Sequence[int]) -> int:
    return _round(math.prod(shape) * getattr(torch, dtype).itemsize)


def _round(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _view(buffer: Tensor, at: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    return buffer[at : at + math.prod(shape) * dtype.itemsize].view(dtype).view(*shape)
