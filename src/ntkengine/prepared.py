"""A job's model and data, loaded and checked against each other, and its head."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ntkengine.errors import InputError
from ntkengine.jobchecks import check_file
from ntkengine.jobparts import Job
from ntkengine.prompts import TASKS, check_classes, check_ends, filled, readout_of, with_labels

if TYPE_CHECKING:
    from torch import Tensor

    from ntkengine.cluster.comm import Team
    from ntkengine.gram.result import Gram
    from ntkengine.inputs.examples import Examples
    from ntkengine.inputs.heads import HeadFit

Progress = Callable[[float, float, str], None]
Pair = tuple["Examples", "Examples | None"]


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
        check_classes(job, self.train)
        self.num_labels = len(job.gram.words or ()) or job.model.num_labels or max(2, classes)
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
            task=part.task or TASKS[0],
        )
        tokenizer = getattr(self.model, "ntk_tokenizer", None)
        self.readout = readout_of(job, tokenizer)
        cut: dict[str, Any] = {"max_length": job.data.max_length, "truncate": job.data.truncate}
        tell(0.0, 1.0, "tokenizing")

        def ids(examples: Examples) -> dict[str, Tensor]:
            found = tokenize(filled(examples, job.data.template, tokenizer), self.model, **cut)
            check_ends(job, found, tokenizer)
            return with_labels(job, found)

        self.inputs = ids(self.train)
        self.eval_inputs = None if self.eval is None else ids(self.eval)
        select_parameters(self.model, job.gram.params)
        if job.head.fit and not labelled:
            raise InputError("head.fit: expected labels to fit the head on, the examples have none")
        new = bool(getattr(self.model, "ntk_head_new", False))
        self.fits = labelled and (new if job.head.fit is None else job.head.fit)

    def arguments(self) -> dict[str, Any]:
        """Return what `compute_gram` and `plan_gram` share."""
        names = (
            "params",
            "contraction",
            "transform",
            "per_module",
            "precision",
            "backend",
            "seed",
            "sketch",
        )
        found = {"readout": self.readout} | {name: getattr(self.job.gram, name) for name in names}
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
        """Fit the head where the job wants it; one that its file or parts keep is taken again."""
        from ntkengine.inputs.heads import fit_head
        from ntkengine.inputs.keptheads import HEAD, as_kept
        from ntkengine.inputs.readout import encode_targets
        from ntkengine.store import read_extra

        if not self.fits or self.train.labels is None:
            return None
        tell(0.0, 1.0, "fitting the head")
        margin = self.job.gram.readout == "margin"
        # Logits of ±1/2 make a margin of ±1, which is what its targets are.
        goal = encode_targets(self.train.labels, "logits", self.num_labels) * (0.5 if margin else 1.0)
        part = self.job.head
        fit = fit_head(self.model, self.inputs, goal, ridge=part.ridge, folds=part.folds, seed=part.seed)
        kept = None if self.job.out is None else read_extra(self.job.out, HEAD)
        if kept is not None:
            fit = as_kept(fit, kept)
            fit.write(self.model, -1)
        return fit

    def cross_fit(self, fit: HeadFit, whole: Whole | None, team: Team | None = None) -> dict[str, Any]:
        """Return the train Gram and outputs under each fold's head, which did not see that fold.

        With an `out` they are files among its parts until all are done, and stay there until they are copied.

        Args:
            fit: of the head.
            whole: what tells of it.
            team: as `run_gram`; only rank 0 has the arrays.
        """
        from ntkengine.gram.engine import compute_gram
        from ntkengine.gram.heldout import held_out_grams
        from ntkengine.store import parts_of

        out, part = self.job.out, self.job.gram
        call = self.arguments() | {"per_module": False}
        call.pop("eval_inputs", None)

        def under(k: int | None, **changed: Any) -> Gram:
            return compute_gram(
                self.model,
                self.inputs,
                **call | changed,
                check=call["sketch"] is not None,  # the only way to a sketch
                progress=None if whole is None else whole.fold(k),
                out=None if out is None else parts_of(out) / f"held-out{'' if k is None else f'-{k}'}.h5",
                checkpoint_s=part.checkpoint_s,
                comm=team,
            )

        grams, outputs = held_out_grams(self.model, self.inputs, fit, under, call, part.memory_gib, team)
        if team is not None and not team.root:
            return {}
        return {"fold": fit.fold, "fold_grams": grams if out else np.asarray(grams), "fold_outputs": outputs}


class Whole:
    """Tells of a Gram and of those under held-out heads as one piece of work, which never goes back."""

    def __init__(self, tell: Progress, folds: int) -> None:
        self.tell, self.folds, self.before = tell, folds, 0.0

    def first(self, done: float, total: float, stage: str) -> None:
        """Tell of the Gram itself; the others, which are no larger, are counted like it."""
        if total > 1:
            self.before, total = total, total * (1 + self.folds)
        self.tell(done, total, stage)

    def fold(self, k: int | None) -> Progress:
        """Return what tells of fold k, or of all at once."""
        stage = "held-out heads" if k is None else f"held-out head {k + 1} of {self.folds}"

        def tell(done: float, total: float, _: str) -> None:
            if total > 1 and k is None:
                done, total = self.before + done, self.before + total  # less than was thought
            elif total > 1 and k is not None:
                done, total = self.before + k * total + done, self.before + self.folds * total
            self.tell(done, total, stage)

        return tell


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
