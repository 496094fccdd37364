"""Grams put together from the pieces of a checkpoint, whatever the shapes of either."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ntkengine.errors import InputError
from ntkengine.store.checkpoints import Part, Saved, read_parts


def overlay(found: Sequence[Saved], targets: Sequence[Part]) -> None:
    """Fill pieces of Grams from the files of a checkpoint.

    Args:
        found: the files; each entry is in one of their pieces, or its mirror image.
        targets: what to fill; their `values` are written to.

    Raises:
        InputError: an entry is in none of the files.

    Cost: goes once through each file, and reads of it only what has an entry in a target.
    """
    spans = np.array([(*target.rows, *target.columns) for target in targets]).reshape(-1, 4)
    names = np.array([target.name for target in targets], dtype=object)
    missing = [np.ones(target.values.shape[1:], dtype=bool) for target in targets]

    def met(part: Part, *, flip: bool) -> np.ndarray:
        (r0, r1), (c0, c1) = _span(part, flip)
        a, b, c, d = spans.T
        return np.flatnonzero((a < r1) & (r0 < b) & (c < c1) & (c0 < d) & (names == part.name))

    def ways(part: Part) -> list[tuple[bool, np.ndarray]]:
        return [(flip, met(part, flip=flip)) for flip in ((False, True) if part.symmetric else (False,))]

    for saved in found:
        for part in read_parts(saved, lambda part: any(len(hits) for _, hits in ways(part))):
            for flip, hits in ways(part):
                for k in hits:
                    _put(part, flip, targets[k], missing[k])
    for target, lacks in zip(targets, missing, strict=True):
        if lacks.any():
            at = np.argwhere(lacks)[0]
            msg = f"checkpoint: has no entry ({at[0] + target.rows[0]}, {at[1] + target.columns[0]}) of the Gram"
            raise InputError(msg)


def _span(part: Part, flip: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    return (part.columns, part.rows) if flip else (part.rows, part.columns)


def _put(part: Part, flip: bool, target: Part, missing: np.ndarray) -> None:
    """Write what a piece, or its mirror image, has of a target."""
    (r0, r1), (c0, c1) = _span(part, flip)
    rows, columns = target.rows, target.columns
    a, b, c, d = max(r0, rows[0]), min(r1, rows[1]), max(c0, columns[0]), min(c1, columns[1])
    values = part.values.transpose(0, 2, 1) if flip else part.values
    values = values[:, a - r0 : b - r0, c - c0 : d - c0]
    here = np.s_[a - rows[0] : b - rows[0], c - columns[0] : d - columns[0]]
    out = target.values
    if not part.lower or (c >= b - 1 if flip else a >= d - 1):
        out[(slice(None), *here)] = values
        missing[here] = False
        return
    i, j = np.arange(a, b)[:, None], np.arange(c, d)[None, :]
    valid = i <= j if flip else i >= j
    out[(slice(None), *here)] = np.where(valid, values, out[(slice(None), *here)])
    missing[here] &= ~valid
