"""Which modules to adapt: every candidate subset's training is forecast, and its kernel described (`judge`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ntkengine.arguments import called, number, whole
from ntkengine.forecast.candidates import grouped, kind_of, layer_of, named_subsets
from ntkengine.forecast.judge import Judge
from ntkengine.forecast.lora import RANK
from ntkengine.forecast.ranking import Choice, Ranking
from ntkengine.recipe import Recipe
from ntkengine.report.verdict import against_start, not_told_apart

if TYPE_CHECKING:
    from ntkengine.gram.linear import TangentFactors

Progress = Callable[[float, float, str], None]


def rank_subsets(
    gram: Any,
    targets: Any,
    subsets: str | Mapping[str, Iterable[str]] = "single",
    *,
    recipe: Recipe | dict[str, Any],
    factors: TangentFactors | Sequence[TangentFactors] | None = None,
    fold: np.ndarray | None = None,
    rank: int = 8,
    alpha: float | None = None,
    eval_targets: Any = None,
    repeats: int = 3,
    size: int | None = None,
    seed: int = 0,
    progress: Callable[[float, float, str], None] | None = None,
) -> Ranking:
    """Rank subsets of a model's linear maps for LoRA, by the eval loss their training is forecast to reach.

    With `factors` every subset's adapters are rehearsed (`rehearse`); without, the recipe is simulated on the
    expected LoRA kernels (`simulate`), which leaves out A's part and tells Adam's entries apart by module only.

    Args:
        gram: a Gram with `per_module` over full weights and with eval examples; or None with `factors`: then the
            kernels' figures are left out.
        targets: of the training examples, as for `fine_tune`.
        subsets: "single" (every map), "layers", "types", "greedy" (adds to the best subset the layer × type group that
            lowers the forecast eval loss most, until none does), "all" (every union of layers or of types), or named
            lists of module names or globs.
        recipe: of the training to forecast, or a mapping of its fields.
        factors: of `tangent_factors`, with the eval examples; or, with `fold`, one for each fold as `rehearse_folds`
            takes them, and no eval examples are needed.
        fold: (N,), the fold of each example.
        rank: r.
        alpha: α; default 2r.
        eval_targets: of the eval examples; default the Gram's. They should be none of the test's.
        repeats: rehearsals of each subset that differ in their seeds.
        size: at most so many groups in a greedy subset.
        seed: of the rehearsals.
        progress: called with (flops done, flops in all, stage) before each subset: see `show_progress`.

    Raises:
        InputError: no eval examples, names that match nothing, too many subsets, or as `rehearse`.

    Cost: a rehearsal or simulation a subset; 9 N³ flops more for its eigenvalues with a Gram.
    """
    called("progress", progress)
    if size is not None:
        size = whole("size", size, 1)
    rank, repeats, seed = whole("rank", rank, 1, RANK), whole("repeats", repeats, 1), whole("seed", seed)
    alpha = 2.0 * rank if alpha is None else number("alpha", alpha, above=0, what="a number")
    judge = Judge(gram, targets, Recipe.of(recipe), factors, fold, rank, alpha, eval_targets, repeats, seed)
    if subsets == "greedy":
        found = _greedy(judge, size, progress)
    else:
        found = _each(judge, named_subsets(subsets, judge.names), progress)
    found.sort(key=_loss)
    losses, start = [_interval(one) for one in found], judge.start()
    lines = [*against_start(losses[0], start.eval_loss), *judge.assumptions, *not_told_apart(losses)]
    return Ranking(found, rank, judge.alpha, judge.recipe, lines, start)


def _each(judge: Judge, subsets: Mapping[str, tuple[str, ...]], progress: Progress | None) -> list[Choice]:
    found, done, total = [], 0.0, sum(judge.work(modules) for modules in subsets.values())
    for i, (name, modules) in enumerate(subsets.items()):
        if progress is not None:
            progress(done, total, f"rehearsing {i + 1} of {len(subsets)}")
        found.append(judge.choice(name, modules))
        done += judge.work(modules)
    if progress is not None:
        progress(total, total, "done")
    return found


def _loss(choice: Choice) -> float:
    return _interval(choice)[0]


def _interval(choice: Choice) -> tuple[float, float, float]:
    """Return the forecast eval loss, which every choice has: without held-out examples there is no ranking."""
    assert choice.outcome.eval_loss is not None
    return choice.outcome.eval_loss


def _greedy(judge: Judge, size: int | None, progress: Progress | None) -> list[Choice]:
    """Return the subsets met on the way from nothing: at each step the group that lowers the forecast most."""
    groups = grouped(judge.names, lambda n: f"{layer_of(n)} {kind_of(n)}")
    chosen: list[str] = []
    kept: list[Choice] = []
    while len(chosen) < (size or len(groups)):
        tried = []
        for label in groups:
            if label not in chosen:
                if progress is not None:
                    progress(0.0, 0.0, f"rehearsing {' + '.join([*chosen, label])}")
                wanted = {n for g in [*chosen, label] for n in groups[g]}
                tried.append((label, judge.choice(" + ".join([*chosen, label]), tuple(sorted(wanted)))))
        label, best = min(tried, key=lambda item: _loss(item[1]))
        if kept and not _loss(best) < _loss(kept[-1]):
            break
        chosen.append(label)
        kept.append(best)
    return kept
