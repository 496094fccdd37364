"""The forecast as users hold it.

Shapes: N train and M eval examples, C outputs, R ridges, T times.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from ntkengine.arguments import number
from ntkengine.display import html_facts
from ntkengine.errors import InputError
from ntkengine.forecast.bounds import displacement_bound
from ntkengine.forecast.rows import forecast_rows
from ntkengine.forecast.simulate import Simulation
from ntkengine.report.plots import forecast_figures
from ntkengine.spectrum import ConditionNumber, Estimate
from ntkengine.spectrum.functions import dimension_from_eigenvalues

Interval = tuple[float, float, float]
# Rows of `Forecast.table` in its one-line form.
_ESSENTIAL = ("examples", "contraction", "condition number", "ridge", "leave-one-out mse", "eval mse at ridge")


@dataclass(frozen=True)
class Forecast:
    """What fine-tuning from this start is forecast to reach, with the error of each number.

    An *mse* is a mean over all entries (examples × outputs). A *loss* is the training objective, the mean over
    examples of ½‖f − y‖², summed over outputs: C/2 times the mse. Intervals are (value, low, high) at 95%. An Estimate
    is a number with its `.error`, here what `noise` does to it.

    Attributes:
        n: N, training examples.
        n_eval: M, eval examples; 0 without.
        outputs: C.
        contraction: how outputs enter the Gram.
        noise: error of each eigenvalue: the Gram's noise, the solver's rounding, and at least the size of the most
            negative eigenvalue. In the unit of the matrix used.
        eigenvalues: descending, of the matrix used (the trace kernel is divided by C; C separate kernels are joined).
        condition: λ_max/λ_min of it, or a lower bound.
        trace: sum of `eigenvalues`, not divided.
        effective_rank: (Σλ)²/Σλ².
        effective_dimension: tr K(K + ridge·I)⁻¹ at the chosen ridge, summed over systems.
        alignment: centred kernel-target alignment of the kernel over examples, with what the noise may do to it; None
            for constant targets.
        ridges: (R,) ascending, in the unit of the matrix used: C times as large for `KernelRidge` on a trace kernel.
        train_mse: (R,) after ridge regression, from the real start.
        loo_mse: (R,) leave-one-example-out.
        loo_accuracy: (R,) or None where targets name no class.
        gcv: (R,) generalised cross-validation, an estimate of the test mse.
        eval_mse: (R,) on the eval examples, or None.
        eval_accuracy: (R,) or None.
        ridge_loo: minimiser of `loo_mse`.
        ridge_gcv: minimiser of `gcv`.
        ridge: the chosen one.
        loo: leave-one-out mse at it; the interval is from the standard error over examples taken as independent.
            Leave-one-out errors share their training examples, so with a large head fitted on few examples it is too
            narrow.
        loo_accuracy_at_ridge: leave-one-out accuracy at it, Wilson interval, or None.
        gcv_value: GCV at it.
        eval_mse_at_ridge: on the eval examples at it, or None.
        eval_accuracy_at_ridge: likewise, Wilson interval, or None where targets name no class.
        start: before training: `train_mse`, `train_accuracy` from the real start, `held_out_mse`, `held_out_accuracy`
            from the held-out offset, `eval_mse`, `eval_accuracy`, and the shares of the largest class,
            `train_largest_class`, `eval_largest_class`; None where unknown.
        times: (T,) ascending; learning rate × full-batch steps on the loss above.
        curve_train_loss: (T,) under gradient flow of the linearised model.
        curve_train_accuracy: (T,) or None.
        curve_eval_loss: (T,) or None.
        curve_eval_accuracy: (T,) or None.
        curve_displacement: (T,) ‖θ_t − θ_0‖ of that flow.
        best_time: where `curve_eval_loss` is least, or None.
        best_eval_loss: that loss, as an interval over eval examples; it is the least of many, so a little low.
        best_eval_accuracy: accuracy there, Wilson interval, or None.
        lipschitz: √λ_max, the local Lip(f).
        residual_norm: ‖f0 − y‖ over all entries.
        paper_lower: lower bound of the training mse at the chosen ridge: the published sum of squares divided by N·C,
            with λ_max at the top of its error.
        paper_upper: upper bound, with λ_min at the bottom of its error, at least 0.
        modules: share of the trace by module name; empty when unknown.
        proximal: strength λ of (λ/2)‖θ − θ_0‖² beside the loss whose minimum is ridge regression at the chosen ridge:
            ridge/N.
        stopping_time: the time at which gradient flow has shrunk as much, N/ridge.
        training: the recipe simulated on the kernel, or None without one.
        assumptions: what the numbers rest on, one sentence each.
    """

    n: int
    n_eval: int
    outputs: int
    contraction: str
    noise: float
    eigenvalues: np.ndarray
    condition: ConditionNumber
    trace: Estimate
    effective_rank: Estimate
    effective_dimension: Estimate
    alignment: Estimate | None
    ridges: np.ndarray
    train_mse: np.ndarray
    loo_mse: np.ndarray
    loo_accuracy: np.ndarray | None
    gcv: np.ndarray
    eval_mse: np.ndarray | None
    eval_accuracy: np.ndarray | None
    ridge_loo: float
    ridge_gcv: float
    ridge: float
    loo: Interval
    loo_accuracy_at_ridge: Interval | None
    gcv_value: float
    eval_mse_at_ridge: Interval | None
    eval_accuracy_at_ridge: Interval | None
    start: dict[str, float | None]
    times: np.ndarray
    curve_train_loss: np.ndarray
    curve_train_accuracy: np.ndarray | None
    curve_eval_loss: np.ndarray | None
    curve_eval_accuracy: np.ndarray | None
    curve_displacement: np.ndarray
    best_time: float | None
    best_eval_loss: Interval | None
    best_eval_accuracy: Interval | None
    lipschitz: float
    residual_norm: float
    paper_lower: float
    paper_upper: float
    modules: dict[str, float]
    proximal: float
    stopping_time: float
    training: Simulation | None
    assumptions: list[str]

    def displacement(self, time: float, proximal: float = 0.0) -> float:
        """Return the published bound on ‖θ_t − θ_0‖ in this forecast's units (mean over examples of ½‖f − y‖²).

        Args:
            time: learning rate × full-batch steps, >= 0.
            proximal: strength λ of (λ/2)‖θ − θ_0‖², >= 0.

        Returns:
            A Euclidean norm over the parameters. `curve_displacement` is the flow's own value, which lies below.

        Raises:
            InputError: a negative argument.
        """
        return displacement_bound(self.lipschitz, self.residual_norm, proximal, time, scale=1.0 / self.n)

    def effective_dimension_at(self, ridge: float) -> Estimate:
        """Return tr K(K + ridge·I)⁻¹ at any ridge, summed over systems, with what `noise` does to it.

        Args:
            ridge: > 0, in the unit of K.

        Raises:
            InputError: ridge not positive.
        """
        return dimension_from_eigenvalues(self.eigenvalues, number("ridge", ridge, above=0), self.noise)

    def at(self, time: float) -> dict[str, float | None]:
        """Return the forecast curves at one training time, interpolated in log t.

        Args:
            time: within the range of `times`.

        Returns:
            `train_loss`, `train_accuracy`, `eval_loss`, `eval_accuracy`, `displacement`; None where there is no curve.

        Raises:
            InputError: time outside the range.
        """
        time = number("time", time)
        if not self.times[0] <= time <= self.times[-1]:
            raise InputError(f"time: expected between {self.times[0]:.3g} and {self.times[-1]:.3g}, got {time!r}")
        curves = {
            "train_loss": self.curve_train_loss,
            "train_accuracy": self.curve_train_accuracy,
            "eval_loss": self.curve_eval_loss,
            "eval_accuracy": self.curve_eval_accuracy,
            "displacement": self.curve_displacement,
        }
        x, axis = np.log(time), np.log(self.times)
        return {name: None if curve is None else float(np.interp(x, axis, curve)) for name, curve in curves.items()}

    def time_of_train_loss(self, loss: float) -> float:
        """Return the time at which the forecast training loss has fallen to a measured one.

        One run's training loss gives the time that carries its optimiser over to other forecasts.

        Args:
            loss: mean over examples of ½‖f − y‖².

        Returns:
            Time, interpolated in log t; the training loss only falls, so it is unique.

        Raises:
            InputError: a loss the curve does not pass.
        """
        curve, loss = self.curve_train_loss, number("loss", loss)
        if not curve[-1] <= loss <= curve[0]:
            raise InputError(f"loss: expected between {curve[-1]:.3g} and {curve[0]:.3g} of the curve, got {loss!r}")
        return float(np.exp(np.interp(loss, curve[::-1], np.log(self.times)[::-1])))

    def table(self) -> list[tuple[str, str]]:
        """Return (label, value with its error) rows for printing."""
        return forecast_rows(self)

    def __repr__(self) -> str:
        kept = [(label, value) for label, value in self.table() if label in _ESSENTIAL]
        return "Forecast(" + "; ".join(f"{label} {value}" for label, value in kept) + ")"

    def __str__(self) -> str:
        """Return the table, and what it rests on, as lines of text."""
        rows = self.table()
        width = max(len(label) for label, _ in rows)
        return "\n".join(
            [*(f"{label:<{width}}   {value}" for label, value in rows), *map("- {}".format, self.assumptions)]
        )

    def _repr_html_(self) -> str:
        return html_facts("Forecast", self.table(), note="; ".join(self.assumptions))

    def to_dict(self) -> dict[str, Any]:
        """Return every field as JSON-able values: arrays as lists, NaN and infinity as None.

        Beside each Estimate stands its error, such as `trace_error`; in `training` what it is forecast to reach.
        """
        found: dict[str, Any] = {}
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            found[name] = plain(value)
            if isinstance(value, Estimate):
                found[f"{name}_error"] = plain(value.error)
        if self.training is not None:
            found["training"]["outcome"] = plain(self.training.outcome)
        return found

    def figures(self) -> dict[str, Any]:
        """Return matplotlib figures by name."""
        return forecast_figures(self)


def plain(value: Any) -> Any:
    """Return values as JSON has them: dataclasses as mappings, arrays as lists, what is not finite as None."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return float(value) if np.isfinite(value) else None
    return value
