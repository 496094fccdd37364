"""What targets may not be, wherever they are given."""

from __future__ import annotations

from typing import Any

from ntkengine.errors import InputError


def refuse_bits(name: str, targets: Any, beside: Any = None) -> None:
    """Refuse classes as 0 and 1 for one output, whose sign is the class everywhere.

    Args:
        name: what messages call them.
        targets: (N, C) array or tensor.
        beside: other targets of the same kind; more than two values among them are no classes.

    Raises:
        InputError: one column of zeros and ones, both of them.
    """
    if targets.shape[1] != 1 or (beside is not None and len(set(beside.reshape(-1).tolist())) > 2):
        return
    ones, zeros = targets == 1, targets == 0
    if bool((ones | zeros).all()) and bool(ones.any()) and bool(zeros.any()):
        raise InputError(
            f"{name}: expected -1 and +1 for two classes of one output, got 0 and 1; 2 * targets - 1 makes them, or "
            "encode_targets(labels, 'margin', 2)"
        )
