"""Losses and hits of outputs, example by example, as tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ntkengine.arguments import real_array
from ntkengine.errors import InputError
from ntkengine.targets import refuse_bits


def as_targets(name: str, targets: object, loss: str, rows: int, outputs: int, beside: object = None) -> Tensor:
    """Return targets as (N, C) float64 for "squared", (N,) int64 classes for "cross-entropy".

    Args:
        name: what messages call them.
        targets: (N,) or (N, C). "cross-entropy" takes classes, or (N, C) scores whose largest entry names one (with one
            output, whose sign does).
        loss: of the recipe.
        rows: N.
        outputs: C.
        beside: the others of a train and eval set, not looked at but to tell numbers from classes.

    Raises:
        InputError: another shape, numbers that are not finite, classes out of range, 0 and 1 as squared-loss targets
            of one output, or scores that name no one class.
    """
    found = targets if isinstance(targets, Tensor) else real_array(name, targets)
    try:
        y = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{name}: expected numbers, got {type(targets).__name__}") from None
    if y.is_complex():
        raise InputError(f"{name}: expected real numbers, got {y.dtype}")
    classes = loss == "cross-entropy" and y.ndim == 1 and not y.is_floating_point()
    given = tuple(y.shape)
    if not classes and y.ndim == 1:
        y = y[:, None]
    if y.shape != ((rows,) if classes else (rows, outputs)):
        raise InputError(f"{name}: expected ({rows}, {outputs}) finite numbers, got shape {given}")
    if not bool(torch.isfinite(y.double()).all()):
        raise InputError(f"{name}: expected ({rows}, {outputs}) finite numbers, got NaN or infinity")
    y = y if classes else y.double()
    if loss == "squared":
        refuse_bits(name, y, beside if beside is None or isinstance(beside, Tensor) else real_array(name, beside))
        return y
    if not classes and outputs > 1:
        top = y.topk(2, dim=1).values
        several = (top[:, 0] == top[:, 1]).nonzero()
        if len(several):
            raise InputError(f"{name}: expected one largest score a row, its class, row {int(several[0])} has several")
        return y.argmax(1)
    if not classes:
        if bool((y >= 0).all()) and not bool(((y == 0) | (y == 1)).all()):
            raise InputError(
                f"{name}: expected 0 and 1, or scores of both signs, got numbers ≥ 0 such as {float(y.max())}"
            )
        return (y[:, 0] > 0).long()
    if int(y.min()) < 0 or int(y.max()) >= max(2, outputs):
        raise InputError(f"{name}: expected classes in 0..{max(2, outputs) - 1}, got {int(y.min())}..{int(y.max())}")
    return y.long()


def losses(f: Tensor, y: Tensor, loss: str) -> Tensor:
    """Return the loss of each example, (n,), of outputs f (n, C)."""
    if loss == "squared":
        return 0.5 * ((f - y.to(f)) ** 2).sum(1)
    if f.shape[1] == 1:
        return functional.binary_cross_entropy_with_logits(f[:, 0], y.to(f), reduction="none")
    return functional.cross_entropy(f, y, reduction="none")


def slopes(f: Tensor, y: Tensor, loss: str) -> Tensor:
    """Return the derivative of each example's loss with respect to its outputs, (n, C)."""
    if loss == "squared":
        return f - y.to(f)
    if f.shape[1] == 1:
        return torch.sigmoid(f) - y.to(f)[:, None]
    return torch.softmax(f, 1) - functional.one_hot(y, f.shape[1]).to(f)


def correct(f: Tensor, y: Tensor) -> Tensor:
    """Return whether each example's largest output (with one output: its sign, 0 is a miss) is the target's, (n,)."""
    if f.shape[1] > 1:
        return f.argmax(1) == (y if y.ndim == 1 else y.argmax(1))
    return ((f[:, 0] > 0) == ((y if y.ndim == 1 else y[:, 0]) > 0)) & (f[:, 0] != 0)


def divergence(f: Tensor, g: Tensor) -> float:
    """Return the mean over examples of KL(softmax f ‖ softmax g); with one output, of the two-class ones."""
    if f.shape[1] == 1:
        f, g = (torch.cat([torch.zeros_like(x), x], dim=1) for x in (f, g))
    return float(
        functional.kl_div(
            functional.log_softmax(g, 1), functional.log_softmax(f, 1), log_target=True, reduction="batchmean"
        )
    )
