"""Which modules to adapt: a job's candidates rehearsed, ranked, and the best as a LoRA configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ntkengine.arguments import number, whole
from ntkengine.errors import InputError

if TYPE_CHECKING:
    from ntkengine.forecast.ranking import Ranking
    from ntkengine.gram.linear import TangentFactors
    from ntkengine.inputs.heads import HeadFit
    from ntkengine.jobparts import Job
    from ntkengine.prepared import Prepared

Progress = Callable[[float, float, str], None]
_KNOWN = ("peft_type", "r", "lora_alpha", "target_modules", "lora_dropout", "task_type", "fan_in_fan_out")


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
    needs a head that was fitted (`head.folds`). The maps are those of [gram] `params` (of the model without adapter),
    without those outside the numbered layers, such as the head. [gram] `memory_gib` bounds factors and kernels.

    Args:
        job: the job; rank and α are its [model.peft]'s r and lora_alpha (8 and 2r without); its target_modules are
            what is looked for, and not read.
        progress: called with (done, in all, stage).
        subsets: as for `rank_subsets`.
        repeats: likewise.
        size: likewise.
        kernels: also compute the per-module Gram, for condition numbers.

    Raises:
        InputError: no recipe, no labels, nothing held out, an adapter that is not rehearsed, or as `rank_subsets`.

    Cost: a sweep for the factors (one a fold without held-out examples), one for the kernels; a rehearsal a subset.
    """
    from ntkengine.forecast.candidates import SUBSETS, layer_of, named_subsets
    from ntkengine.forecast.subsets import rank_subsets
    from ntkengine.gram.engine import compute_gram
    from ntkengine.inputs.parameters import select_parameters
    from ntkengine.jobchecks import check_early
    from ntkengine.prepared import Prepared, quiet

    if job.finetune is None:
        raise InputError("finetune: is missing; give the job a [finetune] table, or --learning-rate")
    tell, adapter, recipe = progress or quiet, job.model.peft or {}, job.finetune.recipe()
    _refuse(adapter)
    if subsets not in SUBSETS:
        raise InputError(f"subsets: expected one of {', '.join(SUBSETS)}, got {subsets!r}")
    whole("repeats", repeats, 1)
    if size is not None:
        whole("size", size, 1)
    job = replace(job, model=replace(job.model, peft=None), out=None)
    check_early(job)
    prepared = Prepared(job, tell, None)
    targets, held = prepared.targets(prepared.train), prepared.targets(prepared.eval)
    if targets is None:
        raise InputError("select: expected labelled examples and readout 'logits' or 'margin'")
    fit = prepared.fit_head(tell)
    if held is None and fit is None:
        raise InputError("data.eval: expected held-out examples, as the head is not fitted here and has no folds")
    model, readout = prepared.model, prepared.readout
    chosen = select_parameters(model, job.gram.params)
    names = [n for n, p in chosen.items() if p.ndim == 2 and layer_of(n) != "outside"]
    if not names:
        raise InputError("gram.params: expected weights in numbered layers of the model among them, found none")
    if subsets != "greedy":
        named_subsets(subsets, [n.rpartition(".")[0] for n in names])  # too many are refused before the sweep
    call: dict[str, Any] = {"params": names, "readout": readout, "memory_gib": job.gram.memory_gib}
    steps = 3 if kernels else 2

    def step(number: int) -> Progress:
        return lambda done, total, stage: tell(done, total, f"step {number} of {steps}: {stage}")

    out_of_fold = fit if held is None else None
    factors = _factors(prepared, out_of_fold, call, step(1))
    gram = None
    if kernels:
        call |= {"per_module": True, "progress": step(2)}
        gram = compute_gram(model, prepared.inputs, **call, eval_inputs=prepared.eval_inputs)
    return rank_subsets(
        gram,
        targets,
        subsets,
        recipe=recipe,
        factors=factors,
        fold=None if out_of_fold is None else out_of_fold.fold,
        rank=adapter.get("r", 8),
        alpha=adapter.get("lora_alpha"),
        eval_targets=held,
        repeats=repeats,
        size=size,
        progress=step(steps),
    )


def _factors(
    prepared: Prepared, out_of_fold: HeadFit | None, call: Mapping[str, Any], progress: Progress
) -> TangentFactors | list[TangentFactors]:
    """Return factors of train and eval examples; or of train examples alone, under each fold's head.

    Args:
        prepared: the job's model and examples.
        out_of_fold: the fitted head, where examples are scored out of their folds.
        call: of `tangent_factors`.
        progress: called with (done, in all, stage).

    Raises:
        InputError: a head that saw one label only.
    """
    from ntkengine.gram.linear import tangent_factors

    def named(stage: str) -> Progress:
        progress(0.0, 1.0, stage)
        return lambda done, total, _: progress(done, total, stage)

    if out_of_fold is None:
        return tangent_factors(prepared.model, prepared.inputs, prepared.eval_inputs, **call, progress=named("factors"))
    folds, room = len(out_of_fold.weights) - 1, call["memory_gib"]
    for k, (W, _) in enumerate(out_of_fold.weights[:-1]):
        if not W.any():
            raise InputError(
                f"data.train: expected two labels among the examples without fold {k + 1} of {folds}, found one; "
                "give more of each, or data.eval"
            )
    share = {**call, "memory_gib": None if room is None else room / folds}

    def under(k: int) -> TangentFactors:
        stage = f"factors without fold {k + 1} of {folds}"
        return tangent_factors(prepared.model, prepared.inputs, **share, progress=named(stage))

    return out_of_fold.each_fold(prepared.model, under)


def _refuse(adapter: Mapping[str, Any]) -> None:
    """Refuse an adapter that is trained in another way than rehearsals are."""
    if str(adapter.get("peft_type", "LORA")).upper() != "LORA":
        raise InputError(
            f"model.peft.peft_type: expected LORA, the adapters that are rehearsed, got {adapter['peft_type']}"
        )
    other = next((name for name in adapter if name not in _KNOWN), None)
    if other is not None:
        raise InputError(f"model.peft.{other}: expected none, what it changes is not rehearsed, got {adapter[other]!r}")
    whole("model.peft.r", adapter.get("r", 8), 1)
    number("model.peft.lora_alpha", adapter.get("lora_alpha", 16), above=0, what="a number")
