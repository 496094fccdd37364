"""A padding token's row of zeros that is trained all the same: f does not see it, its gradient does.

Padding on the right is cut where f stays what it was. Where a model adds up the embeddings of all tokens, padding of
zeros leaves f alone, cut or not, but uncut its row has a gradient: the check refuses the job, and here it is said why.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ntkengine.errors import CheckFailed
from ntkengine.gram.task import Task
from ntkengine.inputs.embeddings import tables


@contextmanager
def zero_rows_named(task: Task) -> Iterator[None]:
    """Within the block, a failed check says so where a trained padding row of zeros is the likely cause.

    Args:
        task: the job.

    Raises:
        CheckFailed: in place of the one raised.
    """
    try:
        yield
    except CheckFailed as error:
        for name, token in _zero_rows(task):
            if str(error).startswith((f"{name} ", "the Gram matrix", "model: ")):
                raise CheckFailed(
                    f"{error}; likely cause: padding, whose row {token} of {name} is zero but has a gradient: give the "
                    f"embedding padding_idx={token}, or leave padding out of the pooling, by attention_mask"
                ) from error
        raise


def _zero_rows(task: Task) -> Iterator[tuple[str, int]]:
    """Yield (table, token) for each selected table in which a padding token of the inputs has a row of zeros."""
    found: dict[str, nn.Embedding] = {n: t for n, t in tables(task.model).items() if n in task.selected}
    for group, trimmed in zip(task.samples.groups, task.samples.trim, strict=True):
        if not trimmed:
            continue
        mask = group["attention_mask"]
        for ids in group.values():
            if ids is mask or ids.shape != mask.shape or ids.is_floating_point():
                continue
            for token in ids[mask == 0].unique().tolist():
                for name, table in found.items():
                    if 0 <= token < len(table.weight) and token != table.padding_idx and not table.weight[token].any():
                        yield name, token
