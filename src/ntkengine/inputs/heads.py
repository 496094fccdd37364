"""A classification head fitted by ridge regression, with out-of-fold outputs: no risk figure may see its own label."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ntkengine.arguments import SEEDS, number, real_array, whole
from ntkengine.errors import InputError
from ntkengine.inputs.attributes import stored_weight
from ntkengine.inputs.batches import Samples
from ntkengine.inputs.headrows import chunk_logits, head_features, nearness
from ntkengine.inputs.parameters import require_module
from ntkengine.inputs.seen import marks_of
from ntkengine.inputs.sources import Source, as_inputs

log = logging.getLogger(__name__)
T = TypeVar("T")
_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(frozen=True)
class HeadFit:
    """A fitted head.

    Attributes:
        held_out: (N, C) float64: example n's outputs from a head fitted on the folds without n.
        fitted: (N, C) float64: outputs of the head now in the model.
        ridge: the penalty used, added to Σ x xᵀ of centred features.
        fold: (N,) the fold of each example.
        weights: per fold (W (C, d), b (C,)), fitted without it; the last pair is the head now in the model.
        module: the Linear that was written.
        seen: marks of the examples.
    """

    held_out: np.ndarray = field(repr=False)
    fitted: np.ndarray = field(repr=False)
    ridge: float
    fold: np.ndarray = field(repr=False)
    weights: list[tuple[np.ndarray, np.ndarray]] = field(repr=False)
    module: str
    seen: frozenset[bytes] = field(repr=False)

    def write(self, model: nn.Module, fold: int) -> None:
        """Put one fold's head into the model; −1 puts back the head fitted on all.

        Raises:
            InputError: no such fold.
        """
        whole("fold", fold, -1, len(self.weights) - 2)
        linear: Any = model.get_submodule(self.module)
        W, b = self.weights[fold]
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(W))
            if linear.bias is not None:
                linear.bias.copy_(torch.from_numpy(b))
        _note(model, new=False, seen=self.seen)

    def each_fold(self, model: nn.Module, work: Callable[[int], T]) -> list[T]:
        """Return work(k) with the head fitted without fold k in the model, for each k; the fitted head is put back."""
        try:
            found = []
            for k in range(len(self.weights) - 1):
                self.write(model, k)
                found.append(work(k))
            return found
        finally:
            self.write(model, -1)


def _note(model: nn.Module, *, new: bool, seen: frozenset[bytes] | None) -> None:
    """Note on a model whether its head is random, and what it was fitted on: there too where an adapter is merged."""
    model.ntk_head_new, model.ntk_head_seen = new, seen  # type: ignore[assignment]
    if hasattr(model, "get_base_model"):
        model.get_base_model().ntk_head_seen = seen  # type: ignore[operator]


def warn_of_new_head(model: nn.Module, readout: object) -> None:
    """Say once that a model's outputs are those of a random head, which neither `fit_head` nor `fine_tune` has seen."""
    if isinstance(readout, str) and getattr(model, "ntk_head_new", False) and model not in _told:
        _told.add(model)
        log.warning(
            "%s: its classification head is new, that is random, and so are the outputs; fit it on labels first "
            "(fit_head; commands do unless told not to), or train it",
            getattr(model, "ntk_source", "model"),
        )


def fit_head(
    model: nn.Module,
    inputs: Source,
    targets: np.ndarray,
    *,
    ridge: float | str = "loo",
    folds: int = 5,
    seed: int = 0,
) -> HeadFit:
    """Fit the last Linear of a classifier to targets by ridge regression on its input features, in place.

    min_W,b Σ_n ‖W x_n + b − y_n‖² + ridge ‖W‖², the bias not penalised; a sum over examples, not a mean.

    Args:
        model: a sequence classifier whose logits come from an `nn.Linear`; nothing else of it is changed.
        inputs: examples, as for `compute_gram`.
        targets: (N, C), C the number of logits.
        ridge: the penalty, or `"loo"` for the best leave-one-out error on a grid, up to 10 times the largest eigenvalue
            of the features' Gram: where they tell nothing of the targets, more would leave a head of zeros, and K = 0.
        folds: for the held-out outputs; at most N.
        seed: of the folds.

    Raises:
        InputError: no such Linear, targets of another shape, or fewer than two examples.
    Cost: one forward pass of all examples, and one SVD of N × d features for each fold and for the penalty.
    """
    require_module(model)
    targets = real_array("targets", targets).astype(np.float64)
    inputs = as_inputs(inputs, model)
    samples = Samples([inputs])
    n = samples.total
    if targets.ndim != 2 or len(targets) != n or not np.isfinite(targets).all():
        msg = f"targets: expected ({n}, C) finite numbers, got shape {targets.shape}"
        raise InputError(msg)
    check_fit(ridge, folds)
    seed = whole("seed", seed, 0, SEEDS)
    if n < 2:
        msg = f"fit_head: expected at least 2 examples, got {n}"
        raise InputError(msg)
    seen = marks_of(inputs)
    for part in (samples, Samples([inputs], trim=False)):
        name, features = head_features(model, part)
        linear: Any = model.get_submodule(name)
        if stored_weight(linear) is None:
            msg = f"fit_head: the weight of {name} is computed: it is no plain Linear; fit the head yourself"
            raise InputError(msg)
        if targets.shape[1] != linear.out_features:
            msg = f"targets: expected {linear.out_features} columns, one for each logit, got {targets.shape[1]}"
            raise InputError(msg)
        fit = _fit(name, linear, features, targets, ridge, folds, seed, seen)
        wrong = _misfit(model, fit, features, inputs, samples)
        if wrong is None:
            return fit
    raise InputError(wrong)


