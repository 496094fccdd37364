"""From a Gram, targets and the start to what fine-tuning will reach.

Shapes: N train and M eval examples, C outputs, R ridges, T times.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ntkengine.arguments import meta_of
from ntkengine.errors import InputError
from ntkengine.forecast.assumptions import assumptions_of, curve_notes, start_line
from ntkengine.forecast.bounds import risk_bounds
from ntkengine.forecast.crossfit import CrossFit, Systems
from ntkengine.forecast.curves import checked_times, default_times, flow_curves
from ntkengine.forecast.given import (
    check_gram,
    eval_offset_of,
    eval_targets_of,
    offset_of,
    refuse_indefinite,
    ridge_of,
    targets_of,
)
from ntkengine.forecast.leaks import held_out, leak_notes
from ntkengine.forecast.result import Forecast
from ntkengine.forecast.scores import centred_alignment, hits, mean_interval, name_classes, wilson_interval
from ntkengine.forecast.system import Flow, cut
from ntkengine.forecast.trained import simulated, training_notes
from ntkengine.recipe import Recipe
from ntkengine.ridge import ridge_grid
from ntkengine.ridge.tuning import pick
from ntkengine.spectrum import Estimate, condition_from_eigenvalues, noise_of
from ntkengine.spectrum.functions import dimension_from_eigenvalues, rank_from_sums


def forecast(
    gram: Any,
    targets: ArrayLike | None = None,
    *,
    offset: ArrayLike | None = None,
    held_out_offset: ArrayLike | None = None,
    eval_targets: ArrayLike | None = None,
    eval_offset: ArrayLike | None = None,
    head_fitted_on_targets: bool | None = None,
    cross_fit: CrossFit | None = None,
    ridge: str | float = "loo",
    times: ArrayLike | None = None,
    recipe: Recipe | dict[str, Any] | None = None,
) -> Forecast:
    """Forecast fine-tuning from its tangent kernel at the start.

    Ridge path: f = f0 + K(·, X)(K + ridge·I)⁻¹(y − f0), scored on the training rows, by leave-one-example-out, by GCV
    and on the eval rows. Training curve: gradient flow of the linearised model on the mean over the N examples of
    ½‖f − y‖²: residual e^{−Kt/N}(y − f0), eval prediction f0 + K_x (I − e^{−Kt/N})K⁻¹(y − f0). In the flow,
    eigen-directions at or below the noise do not move: what K says of them is error. They may really move, by up to
    1 − e^{−2·noise·t/N} of their residual, which `assumptions` tells for the last time and for the best.

    Outputs: "trace" with C > 1 takes every output to have the kernel K/C (its noise too is divided by C); "full"
    couples them, and leaves out all rows of an example; "per-output" gives each its own kernel, with one ridge for all.

    Args:
        gram: (N, N), (N·C, N·C) or (C, N, N) array, or a Gram-like object with `.values`, and as far as known `.noise`,
            `.outputs`, `.contraction`, `.cross`, `.eval_outputs`.
        targets: (N,) or (N, C); two classes of one output are ±1, and 0 with 1 is refused. Default `gram.targets`.
        offset: (N, C), f0 on the training examples as training really starts; default `gram.outputs`, else 0.
        held_out_offset: (N, C), f0 of each training example from a head that was not fitted on it (out-of-fold).
            Leave-one-out and GCV then use y − held_out_offset; the training curve and eval still use `offset`.
        eval_targets: (M, C); default `gram.eval_targets`, if `targets` are its own, else no eval.
        eval_offset: (M, C), f0 on the eval examples; default `gram.eval_outputs`. Needed with an `offset` other than
            `gram.outputs`.
        head_fitted_on_targets: the head behind `offset` was fitted on these labels. Then `cross_fit`, or at least
            `held_out_offset`, must be given. Default: whether `fit_head` has seen most of the Gram's examples,
            which the model knows until it is saved.
        cross_fit: of `cross_fit`: kernels and starts of heads that did not see each fold. Leave-one-out and GCV then
            score each example in the system of its own fold, and `held_out_offset` is not needed. Default: what a file
            of `ntkengine gram` keeps for its own targets.
        ridge: "loo", "gcv", or a number in the unit of the kernel used (K/C for "trace"), not below the noise.
        times: (T,) > 0, learning rate × full-batch steps; default 121 on a log grid from 0.01·N/λ_max to 100·N/λ_min,
            and no further than 0.1·N/noise, within ten decades.
        recipe: of the training that will be done, or a mapping of its fields: it is simulated step by step on the
            kernel (`simulate`). Adam needs a Gram with `modules`.

    Returns:
        The forecast; `assumptions` says what it rests on.

    Raises:
        InputError: shapes that do not fit, entries not finite, eigenvalues more negative than twice the noise, a leak
            that would make every risk too rosy.

    Cost: 9 n³ flops for n rows of a system, n² (m + block) per ridge, n·m·(n + M) per time.
    Source: Allen 1974 (leave-one-out), Golub, Heath and Wahba 1979 (GCV), Rahimi Afzal et al. 2025 (bounds).
    """
    given = getattr(gram, "targets", None) if targets is None else targets
    if given is None:
        raise InputError("targets: expected (N, C), as the Gram holds none, got none")
    y = targets_of("targets", given)
    N, C = y.shape
    check_gram(gram, y)
    f0 = offset_of("offset", offset, getattr(gram, "outputs", None), y.shape)
    held, cross_fit, fitted = held_out(gram, y, held_out_offset, cross_fit, head_fitted_on_targets)
    y_eval = eval_targets_of(gram, eval_targets, y)
    kernel = cut(gram, N, C, None if y_eval is None else len(y_eval))
    flow = Flow.of(kernel, kernel.paths(y - f0))
    f0_eval = None if y_eval is None else eval_offset_of(gram, eval_offset, offset, f0, y_eval.shape)

    values = np.sort(np.concatenate([path.eigenvalues for path in flow.paths]))[::-1]
    of_gram = noise_of(gram) / kernel.divisor
    condition = condition_from_eigenvalues(values, of_gram)
    noise = condition.noise
    refuse_indefinite(values, of_gram)
    tested = _tested(gram, flow, y, held, cross_fit)
    least = noise if cross_fit is None else max(noise, tested.least_ridge(noise / condition.lambda_max))
    ridges = ridge_grid(values, least)
    if not isinstance(ridge, str):
        ridges = np.unique(np.append(ridges, ridge_of(ridge, noise)))
    elif ridge not in ("loo", "gcv"):
        raise InputError(f"ridge: expected 'loo', 'gcv' or a number, got {ridge!r}")

    left_out = np.stack([tested.left_out(r) for r in ridges])  # (R, N, C)
    loo_mse = (left_out**2).mean(axis=(1, 2))
    gcv = np.array([tested.gcv(r) for r in ridges])
    by_loo, by_gcv = pick(ridges, loo_mse), pick(ridges, gcv)
    chosen = {"loo": by_loo.ridge, "gcv": by_gcv.ridge}[ridge] if isinstance(ridge, str) else float(ridge)
    at = int(np.searchsorted(ridges, chosen))

    classes = name_classes(y, y_eval)
    loo_hits = hits(y - left_out, y) if classes else None
    eval_errors = eval_hits = None
    if y_eval is not None and f0_eval is not None:
        predicted = np.stack([f0_eval + flow.evaluate(partial(_ridge_response, r)) for r in ridges])
        eval_errors = ((predicted - y_eval) ** 2).mean(axis=2)  # (R, M)
        eval_hits = hits(predicted, y_eval) if classes else None

    residual_norm = float(np.linalg.norm(y - f0))
    top, bottom = condition.lambda_max, condition.lambda_min
    lower, upper = risk_bounds(chosen, residual_norm, max(bottom - noise, 0.0), top + noise)
    t = default_times(N, top, bottom, noise) if times is None else checked_times(times)
    training = None if recipe is None else simulated(gram, kernel, y, f0, y_eval, f0_eval, recipe)
    words = str(meta_of(gram).get("readout", "")).startswith("LabelWords")
    curves = flow_curves(flow, y, y_eval, f0_eval, t, noise, classes)
    return Forecast(
        n=N,
        n_eval=0 if y_eval is None else len(y_eval),
        outputs=C,
        contraction=kernel.contraction,
        noise=noise,
        eigenvalues=values,
        condition=condition,
        trace=Estimate(values.sum(), values.size * noise, exact=True),
        effective_rank=rank_from_sums(float(values.sum()), float(np.linalg.norm(values)), values.size, noise),
        effective_dimension=dimension_from_eigenvalues(values, chosen, noise),
        alignment=centred_alignment(kernel.over_examples(), y, noise * kernel.summed),
        ridges=ridges,
        train_mse=np.mean([path.train_mse(ridges) for path in flow.paths], axis=0),
        loo_mse=loo_mse,
        loo_accuracy=None if loo_hits is None else loo_hits.mean(axis=1),
        gcv=gcv,
        eval_mse=None if eval_errors is None else eval_errors.mean(axis=1),
        eval_accuracy=None if eval_hits is None else eval_hits.mean(axis=1),
        ridge_loo=by_loo.ridge,
        ridge_gcv=by_gcv.ridge,
        ridge=chosen,
        loo=mean_interval((left_out[at] ** 2).mean(axis=1)),
        loo_accuracy_at_ridge=None if loo_hits is None else wilson_interval(int(loo_hits[at].sum()), N),
        gcv_value=float(gcv[at]),
        eval_mse_at_ridge=None if eval_errors is None else mean_interval(eval_errors[at]),
        eval_accuracy_at_ridge=None
        if eval_hits is None
        else wilson_interval(int(eval_hits[at].sum()), eval_hits.shape[1]),
        start=_start(y, f0, held, y_eval, f0_eval, classes),
        times=t,
        **curves,
        lipschitz=float(np.sqrt(condition.lambda_max)),
        residual_norm=residual_norm,
        paper_lower=lower / y.size,
        paper_upper=upper / y.size,
        modules=_module_shares(gram),
        proximal=chosen / N,
        stopping_time=N / chosen,
        training=training,
        assumptions=assumptions_of(
            kernel,
            condition,
            chosen,
            start_line(held, cross_fit, fitted, words),
            classes,
            by_loo.edge,
            by_gcv.edge,
            gram,
        )
        + curve_notes(t, curves["best_time"], N, condition)
        + leak_notes(gram, N, None if y_eval is None else len(y_eval))
        + training_notes(training),
    )


def _ridge_response(ridge: float, eigenvalues: np.ndarray) -> np.ndarray:
    return 1.0 / (eigenvalues + ridge)


def _tested(gram: Any, flow: Flow, y: np.ndarray, held: np.ndarray | None, cross_fit: CrossFit | None) -> Systems:
    """Return systems with honest residuals, for leave-one-out and GCV; the flow keeps those of the real start."""
    if cross_fit is not None:
        return Systems.of(gram, cross_fit, y)
    paths = flow.paths
    if held is not None:
        residuals = flow.kernel.columns(y - held)
        paths = [path.with_residual(r) for path, r in zip(paths, residuals, strict=True)]
    return Systems([(flow.kernel, paths, np.ones(len(y), dtype=bool))])


def _start(
    y: np.ndarray,
    f0: np.ndarray,
    held: np.ndarray | None,
    y_eval: np.ndarray | None,
    f0_eval: np.ndarray | None,
    classes: bool,
) -> dict[str, float | None]:
    result: dict[str, float | None] = {}
    for name, f, target in (("train", f0, y), ("held_out", held, y), ("eval", f0_eval, y_eval)):
        result[f"{name}_mse"] = result[f"{name}_accuracy"] = None
        if f is not None and target is not None:
            result[f"{name}_mse"] = float(np.mean((f - target) ** 2))
            if classes:
                result[f"{name}_accuracy"] = float(hits(f, target).mean())
                if name != "held_out":
                    result[f"{name}_largest_class"] = _largest_class(target)
    return result


def _largest_class(target: np.ndarray) -> float:
    """Return the share of the examples (N, C) that are of the class most are of."""
    named = (target[:, 0] > 0).astype(int) if target.shape[1] == 1 else target.argmax(axis=1)
    return float(np.bincount(named).max() / len(named))


def _module_shares(gram: Any) -> dict[str, float]:
    """Share of the trace by module, from per-module Grams or from the traces noted beside the Gram."""
    noted = meta_of(gram).get("module_trace") or {}
    grams = getattr(gram, "modules", None) or {}
    traces = {n: float(np.trace(np.asarray(K), axis1=-2, axis2=-1).sum()) for n, K in grams.items()} or dict(noted)
    total = sum(traces.values())
    return {name: value / total for name, value in traces.items()} if total > 0 else {}
