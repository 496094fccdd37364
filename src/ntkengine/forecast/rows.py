"""A forecast as rows of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ntkengine.digits import above, below, measured
from ntkengine.forecast.simulate import Simulation
from ntkengine.report.cells import aligned, chosen_ridge, largest_class, largest_shares, ridge_in_training, score
from ntkengine.report.tables import span

if TYPE_CHECKING:
    from ntkengine.forecast.result import Forecast


def forecast_rows(found: Forecast) -> list[tuple[str, str]]:
    """Return (label, value with its error) rows."""
    start, C = found.start, found.outputs
    shared = f", K/{C} for each output" if found.contraction == "trace" and C > 1 else ""
    rows = [
        ("examples", f"{found.n} train, {found.n_eval} eval, {found.outputs} output{'s' * (found.outputs > 1)}"),
        ("contraction", found.contraction + shared),
        ("largest eigenvalue", measured(found.eigenvalues[0], found.noise)),
        ("smallest eigenvalue", measured(found.eigenvalues[-1], found.noise)),
        ("condition number", str(found.condition)),
        ("trace", str(found.trace)),
        ("effective rank", str(found.effective_rank)),
        (
            "alignment with targets",
            "undefined" if found.alignment is None else aligned(found.alignment, found.alignment.error, 3),
        ),
        ("at the start, train", _pair(start["train_mse"], start["train_accuracy"])),
    ]
    if start["held_out_mse"] is not None:
        rows.append(("at the start, held-out head", _pair(start["held_out_mse"], start["held_out_accuracy"])))
    if start["eval_mse"] is not None:
        rows.append(("at the start, eval", _pair(start["eval_mse"], start["eval_accuracy"])))
    if start.get("train_largest_class") is not None:
        rows.append(("share of the largest class", largest_class(found)))
    rows += [
        ("ridge", chosen_ridge(found)),
        ("effective dimension", str(found.effective_dimension)),
        ("leave-one-out mse", span(found.loo)),
    ]
    if found.loo_accuracy_at_ridge is not None:
        rows.append(("leave-one-out accuracy", span(found.loo_accuracy_at_ridge)))
    rows.append(("GCV mse", f"{found.gcv_value:.4g}"))
    if found.eval_mse_at_ridge is not None:
        rows.append(("eval mse at ridge", span(found.eval_mse_at_ridge)))
    if found.eval_accuracy_at_ridge is not None:
        rows.append(("eval accuracy at ridge", span(found.eval_accuracy_at_ridge)))
    if found.best_time is not None and found.best_eval_loss is not None:
        rows.append(("least eval loss on the way", f"{span(found.best_eval_loss)} at time {found.best_time:.3g}"))
        if found.best_eval_accuracy is not None:
            rows.append(("eval accuracy there", span(found.best_eval_accuracy)))
    rows.append(("to get this ridge in training", ridge_in_training(found)))
    if found.training is not None:
        rows += _trained(found.training)
    rows.append(("train mse bounds at ridge", f"{below(found.paper_lower, 3)} to {above(found.paper_upper, 3)}"))
    return rows + [(f"share of trace, {name}", share) for name, share in largest_shares(found, 5)]


def _trained(training: Simulation) -> list[tuple[str, str]]:
    """Return rows of a simulated training."""
    r, o = training.recipe, training.outcome
    what = f"{r.optimizer}, learning rate {r.learning_rate:g}, {len(training.batch_losses)} steps"
    rows = [("simulated training", what), ("train loss after it", f"{o.train_loss:.4g}")]
    rows += [("eval loss after it (90%)", span(o.eval_loss))] if o.eval_loss is not None else []
    rows += [("eval accuracy after it (90%)", span(o.eval_accuracy))] if o.eval_accuracy is not None else []
    return [*rows, ("movement of parameters", f"{training.displacement:.4g}")]


def _pair(mse: float | None, accuracy: float | None) -> str:
    told = {"mse": mse, "accuracy": accuracy}
    return ", ".join(f"{kind} {score(kind, value)}" for kind, value in told.items() if value is not None)
