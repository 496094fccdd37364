"""What a job is made of: the tables of a job file, with their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ntkengine.recipe import Recipe


@dataclass(frozen=True)
class ModelPart:
    """[model]: arguments of `load_model`.

    Attributes:
        path: folder or hub id.
        num_labels: logits of the head; default as many as the data has classes.
        dtype: of the weights.
        device: "auto", "cpu", "cuda", ….
        seed: of a fresh head and of the adapter's start.
        stream: leave large weights in their files.
        allow_pickle: load pickled weights.
        trust_remote_code: run code that comes with the model.
        task: "sequence-classification" (default), "causal-lm" or "masked-lm".
        peft: PEFT configuration by its field names.
    """

    path: str
    num_labels: int | None = None
    dtype: str = "float32"
    device: str = "auto"
    seed: int = 0
    stream: bool = False
    allow_pickle: bool = False
    trust_remote_code: bool = False
    task: str | None = None
    peft: dict | None = None


@dataclass(frozen=True)
class DataPart:
    """[data]: what is read and how it becomes token ids.

    Attributes:
        train: file of the examples the Gram is of.
        eval: file of further examples: adds the eval × train Gram.
        text: column of the text.
        text_pair: column of a second text.
        label: column of the label; empty for unlabelled data.
        label_names: classes in order; default the sorted values in the training file.
        limit: first rows of `train` only.
        eval_limit: first rows of `eval` only.
        shuffle: seed; rows are shuffled before the limit.
        max_length: tokens an example may have.
        truncate: cut longer examples; otherwise they are refused.
        template: what a text is put into, such as "{text} It was", with {pair} for a second text and, for a masked
            language model, {mask}.
    """

    train: Path
    eval: Path | None = None
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    label_names: list[str] | None = None
    limit: int | None = None
    eval_limit: int | None = None
    shuffle: int | None = None
    max_length: int | None = None
    truncate: bool = False
    template: str | None = None


@dataclass(frozen=True)
class HeadPart:
    """[head]: a ridge fit of the classification head before the Gram.

    Attributes:
        fit: default: when the head is freshly initialised and there are labels.
        ridge: "loo" or a number.
        folds: heads fitted without each example's fold, each with a Gram of its own.
        seed: of the folds.
    """

    fit: bool | None = None
    ridge: str | float = "loo"
    folds: int = 5
    seed: int = 0


@dataclass(frozen=True)
class GramPart:
    """[gram]: arguments of `compute_gram`.

    Attributes:
        words: of a language model, one for each class in order, spaces counted (" terrible", " great"): f is their
            logits at the end of the prompt or at its mask, or with readout "margin" the second's less the first's.
    """

    readout: str = "logits"
    params: str | list[str] = "trainable"
    contraction: str = "trace"
    transform: str = "sgd"
    per_module: bool = False
    precision: str = "high"
    backend: str = "auto"
    memory_gib: float | None = None
    resume: bool = True
    checkpoint_s: float = 300.0
    check: bool = True
    seed: int = 0
    sketch: int | None = None
    words: list[str] | None = None


@dataclass(frozen=True)
class ForecastPart:
    """[forecast].

    Attributes:
        ridge: "loo", "gcv" or a number in the unit of K/C.
    """

    ridge: str | float = "loo"


@dataclass(frozen=True)
class FinetunePart(Recipe):
    """[finetune]: the fields of a `Recipe`, and what is measured.

    Attributes:
        linear: train the exact linearised model along.
        measure_every: steps between measurements; default: after every epoch.
    """

    linear: bool = False
    measure_every: int | None = None

    def recipe(self) -> Recipe:
        """Return the recipe alone."""
        return Recipe(**{name: getattr(self, name) for name in Recipe.__dataclass_fields__})


@dataclass(frozen=True)
class Job:
    """A whole job.

    Attributes:
        model: which model.
        data: which examples.
        head: what is done to its head first.
        gram: which Gram.
        forecast: how it is read.
        finetune: how it is trained for real.
        out: HDF5 file to write; None keeps the Gram in memory.
    """

    model: ModelPart
    data: DataPart
    head: HeadPart = field(default_factory=HeadPart)
    gram: GramPart = field(default_factory=GramPart)
    forecast: ForecastPart = field(default_factory=ForecastPart)
    finetune: FinetunePart | None = None
    out: Path | None = None

    def settings(self) -> dict[str, Any]:
        """Return what bears on the numbers, as plain JSON types: the file keeps it and tells other jobs from it."""
        found = {name: _plain(asdict(getattr(self, name))) for name in ("model", "data", "head", "gram")}
        for name in ("memory_gib", "resume", "checkpoint_s", "backend"):
            del found["gram"][name]
        for part, name in (("model", "task"), ("data", "template"), ("gram", "words")):
            if found[part][name] is None:
                del found[part][name]
        # The same job may be started from another folder.
        if Path(self.model.path).exists():
            found["model"]["path"] = str(Path(self.model.path).resolve())
        for name in ("train", "eval"):
            if found["data"][name] is not None:
                found["data"][name] = str(Path(found["data"][name]).resolve())
        return found


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
