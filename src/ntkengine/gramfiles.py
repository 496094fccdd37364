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
    from ntkengine.forecast import CrossFit
    from ntkengine.report import Section
    from ntkengine.report.findings import comparison_table, forecast_table, module_table, spectrum_table
    from ntkengine.report.plots import forecast_figures, spectrum_figure
    from ntkengine.report.selection import selection_section
    from ntkengine.report.tables import gram_table, sketch_note
    from ntkengine.report.training import training_section
    from ntkengine.report.verdict import forecast_verdict, spectrum_verdict
    from ntkengine.spectrum import as_matrix, condition_from_eigenvalues, eigsh, noise_of
    from ntkengine.store import open_gram

    sections: list[Section | None] = [None] * len(paths)
    forecasts: dict[str, Forecast] = {}
    runs = [Path(path).suffix == ".jsonl" for path in paths]
    for i in sorted(range(len(paths)), key=runs.__getitem__):  # a fine-tuning is held against what was forecast
        path = paths[i]
        if runs[i]:
            sections[i] = training_section(Path(path), forecasts)
            continue
        if Path(path).suffix == ".json":
            sections[i] = selection_section(Path(path))
            continue
        gram = open_gram(path)
        facts = gram_table(gram)
        reason, short = "Without class targets there is no forecast.", "No targets"
        if gram.targets is not None and gram.meta.get("head_fitted") and CrossFit.kept_in(gram) is None:
            reason = "Its head was fitted on its examples: without held-out heads there is no forecast."
            short = "No held-out heads"
        elif gram.targets is not None and gram.contraction == "sum-of-outputs":
            reason, short = "The kernel of the sum of outputs cannot forecast each.", "Sum of outputs"
        elif gram.targets is not None:
            found = forecasts[str(path)] = forecast_file(gram, ridge)
            tables = [facts, forecast_table(found)]
            if found.modules and (traces := gram.meta.get("module_trace")):
                tables.append(module_table(found.modules, sum(traces.values())))  # of K, as `info` has it
            figures = forecast_figures(found)
            sections[i] = Section(str(path), tables, figures, found.assumptions, forecast_verdict(found))
            continue
        matrix = as_matrix(gram)
        values = np.linalg.eigvalsh(matrix)[::-1]
        condition = condition_from_eigenvalues(values, noise_of(gram))
        figures = {"spectrum": spectrum_figure(values, condition.noise, str(condition))}
        table = spectrum_table(eigsh(gram, k=min(20, len(matrix))), condition, sketch_note(gram))
        verdict = spectrum_verdict(condition, short)
        sections[i] = Section(str(path), [facts, table], figures, [reason], verdict)
    side = [Section("Side by side", [comparison_table(forecasts)])] if len(forecasts) > 1 else []
    return side + [section for section in sections if section is not None]
