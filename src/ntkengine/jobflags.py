"""The flags of every command that takes a job: one set, which override a job file's keys."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from ntkengine.choices import completing, word_or_number
from ntkengine.errors import InputError
from ntkengine.textfile import parse_json, reason_of

_MODEL, _DATA, _HEAD, _GRAM, TRAINING = "Model", "Data", "Head", "Gram", "Training"


def flag(panel: str, help_text: str, *names: str) -> Any:
    """Return an option of a command, in a panel of its help."""
    return _option(panel, help_text, *names)


def choice(panel: str, help_text: str, name: str) -> Any:
    """Return an option whose value a shell completes from `CHOICES`."""
    return _option(panel, help_text, name, autocompletion=completing(name))


def _option(panel: str, help_text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=panel, show_default=False, **more)


# The recipe of commands that train or forecast training; None where not given.
LearningRate = Annotated[float | None, flag(TRAINING, "Of the first step.")]
Epochs = Annotated[int | None, flag(TRAINING, "Passes over the examples (default: 1).")]
BatchSize = Annotated[int | None, flag(TRAINING, "Examples a step; 0: all (default: 32).")]
Optimizer = Annotated[str | None, choice(TRAINING, "adam or sgd (default: adam).", "--optimizer")]
Loss = Annotated[str | None, choice(TRAINING, "squared or cross-entropy (default: squared).", "--loss")]


def collect(
    job: Annotated[Path | None, typer.Argument(metavar="[JOB.TOML]", help="Job file; flags override it.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="HDF5 file to write.", show_default=False)] = None,
    model: Annotated[str | None, flag(_MODEL, "Model folder or hub id.")] = None,
    num_labels: Annotated[int | None, flag(_MODEL, "Logits of the head (default: as many as classes).")] = None,
    dtype: Annotated[str | None, choice(_MODEL, "Dtype of the weights (default: float32).", "--dtype")] = None,
    device: Annotated[str | None, choice(_MODEL, "auto, cpu, cuda (default: auto).", "--device")] = None,
    peft: Annotated[
        str | None, choice(_MODEL, "Adapter type, e.g. lora, or the JSON file of `select --emit`.", "--peft")
    ] = None,
    target: Annotated[str | None, flag(_MODEL, "Modules it adapts, e.g. query,value.")] = None,
    rank: Annotated[int | None, flag(_MODEL, "Its rank.")] = None,
    alpha: Annotated[int | None, flag(_MODEL, "Its scale, lora_alpha.")] = None,
    stream: Annotated[bool | None, flag(_MODEL, "Leave large weights in their files.", "--stream")] = None,
    allow_pickle: Annotated[bool | None, flag(_MODEL, "Load pickled weights.", "--allow-pickle")] = None,
    trust_remote_code: Annotated[bool | None, flag(_MODEL, "Run the model's code.", "--trust-remote-code")] = None,
    task: Annotated[
        str | None, choice(_MODEL, "sequence-classification (default), causal-lm or masked-lm.", "--task")
    ] = None,
    data: Annotated[Path | None, flag(_DATA, "Training examples: tsv, csv, jsonl, json, parquet.")] = None,
    evaluate: Annotated[Path | None, flag(_DATA, "Held-out examples: adds their cross Gram.", "--eval")] = None,
    text_column: Annotated[str | None, flag(_DATA, "Column of the text (default: text).")] = None,
    pair_column: Annotated[str | None, flag(_DATA, "Column of a second text.")] = None,
    label_column: Annotated[str | None, flag(_DATA, "Column of the label (default: label); '' for none.")] = None,
    label_names: Annotated[str | None, flag(_DATA, "Classes in order, e.g. negative,positive.")] = None,
    limit: Annotated[int | None, flag(_DATA, "First training rows only.")] = None,
    eval_limit: Annotated[int | None, flag(_DATA, "First eval rows only.")] = None,
    shuffle: Annotated[int | None, flag(_DATA, "Seed; shuffle rows before the limit.")] = None,
    max_length: Annotated[int | None, flag(_DATA, "Tokens an example may have (default: the model's limit).")] = None,
    truncate: Annotated[bool | None, flag(_DATA, "Cut longer examples.", "--truncate/--no-truncate")] = None,
    template: Annotated[str | None, flag(_DATA, "What texts are put into, e.g. '{text} It was'.")] = None,
    fit_head: Annotated[
        bool | None, flag(_HEAD, "Fit the head by ridge first (default: if it is fresh).", "--fit-head/--no-fit-head")
    ] = None,
    head_ridge: Annotated[str | None, choice(_HEAD, "loo or a number (default: loo).", "--head-ridge")] = None,
    readout: Annotated[str | None, choice(_GRAM, "logits, margin, loss (default: logits).", "--readout")] = None,
    words: Annotated[
        str | None, flag(_GRAM, "A language model's word for each class, spaces counted: ' terrible, great'.")
    ] = None,
    params: Annotated[
        str | None, choice(_GRAM, "trainable, all, globs a,b,!c (default: trainable).", "--params")
    ] = None,
    contraction: Annotated[
        str | None, choice(_GRAM, "trace, full, per-output, sum-of-outputs (default: trace).", "--contraction")
    ] = None,
    transform: Annotated[str | None, choice(_GRAM, "sgd, sign, asymmetric-sign (default: sgd).", "--transform")] = None,
    per_module: Annotated[bool | None, flag(_GRAM, "Keep each module's Gram.", "--per-module/--no-per-module")] = None,
    precision: Annotated[str | None, choice(_GRAM, "high, exact, fast (default: high).", "--precision")] = None,
    backend: Annotated[str | None, choice(_GRAM, "auto, triton, torch (default: auto).", "--backend")] = None,
    sketch: Annotated[int | None, flag(_GRAM, "Approximate: random features kept of each parameter.")] = None,
    memory_gib: Annotated[float | None, flag(_GRAM, "Bound on memory above the model.")] = None,
    check: Annotated[bool | None, flag(_GRAM, "Compare with autograd (default: yes).", "--check/--no-check")] = None,
    resume: Annotated[
        bool | None, flag(_GRAM, "Accept what there is of this job already (default: yes).", "--resume/--no-resume")
    ] = None,
    checkpoint_s: Annotated[float | None, flag(_GRAM, "Seconds between checkpoints (default: 300).")] = None,
    seed: Annotated[
        int | None, flag(_GRAM, "Of a fresh head, the adapter's start, folds and checks (default: 0).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output and nothing else.")] = False,
) -> tuple[Path | None, dict[str, Any], bool]:
    """Return the job file, what the flags lay over it (nested like the file, None where not given), and `--json`."""
    adapter = _adapter(peft) | {
        name: value
        for name, value in (("target_modules", _names(target)), ("r", rank), ("lora_alpha", alpha))
        if value is not None
    }
    flags: dict[str, Any] = {
        "out": out,
        "model": {
            "path": model,
            "num_labels": num_labels,
            "dtype": dtype,
            "device": device,
            "stream": stream,
            "allow_pickle": allow_pickle,
            "trust_remote_code": trust_remote_code,
            "seed": seed,
            "task": task,
            "peft": adapter,
        },
        "data": {
            "train": data,
            "eval": evaluate,
            "text": text_column,
            "text_pair": pair_column,
            "label": label_column,
            "label_names": _names(label_names),
            "limit": limit,
            "eval_limit": eval_limit,
            "shuffle": shuffle,
            "max_length": max_length,
            "truncate": truncate,
            "template": template,
        },
        "head": {"fit": fit_head, "ridge": word_or_number("--head-ridge", head_ridge), "seed": seed},
        "gram": {
            "readout": readout,
            "words": None if words is None else words.split(","),
            "params": params if params is None or "," not in params else _names(params),
            "contraction": contraction,
            "transform": transform,
            "per_module": per_module,
            "precision": precision,
            "backend": backend,
            "sketch": sketch,
            "memory_gib": memory_gib,
            "check": check,
            "resume": resume,
            "checkpoint_s": checkpoint_s,
            "seed": seed,
        },
    }
    return job, flags, as_json


def bandwidth(given: str) -> float:
    """Return the bytes a second of a text like 50GB/s or 400Gbit/s.

    Raises:
        InputError: another text.
    """
    found = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?)(B|bit|b)(/s|ps)\s*", given)
    if found is None or found[1].count(".") > 1 or not found[1].strip("."):
        raise InputError(f"--network: expected a rate such as 50GB/s or 400Gbit/s, got {given!r}")
    scale = 1000.0 ** " KMGT".index(found[2] or " ")
    return float(found[1]) * scale / (1 if found[3] == "B" else 8)


def _adapter(given: str | None) -> dict[str, Any]:
    """Return an adapter's fields: its type alone, or all that a JSON file holds."""
    if given is None:
        return {}
    if not given.endswith(".json"):
        return {"peft_type": given.upper()}
    try:
        text = Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"--peft: {given}: {reason_of(error)}") from None
    found = parse_json(text, f"--peft: {given}", dict, "an adapter's fields by name")
    return {"peft_type": "LORA", **found}


def _names(given: str | None) -> list[str] | None:
    return None if given is None else [name.strip() for name in given.split(",") if name.strip()]
