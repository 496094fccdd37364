"""From a Gram file to what is read off it: its forecast, and the sections of a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ntkengine.errors import InputError

if TYPE_CHECKING:
    from ntkengine.forecast import Forecast
    from ntkengine.gram.result import Gram
    from ntkengine.recipe import Recipe
    from ntkengine.report import Section


def forecast_file(
    path_or_gram: str | Path | Gram, ridge: str | float = "loo", recipe: Recipe | None = None
) -> Forecast:
    """Return the forecast of what a Gram file holds: targets, outputs, held-out outputs, eval.

    Args:
        path_or_gram: a file, or a Gram with targets.
        ridge: "loo", "gcv", or a number in the unit of K/C.
        recipe: of the training to simulate.

    Raises:
        InputError: no targets in it, a head fitted on them without held-out heads, or as `forecast`.
    """
    from ntkengine.forecast import CrossFit, forecast
    from ntkengine.store import open_gram

    gram = open_gram(path_or_gram) if isinstance(path_or_gram, str | Path) else path_or_gram
    name = gram.path or "gram"
    readout = gram.meta.get("readout")
    if gram.targets is None and readout not in ("logits", "margin", None):
        raise InputError(
            f"{name}: is of readout {readout!r}, which has no class targets to forecast; compute it with readout "
            "'logits' or 'margin', or pass targets to forecast() in Python"
        )
    if gram.targets is None:
        raise InputError(f"{name}: holds no targets, so there is nothing to forecast; compute it on labelled examples")
    outputs, wanted = np.shape(gram.outputs)[1], np.shape(gram.targets)[1]
    if gram.contraction == "sum-of-outputs" and wanted > 1:
        raise InputError(
            f"{name}: 'sum-of-outputs' is the kernel of the sum of {wanted} outputs and cannot forecast each; compute "
            "the Gram with 'trace' or 'full'"
        )
    if outputs != wanted:
        raise InputError(f"{name}: expected targets for {outputs} outputs, got {wanted}")
    held_out = CrossFit.kept_in(gram)
    if held_out is None and gram.meta.get("head_fitted"):
        raise InputError(
            f"{name}: its head was fitted on its examples, and it holds no kernels under held-out heads; compute it "
            "with `ntkengine gram`, or call forecast() in Python with cross_fit=cross_fit(...)"
        )
    fitted = ((gram.meta.get("settings") or {}).get("head") or {}).get("fitted")
    return forecast(
        gram,
        gram.targets,
        cross_fit=held_out,
        eval_targets=gram.eval_targets,
        head_fitted_on_targets=fitted,
        ridge=ridge,
        recipe=recipe,
    )


def report_files(paths: Sequence[str | Path], ridge: str | float = "loo") -> list[Section]:
    """Return the sections of a report over Gram files, rankings (.json) and fine-tunings (.jsonl).

    Several Grams with targets are also set side by side.

    Raises:
        InputError: a file that is none of these, or matplotlib is not installed.
    """
    from ntkengine.report import Section
    from ntkengine.report.findings import comparison_table
    from ntkengine.report.selection import selection_section
    from ntkengine.report.training import training_section

    sections: list[Section | None] = [None] * len(paths)
    forecasts: dict[str, Forecast] = {}
    kinds = [Path(path).suffix for path in paths]
    # Last a fine-tuning: it is held against what was forecast.
    for i in sorted(range(len(paths)), key=lambda i: kinds[i] == ".jsonl"):
        if kinds[i] == ".jsonl":
            sections[i] = training_section(Path(paths[i]), forecasts)
        elif kinds[i] == ".json":
            sections[i] = selection_section(Path(paths[i]))
        else:
            sections[i], found = _gram_section(paths[i], ridge)
            if found is not None:
                forecasts[str(paths[i])] = found
    side = [Section("Side by side", [comparison_table(forecasts)])] if len(forecasts) > 1 else []
    return side + [section for section in sections if section is not None]


def _gram_section(path: str | Path, ridge: str | float) -> tuple[Section, Forecast | None]:
    """Return the section of a Gram file, and its forecast if there is one."""
    from ntkengine.report import Section
    from ntkengine.report.findings import forecast_table, module_table, spectrum_table
    from ntkengine.report.plots import forecast_figures, spectrum_figure
    from ntkengine.report.tables import gram_table, sketch_note
    from ntkengine.report.verdict import forecast_verdict, spectrum_verdict
    from ntkengine.spectrum import as_matrix, condition_from_eigenvalues, eigsh, noise_of
    from ntkengine.store import open_gram

    gram = open_gram(path)
    facts, unforecast = gram_table(gram), _unforecast(gram)
    if unforecast is None:
        found = forecast_file(gram, ridge)
        tables = [facts, forecast_table(found)]
        if found.modules and (traces := gram.meta.get("module_trace")):
            tables.append(module_table(found.modules, sum(traces.values())))  # of K, as `info` has it
        figures, verdict = forecast_figures(found), forecast_verdict(found)
        return Section(str(path), tables, figures, found.assumptions, verdict), found
    reason, short = unforecast
    matrix = as_matrix(gram)
    values = np.linalg.eigvalsh(matrix)[::-1]
    condition = condition_from_eigenvalues(values, noise_of(gram))
    figures = {"spectrum": spectrum_figure(values, condition.noise, str(condition))}
    table = spectrum_table(eigsh(gram, k=min(20, len(matrix))), condition, sketch_note(gram))
    return Section(str(path), [facts, table], figures, [reason], spectrum_verdict(condition, short)), None


def _unforecast(gram: Gram) -> tuple[str, str] | None:
    """Return why a Gram has no forecast, as a sentence and in short; None where it has one."""
    from ntkengine.forecast import CrossFit

    if gram.targets is None:
        return "Without class targets there is no forecast.", "No targets"
    if gram.meta.get("head_fitted") and CrossFit.kept_in(gram) is None:
        reason = "Its head was fitted on its examples: without held-out heads there is no forecast."
        return reason, "No held-out heads"
    if gram.contraction == "sum-of-outputs":
        return "The kernel of the sum of outputs cannot forecast each.", "Sum of outputs"
    return None
