"""What the terminal and the HTML report show of what a Gram tells: Ritz values and forecasts, with units and errors.

Objects are taken by their public attributes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ntkengine.digits import above, measured, nearest, with_error
from ntkengine.report.tables import Table, shortened

RIDGE_ROWS = 16
_UNITS = "mse: mean over examples and outputs; loss: half of the squared error, mean over examples"


def spectrum_table(
    ritz: Any, condition: Any, approximation: str = "", fewer: str = "", numbers: Sequence[int] | None = None
) -> Table:
    """Return Ritz values, largest first, each with its bound, and whether their places in the spectrum are proved.

    Args:
        ritz: from `eigsh`.
        condition: of the same Gram.
        approximation: of `sketch_note`.
        fewer: why there are fewer than were asked for.
        numbers: their places in the whole spectrum, the largest of which is 1; default from the largest on.
    """
    order = np.argsort(ritz.values)[::-1]
    rows = [
        (
            str(i + 1 if numbers is None else numbers[i]),
            *with_error(ritz.values[j], ritz.bounds[j]),
            above(ritz.residuals[j], 2),
        )
        for i, j in enumerate(order)
    ]
    unproved = "" if ritz.certified else "numbers not certified: an eigenvalue may have been missed"
    note = f"condition number {condition}; {ritz.method}, {ritz.products} products"
    note += "".join(f"; {more}" for more in (unproved, fewer, approximation) if more)
    columns = ("no.", "eigenvalue (gradient²)", "± bound (gradient²)", "residual (gradient²)")
    return Table("Spectrum", columns, rows, note)


def forecast_table(forecast: Any) -> Table:
    """Return a forecast's own table."""
    return Table("Forecast", (), [tuple(row) for row in forecast.table()], _UNITS)


def ridge_table(forecast: Any, approximation: str = "") -> Table:
    """Return the ridge path, thinned to some sixteen rows that keep the chosen ridge.

    Args:
        forecast: of a Gram.
        approximation: of `sketch_note`.
    """
    chosen = int(np.argmin(np.abs(forecast.ridges - forecast.ridge)))
    marked = {chosen, *(int(np.argmin(np.abs(forecast.ridges - r))) for r in (forecast.ridge_loo, forecast.ridge_gcv))}
    keep = sorted({*np.linspace(0, len(forecast.ridges) - 1, RIDGE_ROWS).round().astype(int).tolist(), *marked})
    columns = {"train mse": forecast.train_mse, "LOO mse": forecast.loo_mse, "LOO accuracy": forecast.loo_accuracy}
    columns |= {"GCV mse": forecast.gcv, "eval mse": forecast.eval_mse, "eval accuracy": forecast.eval_accuracy}
    held = {name: values for name, values in columns.items() if values is not None}
    dimensions = {i: forecast.effective_dimension_at(forecast.ridges[i]) for i in keep}
    rows = [
        (
            f"{forecast.ridges[i]:.4g}",
            measured(dimensions[i], dimensions[i].error, 4),
            *(nearest(values[i]) for values in held.values()),
            ", ".join(_marks(forecast, i, chosen)),
        )
        for i in keep
    ]
    shared = f"K/{forecast.outputs}" if forecast.contraction == "trace" and forecast.outputs > 1 else "K"
    note = f"gradient² is the unit of {shared}, whose ridge it is; mse: mean over examples and outputs"
    note += f"; {approximation}" if approximation else ""
    return Table("Ridge path", ("ridge (gradient²)", "effective dimension", *held, ""), rows, note)


def module_table(shares: Mapping[str, float], trace: float, top: int | None = None) -> Table:
    """Return each module's part of the trace, largest first; those after the first `top` in one row."""
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    told, rest = ordered[:top], ordered[len(ordered[:top]) :]
    named = list(zip(shortened([name for name, _ in told]), (share for _, share in told), strict=True))
    if rest:
        named.append((f"{len(rest)} others", sum(share for _, share in rest)))
    rows = [(name, f"{share * trace:.5g}", f"{share:.2%}") for name, share in named]
    return Table("Trace by module", ("module", "trace (gradient²)", "share"), rows, "summed over the examples")


def comparison_table(forecasts: Mapping[str, Any]) -> Table:
    """Return several forecasts side by side, one column each."""
    tables = {name: dict(forecast.table()) for name, forecast in forecasts.items()}
    labels = dict.fromkeys(
        label for rows in tables.values() for label in rows if not label.startswith("share of trace")
    )
    rows = [(label, *(rows.get(label, "") for rows in tables.values())) for label in labels]
    return Table("Side by side", ("", *tables), rows)


def _marks(forecast: Any, index: int, chosen: int) -> list[str]:
    ridge = forecast.ridges[index]
    marks = {"chosen": index == chosen, "LOO": ridge == forecast.ridge_loo, "GCV": ridge == forecast.ridge_gcv}
    return [name for name, holds in marks.items() if holds]
