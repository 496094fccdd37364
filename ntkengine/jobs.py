"""A job from its description to a Gram, and from a Gram file to what is read off it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ntkengine.errors import InputError
from ntkengine.jobchecks import check_early, check_file
from ntkengine.jobfile import Job

if TYPE_CHECKING:
    from ntkengine.cluster.comm import Team
    from ntkengine.forecast import CrossFit, Forecast
    from ntkengine.gram.plan import Plan
    from ntkengine.gram.result import Gram
    from ntkengine.inputs.examples import Examples
    from ntkengine.inputs.heads import HeadFit
    from ntkengine.recipe import Recipe
    from ntkengine.report import Section

Progress = Callable[[float, float, str], None]
Pair = tuple["Examples", "Examples | None"]


def run_gram(
    job: Job, progress: Progress | None = None, *, examples: Pair | None = None, team: Team | None = None
) -> Gram:
    """Run a job: model, data, token ids, head, Gram, file.

    Whatever can be refused is refused before the first long computation, and a failed job leaves no file.

    Args:
        job: the job.
        progress: called with (flops done, flops in all, stage); loading has a total of 1.
        examples: (train, eval or None) to use instead of the job's files, which then only name them.
        team: the processes that share the job; each makes this call, and loads the model on its own GPU.

    Returns:
        The Gram, backed by its file when the job has an `out`; its `meta` also has this run's `prepare_seconds` and
        `wall_seconds`.

    Raises:
        InputError, CheckFailed, NonFinite: as `compute_gram`, `load_model`, `read_examples`.
    """
    from ntkengine.cluster.comm import together
    from ntkengine.gram.engine import compute_gram

    tell, began = progress or quiet, time.perf_counter()
    with together(team):
        check_early(job)
        prepared = Prepared(job, tell, examples, team)
        call = prepared.arguments()
        fit = prepared.fit_head(tell) if team is None or team.root else None
    if team is not None:
        fit = team.broadcast(fit)
        if fit is not None and not team.root:
            fit.write(prepared.model, -1)
    head = job.settings()["head"] | {"fitted": fit is not None}
    part, whole = job.gram, None if progress is None else _Whole(progress, prepared.folds)
    prepared_s = time.perf_counter() - began
    gram = compute_gram(
        prepared.model,
        prepared.inputs,
        **call,
        memory_gib=part.memory_gib,
        resume=part.resume,
        checkpoint_s=part.checkpoint_s,
        check=part.check,
        out=job.out,
        progress=None if whole is None else whole.first,
        targets=prepared.targets(prepared.train),
        eval_targets=prepared.targets(prepared.eval),
        example_ids=prepared.train.ids,
        eval_ids=None if prepared.eval is None else prepared.eval.ids,
        job=job.settings() | {"head": head, "classes": list(prepared.train.label_names)},
        extras=None if fit is None or not prepared.folds else lambda: prepared.cross_fit(fit, whole, team),
        comm=team,
    )
    gram.meta |= {"prepare_seconds": prepared_s, "wall_seconds": time.perf_counter() - began}
    return gram


def run_plan(job: Job, progress: Progress | None = None, **ranks: Any) -> Plan:
    """Return the plan of a job without running it; cost: loading, and about ten passes of three samples.

    Args:
        job: the job.
        progress: as `run_gram`.
        ranks: `ranks`, `gpus_per_node` and `network` of `plan_gram`.
    """
    from ntkengine.gram.engine import plan_gram
    from ntkengine.gram.scaling import check_ranks

    job = replace(job, out=None)
    check_early(job)
    check_ranks(ranks.get("ranks", 1), ranks.get("gpus_per_node"), ranks.get("network"))
    prepared = Prepared(job, progress or quiet, None)
    call = prepared.arguments()
    plan = plan_gram(prepared.model, prepared.inputs, **call, memory_gib=job.gram.memory_gib, **ranks)
    return replace(plan, held_out_grams=prepared.folds)


class Prepared:
    """A job's model and data, loaded and checked against each other."""

    def __init__(self, job: Job, tell: Progress, examples: Pair | None, team: Team | None = None) -> None:
        from ntkengine.inputs.examples import tokenize
        from ntkengine.inputs.models import load_model
        from ntkengine.inputs.parameters import select_parameters

        self.job = job
        tell(0.0, 1.0, "reading examples")
        self.train, self.eval = _read(job) if examples is None else examples
        labelled = self.train.labels is not None
        classes = len(self.train.label_names) if labelled else 0
        self.num_labels = job.model.num_labels or max(2, classes)
        if classes > self.num_labels:
            raise InputError(
                f"model.num_labels: expected at least {classes}, one for each class of {job.data.train}, "
                f"got {self.num_labels}"
            )
        self.targets(self.train)
        check_file(job)  # once the job is known to be one
        tell(0.0, 1.0, "loading the model")
        part = job.model
        self.model = load_model(
            part.path,
            num_labels=self.num_labels,
            peft=part.peft,
            dtype=part.dtype,
            device=str(team.device) if team is not None and part.device in ("auto", "cuda") else part.device,
            trust_remote_code=part.trust_remote_code,
            allow_pickle=part.allow_pickle,
            seed=part.seed,
            stream=part.stream,
        )
        cut: dict[str, Any] = {"max_length": job.data.max_length, "truncate": job.data.truncate}
        tell(0.0, 1.0, "tokenizing")
        self.inputs = tokenize(self.train, self.model, **cut)
        self.eval_inputs = None if self.eval is None else tokenize(self.eval, self.model, **cut)
        select_parameters(self.model, job.gram.params)
        if job.head.fit and not labelled:
            raise InputError("head.fit: expected labels to fit the head on, the examples have none")
        new = bool(getattr(self.model, "ntk_head_new", False))
        self.fits = labelled and (new if job.head.fit is None else job.head.fit)

    def arguments(self) -> dict[str, Any]:
        """Return what `compute_gram` and `plan_gram` share."""
        names = (
            "readout",
            "params",
            "contraction",
            "transform",
            "per_module",
            "precision",
            "backend",
            "seed",
            "sketch",
        )
        found = {name: getattr(self.job.gram, name) for name in names}
        return found | ({} if self.eval_inputs is None else {"eval_inputs": self.eval_inputs})

    def targets(self, examples: Examples | None) -> np.ndarray | None:
        """Return ±1 targets, (N, C) float64, or None without labels or with a readout that has no class targets."""
        from ntkengine.inputs.readout import encode_targets

        if examples is None or examples.labels is None or self.job.gram.readout not in ("logits", "margin"):
            return None
        return encode_targets(examples.labels, self.job.gram.readout, self.num_labels)

    @property
    def folds(self) -> int:
        """How many more Grams the job computes, of the train examples under held-out heads: none without targets."""
        scored = self.fits and self.targets(self.train) is not None
        return min(self.job.head.folds, len(self.train)) if scored else 0

    def fit_head(self, tell: Progress) -> HeadFit | None:
        """Fit the head where the job wants it."""
        from ntkengine.inputs.heads import fit_head
        from ntkengine.inputs.readout import encode_targets

        if not self.fits or self.train.labels is None:
            return None
        tell(0.0, 1.0, "fitting the head")
        margin = self.job.gram.readout == "margin"
        # Logits of ±1/2 make a margin of ±1, which is what its targets are.
        goal = encode_targets(self.train.labels, "logits", self.num_labels) * (0.5 if margin else 1.0)
        part = self.job.head
        return fit_head(self.model, self.inputs, goal, ridge=part.ridge, folds=part.folds, seed=part.seed)

    def cross_fit(self, fit: HeadFit, whole: _Whole | None, team: Team | None = None) -> dict[str, Any]:
        """Return the train Gram and outputs under each fold's head, which did not see that fold; cost a Gram a fold.

        With an `out` each of them is a file among its parts until all are done, and stays there until it is copied.

        Args:
            fit: of the head.
            whole: what tells of it.
            team: as `run_gram`; only rank 0 has the arrays.
        """
        from ntkengine.gram.engine import compute_gram
        from ntkengine.gram.result import Stacked
        from ntkengine.store import parts_of

        out, part = self.job.out, self.job.gram
        call = self.arguments() | {"per_module": False}
        call.pop("eval_inputs", None)
        grams, outputs = [], []
        folds = len(fit.weights) - 1
        try:
            for k in range(folds):
                fit.write(self.model, k)
                checked = call["sketch"] is not None  # the only way to a sketch
                found = compute_gram(
                    self.model,
                    self.inputs,
                    **call,
                    check=checked,
                    progress=None if whole is None else whole.fold(k),
                    out=None if out is None else parts_of(out) / f"held-out-{k}.h5",
                    checkpoint_s=part.checkpoint_s,
                    comm=team,
                )
                if team is None or team.root:
                    grams.append(found.values)
                    outputs.append(found.outputs)
        finally:
            fit.write(self.model, -1)
        if not grams:
            return {}
        stack = np.stack(grams) if out is None else Stacked(grams)
        return {"fold": fit.fold, "fold_grams": stack, "fold_outputs": np.stack(outputs)}


