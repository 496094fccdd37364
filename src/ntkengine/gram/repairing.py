"""The open tiles of a damaged file, recomputed from the samples that are in them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkengine import store
from ntkengine.errors import CheckFailed, InputError
from ntkengine.gram.checkpoint import Checkpoints
from ntkengine.gram.frame import gram_rows
from ntkengine.gram.noise import LIMIT
from ntkengine.gram.result import Gram

log = logging.getLogger(__name__)

Inputs = Mapping[str, Tensor]


def fill_open_tiles(
    checkpoints: Checkpoints,
    inputs: Inputs,
    inputs2: Inputs | None,
    eval_inputs: Inputs | None,
    compute: Callable[..., Gram],
) -> None:
    """Recompute what `store.repair_gram` left open, and write the whole file under its name.

    An entry of a Gram needs only its own two samples, so only samples with an open tile are swept. They are in other
    microbatches than they were: the new values are the old ones to within the Gram's noise.

    Args:
        checkpoints: of the job, with its damaged file in the folder.
        inputs: of the whole job.
        inputs2: likewise.
        eval_inputs: likewise.
        compute: `compute_gram` of the same model and settings.

    Raises:
        InputError: a file of another job, or one that can only be recomputed whole.
        CheckFailed: recomputed entries whose neighbours are sound do not agree with those.
    """
    folder = checkpoints.folder
    job, tiles, meta = store.open_damaged(folder.damaged)
    whole = "remove it to compute the whole file again"
    difference = store.first_difference(job, checkpoints.job)
    if difference is not None:
        msg = f"out: {folder.damaged} is of another job: {difference}; {whole}"
        raise InputError(msg)
    if meta.get("sketch"):
        msg = f"out: {folder.damaged} is a sketch, whose tiles cannot be computed one by one; {whole}"
        raise InputError(msg)
    width = int(meta["width"])
    second = inputs2 if inputs2 is not None else eval_inputs
    left, second_rows = _samples(tiles, width, two=inputs2 is not None)
    log.warning(
        "%s: %d damaged tiles; computing %d samples again",
        folder.out,
        sum(map(len, tiles.values())),
        len(left | second_rows),
    )
    rows, others = (np.array(sorted(found), dtype=int) for found in (left, second_rows))
    key = "eval_inputs" if inputs2 is None else "inputs2"
    gram = compute(_part(inputs, rows), **({key: _part(second, others)} if second is not None and len(others) else {}))
    if gram.meta["negligible_parameters"] != meta["negligible_parameters"]:
        msg = f"out: {folder.damaged}: these samples alone give other parameters without a sign; {whole}"
        raise InputError(msg)
    down, across = gram_rows(rows, width), gram_rows(others, width)
    found = {"gram": gram.values}  # other ranks or another start may have met the modules in another order
    found |= {meta["modules"][name]: part for name, part in gram.modules.items()}
    crosses = {"cross": gram.cross} | {meta["crosses"][name]: part for name, part in gram.cross_modules.items()}
    right = down if inputs2 is None else across
    computed = {n: (across, down, crosses[n]) if store.is_cross(n) else (down, right, found[n]) for n in tiles}
    for name, off in store.differences(folder.damaged, computed).items():
        if not off <= LIMIT[meta["precision"]]:
            msg = f"{folder.damaged}: entries of /{name} computed again differ from sound ones by a relative {off:.0e}"
            raise CheckFailed(msg)
    checkpoints.write(lambda name: store.fill_tiles(folder.damaged, folder.out, computed, name))


def _samples(tiles: Mapping[str, list[Any]], width: int, *, two: bool) -> tuple[set[int], set[int]]:
    """Return the samples of the first inputs, and of the second or eval inputs, that the tiles are of."""
    first: set[int] = set()
    second: set[int] = set()
    for name, places in tiles.items():
        for *_, r, c in places:
            down, right = ({i // width for i in range(s.start, s.stop)} for s in (r, c))
            (second if store.is_cross(name) else first).update(down)
            (second if two else first).update(right)
    return first, second


def _part(inputs: Inputs, rows: np.ndarray) -> dict[str, Tensor]:
    return {key: value[torch.from_numpy(rows).to(value.device)] for key, value in inputs.items()}
