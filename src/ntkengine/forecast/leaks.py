"""What would make risk figures too small: examples that were seen before they are scored."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ntkengine.arguments import flag, meta_of
from ntkengine.errors import InputError
from ntkengine.forecast.crossfit import CrossFit
from ntkengine.forecast.given import holds, offset_of

log = logging.getLogger(__name__)

_FEW = 0.02  # of the examples: below this a remark among the assumptions is enough


def held_out(
    gram: Any, y: np.ndarray, offset: ArrayLike | None, cross_fit: CrossFit | None, told: bool | None
) -> tuple[np.ndarray | None, CrossFit | None, bool]:
    """Return f0 of heads that did not see an example, (N, C), the cross-fit it is of, and whether the Gram's head did.

    Args:
        gram: as `forecast` takes it.
        y: targets, (N, C).
        offset: `held_out_offset`.
        cross_fit: as given; else what the Gram keeps for its own targets, where no offset was given.
        told: `head_fitted_on_targets`.

    Raises:
        InputError: what does not fit the Gram, or as `_head_fitted`.
    """
    held = None if offset is None else offset_of("held_out_offset", offset, None, y.shape)
    if cross_fit is None and held is None and told is not False and holds(gram, y):
        cross_fit = CrossFit.kept_in(gram)
    if cross_fit is not None:
        if not isinstance(cross_fit, CrossFit):
            raise InputError(f"cross_fit: expected a CrossFit, got {type(cross_fit).__name__}")
        cross_fit.check(gram, *y.shape)
        held = cross_fit.held_out()
    if told is not None:
        flag("head_fitted_on_targets", told)
    return held, cross_fit, _head_fitted(gram, told, held is not None)


def _head_fitted(gram: Any, told: bool | None, held_out: bool) -> bool:
    """Return whether the head was fitted on the targets: as told, else as the Gram knows.

    Args:
        gram: as `forecast` takes it.
        told: `head_fitted_on_targets`.
        held_out: whether there are outputs of heads that did not see an example.

    Raises:
        InputError: it was, and there are none; or the whole model was trained on them.
    """
    meta = meta_of(gram)
    if meta.get("trained_on") and told is not False:
        raise InputError(
            "gram: fine_tune trained its model on these examples, and every risk figure would be too small; make it of "
            "the model before that; where it was not, or on other targets, head_fitted_on_targets=False"
        )
    fitted = bool(meta.get("head_fitted", False)) if told is None else told
    if fitted and not held_out:
        raise InputError(
            "held_out_offset: expected outputs of heads that did not see each example, got none: a head fitted on "
            "these targets makes leave-one-out and GCV too small; pass cross_fit=cross_fit(...), or out-of-fold "
            "outputs (N, C)"
            + ("" if told else "; where the head was not fitted on these labels, head_fitted_on_targets=False")
        )
    return fitted


def leak_notes(gram: Any, examples: int, eval_examples: int | None) -> list[str]:
    """Return sentences on examples that are scored although they were seen; many are warned of.

    Args:
        gram: as `forecast` takes it.
        examples: N.
        eval_examples: M, or None without eval targets.
    """
    meta, notes = meta_of(gram), []
    repeated, seen = meta.get("repeated") or 0, meta.get("eval_seen") or 0
    if repeated:
        notes.append(
            (
                repeated / examples,
                f"{repeated} of {examples} train examples are there more than once: leave-one-out has seen them.",
            )
        )
    if seen and eval_examples is not None:
        notes.append(
            (
                seen / eval_examples,
                f"{seen} of {eval_examples} eval examples are train examples, or were seen in fitting: on them eval "
                "figures are no test.",
            )
        )
    for share, note in notes:
        if share > _FEW:
            log.warning("%s", note)
    return [note for _, note in notes]
