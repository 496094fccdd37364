"""What every rank's factors travel as: the pieces of its shard, half 0 before half 1, each with its label."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ntkengine.cluster.packing import Label, cut, label_of, pack, size_of, slices_of, unpack
from ntkengine.cluster.ring import Hop
from ntkengine.cluster.shards import Piece, Shard
from ntkengine.inputs.batches import Samples
from ntkengine.tangents.factors import ParameterFactors


class Parcels:
    """The parcels of a job, as one rank makes and reads them.

    Args:
        rank: which.
        shards: of all ranks.
        samples: the job's.
        local: the rank's own.
        device: where its factors are.
    """

    def __init__(
        self, rank: int, shards: Sequence[Shard], samples: Samples, local: Samples, device: torch.device
    ) -> None:
        self.device = device
        self._pieces = [sorted(s.pieces(), key=lambda p: (p.half, p.group)) for s in shards]
        self._slices = {piece: slices_of(piece, samples, local) for piece in self._pieces[rank]}

    def own(self, factors: ParameterFactors, piece: Piece) -> ParameterFactors:
        """Return one of the rank's own pieces of a parameter, without a copy."""
        return cut(factors, self._slices[piece])

    def labels(self, bundle: Sequence[ParameterFactors]) -> list[Label]:
        """Return the label of each of the rank's own pieces of some parameters."""
        return [label_of([self.own(f, piece) for f in bundle]) for piece in self._slices]

    def sizes(self, rank: int, labels: Sequence[Label]) -> tuple[int, int]:
        """Return the bytes of half 0 and of half 1 of a rank's parcel, by the labels of its pieces."""
        sizes = [0, 0]
        for piece, label in zip(self._pieces[rank], labels, strict=True):
            sizes[piece.half] += size_of(label)
        return sizes[0], sizes[1]

    def packed(self, bundle: Sequence[ParameterFactors]) -> Tensor:
        """Return the rank's own parcel of some parameters, flat uint8."""
        found = [[self.own(f, piece) for f in bundle] for piece in self._slices]
        sizes = [size_of(label_of(piece)) for piece in found]
        out = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
        for piece, part in zip(found, out.split(sizes), strict=True):
            pack(piece, part)
        return out

    def unpacked(
        self, hop: Hop, labels: Sequence[Label], parcel: Tensor, bundle: Sequence[ParameterFactors]
    ) -> dict[Piece, list[ParameterFactors]]:
        """Return the factors in a parcel by piece: views of it.

        Args:
            hop: that brought it.
            labels: of the pieces of its source.
            parcel: flat uint8.
            bundle: this rank's own factors of the same parameters.
        """
        found: dict[Piece, list[ParameterFactors]] = {}
        at = 0
        for piece, label in zip(self._pieces[hop.source], labels, strict=True):
            if not (hop.half and piece.half):
                size = size_of(label)
                found[piece] = unpack(label, parcel[at : at + size], bundle)
                at += size
        return found