class _Whole:
    """Tells of a Gram and of those under held-out heads as one piece of work, which never goes back."""

    def __init__(self, tell: Progress, folds: int) -> None:
        self.tell, self.folds, self.before = tell, folds, 0.0

    def first(self, done: float, total: float, stage: str) -> None:
        """Tell of the Gram itself; the others, which are no larger, are counted like it."""
        if total > 1:
            self.before, total = total, total * (1 + self.folds)
        self.tell(done, total, stage)

    def fold(self, k: int) -> Progress:
        """Return what tells of fold k."""
        stage = f"held-out head {k + 1} of {self.folds}"

        def tell(done: float, total: float, _: str) -> None:
            if total > 1:
                done, total = self.before + k * total + done, self.before + self.folds * total
            self.tell(done, total, stage)

        return tell


def forecast_file(
    path_or_gram: str | Path | Gram, ridge: str | float = "loo", recipe: Recipe | None = None
) -> Forecast:
    """Return the forecast of what a Gram file holds: targets, outputs, held-out outputs, eval.

    Args:
        path_or_gram: a file, or a Gram with targets.
        ridge: "loo", "gcv", or a number in the unit of K.
        recipe: of the training to simulate.

    Raises:
        InputError: no targets in it, a head fitted on them without held-out heads, or as `forecast`.
    """
    from ntkengine.forecast import forecast
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
    settings = gram.meta.get("settings") or {}
    return forecast(
        gram,
        gram.targets,
        cross_fit=_cross_fit(gram),
        eval_targets=gram.eval_targets,
        head_fitted_on_targets=bool((settings.get("head") or {}).get("fitted", False)),
        ridge=ridge,
        recipe=recipe,
    )