def _fit(
    name: str,
    linear: Any,
    features: np.ndarray,
    targets: np.ndarray,
    ridge: float | str,
    folds: int,
    seed: int,
    seen: frozenset[bytes],
) -> HeadFit:
    """Return the heads, in the numbers that the Linear's dtype has."""
    n, bias = len(features), linear.bias is not None
    chosen = _best_ridge(features, targets, bias) if ridge == "loo" else float(ridge)
    held_out = np.full_like(targets, np.nan)
    fold = np.empty(n, dtype=np.int64)
    weights = []
    for k, part in enumerate(np.array_split(np.random.default_rng(seed).permutation(n), min(folds, n))):
        rest = np.setdiff1d(np.arange(n), part)
        W, b = (_rounded(x, linear) for x in _ridge(features[rest], targets[rest], chosen, bias))
        held_out[part], fold[part] = features[part] @ W.T + b, k
        weights.append((W, b))
    W, b = (_rounded(x, linear) for x in _ridge(features, targets, chosen, bias))
    return HeadFit(held_out, features @ W.T + b, chosen, fold, [*weights, (W, b)], name, seen)


def _rounded(x: np.ndarray, linear: nn.Linear) -> np.ndarray:
    return torch.from_numpy(x).to(linear.weight.dtype).to(torch.float64).numpy()


def _misfit(
    model: nn.Module, fit: HeadFit, features: np.ndarray, inputs: Mapping[str, Tensor], samples: Samples
) -> str | None:
    """Write the fitted head, and put the old one back if the model does not give what it should on three examples."""
    linear: Any = model.get_submodule(fit.module)
    old = [p.detach().clone() for p in (linear.weight, linear.bias) if p is not None]
    new, seen = getattr(model, "ntk_head_new", False), getattr(model, "ntk_head_seen", None)
    fit.write(model, -1)
    W, b = fit.weights[-1]
    near = nearness(linear.weight.dtype)
    order = samples.order[0]
    for n in sorted({int(order[0]), int(order[len(order) // 2]), int(order[-1])}):
        one = Samples([{k: v[n : n + 1] for k, v in inputs.items()}], trim=False)
        got = chunk_logits(model, one, one.chunks[0], [])[0].double().cpu().numpy()
        most = (np.abs(features[n]) @ np.abs(W).T + np.abs(b)).max()
        same = got.shape == fit.fitted[n].shape and np.abs(got - fit.fitted[n]).max() <= near * most
        if not same:
            with torch.no_grad():
                for p, was in zip((linear.weight, linear.bias), old, strict=False):
                    p.copy_(was)
            _note(model, new=new, seen=seen)
            return (
                f"fit_head: with the fitted weights of {fit.module} the model gives {got} for example {n}, and its "
                f"features times those weights {fit.fitted[n]}: it is no plain Linear; fit the head yourself"
            )
    return None


def check_fit(ridge: float | str, folds: int, table: str = "") -> None:
    """Refuse a penalty or a number of folds that no head can be fitted with.

    Args:
        ridge: of `fit_head`.
        folds: likewise.
        table: what stands before their names in a message.

    Raises:
        InputError: naming it.
    """
    if not isinstance(ridge, str) or ridge != "loo":
        number(f"{table}ridge", ridge, above=0, what="'loo' or a number")
    whole(f"{table}folds", folds, 2)


def _ridge(X: np.ndarray, Y: np.ndarray, ridge: float, bias: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return W (C, d) and b (C,), b = 0 for a head without bias."""
    x0, y0 = (X.mean(0), Y.mean(0)) if bias else (np.zeros(X.shape[1]), np.zeros(Y.shape[1]))
    U, s, Vt = np.linalg.svd(X - x0, full_matrices=False)
    W = (Vt.T @ ((s / (s**2 + ridge))[:, None] * (U.T @ (Y - y0)))).T
    return W, y0 - W @ x0


def _best_ridge(X: np.ndarray, Y: np.ndarray, bias: bool) -> float:
    """Return the penalty with the least leave-one-out squared error, of 40 spread over the features' spectrum."""
    x0, y0 = (X.mean(0), Y.mean(0)) if bias else (np.zeros(X.shape[1]), np.zeros(Y.shape[1]))
    U, s, _ = np.linalg.svd(X - x0, full_matrices=False)
    centred = Y - y0
    top = max(float(s[0]) ** 2, np.finfo(float).tiny)
    grid = top * np.logspace(-8, 1, 40)
    errors = []
    for ridge in grid:
        shrink = s**2 / (s**2 + ridge)
        residual = centred - U @ (shrink[:, None] * (U.T @ centred))
        leverage = bias / len(X) + (U**2 * shrink).sum(1)
        errors.append(np.mean((residual / np.maximum(1 - leverage, 1e-12)[:, None]) ** 2))
    return float(grid[int(np.argmin(errors))])
