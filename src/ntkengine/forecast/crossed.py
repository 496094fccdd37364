"""Rehearsals scored on the training examples themselves, each in a fold that neither head nor adapters have seen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ntkengine.arguments import real_array
from ntkengine.errors import InputError
from ntkengine.forecast.lora import Rehearsal, rehearse
from ntkengine.recipe import Recipe

if TYPE_CHECKING:
    from ntkengine.gram.linear import TangentFactors


def rehearse_folds(
    factors: Sequence[TangentFactors],
    fold: np.ndarray,
    targets: Any,
    recipe: Recipe | dict[str, Any],
    modules: Iterable[str] | None = None,
    **options: Any,
) -> Rehearsal:
    """Return the rehearsal of a recipe when there are no held-out examples: every example is scored out of its fold.

    For each fold k the adapters are trained on the other folds, from the factors under a head fitted without fold k,
    and scored on fold k. The runs are shorter by the share of a fold; the steps an epoch too.

    Args:
        factors: for each fold, of the N training examples with the model's head fitted without that fold
            (`HeadFit.write(model, k)`).
        fold: (N,) int, the fold of each example (`HeadFit.fold`).
        targets: (N,) or (N, C).
        recipe: as for `rehearse`.
        modules: likewise.
        options: rank, alpha, repeats and seed, likewise.

    Returns:
        The rehearsal whose `eval_losses` and `eval_correct` are (R, N), in the order of the examples. Its training
        losses are the means over the runs an example was trained in.

    Raises:
        InputError: folds that do not fit the factors, or as `rehearse`.

    Cost: a rehearsal a fold.
    """
    chosen, y = list(modules) if modules is not None else None, real_array("targets", targets)
    where = real_array("fold", fold)
    N = factors[0].train if factors else 0
    if where.shape != (N,) or sorted(set(where.tolist())) != list(range(len(factors))):
        raise InputError(f"fold: expected {N} numbers that use each of 0..{len(factors) - 1}, got {where!r}")
    if len(factors) < 2 or len(y) != N:
        raise InputError(f"targets: expected {N} and at least 2 folds, got {len(y)} and {len(factors)}")
    runs = []
    for k, part in enumerate(factors):
        rest, left = np.flatnonzero(where != k), np.flatnonzero(where == k)
        runs.append(rehearse(part, y[rest], recipe, chosen, rows=rest, eval_rows=left, eval_targets=y[left], **options))
    R = len(runs[0].train_losses)
    scored, hits, trained = np.empty((R, N)), np.empty((R, N), dtype=bool), np.zeros((R, N))
    for k, run in enumerate(runs):
        assert run.eval_losses is not None
        scored[:, where == k] = run.eval_losses
        if run.eval_correct is not None:
            hits[:, where == k] = run.eval_correct
        trained[:, where != k] += run.train_losses / (len(runs) - 1)
    steps = min(len(run.batch_losses[0]) for run in runs)
    first = runs[0]
    return Rehearsal(
        modules=first.modules,
        rank=first.rank,
        alpha=first.alpha,
        parameters=first.parameters,
        recipe=first.recipe,
        train_losses=trained,
        eval_losses=scored,
        eval_correct=None if any(run.eval_correct is None for run in runs) else hits,
        batch_losses=np.mean([run.batch_losses[:, :steps] for run in runs], axis=0),
        displacement=np.mean([run.displacement for run in runs], axis=0),
        movement=float(np.sqrt(np.mean([run.movement**2 for run in runs]))),
        seconds=sum(run.seconds for run in runs),
    )