def _cross_fit(gram: Gram) -> CrossFit | None:
    from ntkengine.forecast import CrossFit

    names = ("fold", "fold_grams", "fold_outputs")
    return CrossFit(*(gram.extras[name] for name in names)) if all(name in gram.extras for name in names) else None


def report_files(paths: Sequence[str | Path], ridge: str | float = "loo") -> list[Section]:
    """Return the sections of a report over Gram files, rankings (.json) and fine-tunings (.jsonl).

    Several Grams with targets are also set side by side.

    Raises:
        InputError: a file that is none of these, or matplotlib is not installed.
    """
    from ntkengine.report import Section
    from ntkengine.report.plots import forecast_figures, spectrum_figure
    from ntkengine.report.selection import selection_section
    from ntkengine.report.tables import (
        comparison_table,
        forecast_table,
        gram_table,
        module_table,
        sketch_note,
        spectrum_table,
    )
    from ntkengine.report.training import training_section
    from ntkengine.spectrum import as_matrix, condition_from_eigenvalues, eigsh, noise_of
    from ntkengine.store import open_gram

    sections, forecasts = [], {}
    others = {".json": selection_section, ".jsonl": training_section}
    for path in paths:
        if (section := others.get(Path(path).suffix)) is not None:
            sections.append(section(Path(path)))
            continue
        gram = open_gram(path)
        facts = gram_table(gram)
        if gram.targets is not None and gram.contraction != "sum-of-outputs":
            found = forecasts[str(path)] = forecast_file(gram, ridge)
            tables = [facts, forecast_table(found)]
            if found.modules and gram.meta.get("module_trace"):
                tables.append(module_table(found.modules, float(sum(gram.meta["module_trace"].values()))))
            sections.append(Section(str(path), tables, forecast_figures(found), found.assumptions))
            continue
        matrix = as_matrix(gram)
        values = np.linalg.eigvalsh(matrix)[::-1]
        condition = condition_from_eigenvalues(values, noise_of(gram))
        figures = {"spectrum": spectrum_figure(values, condition.noise, str(condition))}
        table = spectrum_table(eigsh(gram, k=min(20, len(matrix))), condition, sketch_note(gram))
        sections.append(Section(str(path), [facts, table], figures, ["Without class targets there is no forecast."]))
    if len(forecasts) > 1:
        sections.insert(0, Section("Side by side", [comparison_table(forecasts)]))
    return sections


def _read(job: Job) -> Pair:
    from ntkengine.inputs.examples import read_examples

    part = job.data
    columns: dict[str, Any] = {"text": part.text, "label": part.label or None, "text_pair": part.text_pair}
    train = read_examples(part.train, **columns, limit=part.limit, label_names=part.label_names, shuffle=part.shuffle)
    if part.eval is None:
        return train, None
    names = None if train.labels is None else train.label_names
    return train, read_examples(part.eval, **columns, limit=part.eval_limit, label_names=names, shuffle=part.shuffle)


def quiet(_done: float, _total: float, _stage: str) -> None:
    """Tell nobody."""
