"""Which modules to adapt: a job's candidates rehearsed, ranked, and the best as a LoRA configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ntkengine.errors import InputError

if TYPE_CHECKING:
    from ntkengine.forecast.ranking import Ranking
    from ntkengine.jobfile import Job

Progress = Callable[[float, float, str], None]


def run_select(
    job: Job,
    progress: Progress | None = None,
    *,
    subsets: str = "types",
    repeats: int = 3,
    size: int | None = None,
    kernels: bool = True,
) -> Ranking:
    """Rank subsets of a job's linear maps for LoRA, by what training them by its [finetune] is forecast to reach.

    Held-out examples are those of `data.eval`; without them every training example is scored out of its fold, which
    needs a head that was fitted (`head.folds`). Maps outside the numbered layers, such as the head, are left out.

    Args:
        job: the job; rank and α are its [model.peft]'s r and lora_alpha (8 and 2r without).
        progress: called with (done, in all, stage).
        subsets: as for `rank_subsets`.
        repeats: likewise.
        size: likewise.
        kernels: also compute the per-module Gram, for condition numbers.

    Raises:
        InputError: no recipe, no labels, nothing held out, or as `rank_subsets`.

    Cost: a sweep for the factors (one a fold without held-out examples), one for the kernels; a rehearsal a subset.
    """
    from ntkengine.forecast.candidates import layer_of
    from ntkengine.forecast.subsets import rank_subsets
    from ntkengine.gram.engine import compute_gram
    from ntkengine.gram.linear import tangent_factors
    from ntkengine.jobs import Prepared, check_early, quiet

    if job.finetune is None:
        raise InputError("finetune: is missing; give the job a [finetune] table, or --learning-rate")
    tell, adapter = progress or quiet, job.model.peft or {}
    if str(adapter.get("peft_type", "LORA")).upper() != "LORA":
        raise InputError(
            f"model.peft.peft_type: expected LORA, the adapters that are rehearsed, got {adapter['peft_type']}"
        )
    check_early(replace(job, out=None))
    prepared = Prepared(replace(job, model=replace(job.model, peft=None)), tell, None)
    targets, held = prepared.targets(prepared.train), prepared.targets(prepared.eval)
    if targets is None:
        raise InputError("select: expected labelled examples and readout 'logits' or 'margin'")
    fit = prepared.fit_head(tell)
    if held is None and fit is None:
        raise InputError("data.eval: expected held-out examples, as the head is not fitted here and has no folds")
    model, readout = prepared.model, job.gram.readout
    names = [n for n, p in model.named_parameters() if p.ndim == 2 and layer_of(n) != "outside"]
    if not names:
        raise InputError("model: expected weights in numbered layers, found none")
    call: dict[str, Any] = {"params": names, "readout": readout}
    factors: Any = []
    if held is None and fit is not None:
        for k in range(len(fit.weights) - 1):
            tell(0.0, 1.0, f"factors without fold {k + 1} of {len(fit.weights) - 1}")
            fit.write(model, k)
            factors.append(tangent_factors(model, prepared.inputs, **call))
        fit.write(model, -1)
    else:
        tell(0.0, 1.0, "factors")
        factors = tangent_factors(model, prepared.inputs, prepared.eval_inputs, **call)
    gram = None
    if kernels:
        gram = compute_gram(
            model, prepared.inputs, **call, per_module=True, eval_inputs=prepared.eval_inputs, progress=progress
        )
    tell(0.0, 1.0, "rehearsing")
    rank = int(adapter.get("r", 8))
    return rank_subsets(
        gram,
        targets,
        subsets,
        recipe=job.finetune.recipe(),
        factors=factors,
        fold=fit.fold if held is None and fit is not None else None,
        rank=rank,
        alpha=adapter.get("lora_alpha"),
        eval_targets=held,
        repeats=repeats,
        size=size,
    )
