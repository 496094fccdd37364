"""The tasks: which text is trained on, which is looked at before training, which only after.

A forecast may see `train` and `validation`. `test` and `shifted` are what fine-tuning is measured on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ntkengine import assets, read_examples
from ntkengine.inputs.examples import Examples

TRAIN, VALIDATION = 384, 436
_COLA = ("source", "label", "mark", "sentence")
TASKS = ("sst2", "cola", "amazon")


@dataclass(frozen=True)
class Task:
    """One task with one training subset.

    Attributes:
        name: of the task.
        train: TRAIN examples, drawn by the seed.
        validation: VALIDATION examples the forecast may see, the same for every seed.
        test: what fine-tuning is measured on, likewise.
        shifted: text of another kind, measured on too; or None.
    """

    name: str
    train: Examples
    validation: Examples
    test: Examples
    shifted: Examples | None


def load(name: str, data: Path, seed: int) -> Task:
    """Return a task with the training subset of a seed.

    "sst2": phrases of the train file; the dev sentences, halved, validate and test. "cola": in-domain sentences;
    validation from the train file, test the in-domain dev set, shifted the out-of-domain one. "amazon": rated snippets
    of product reviews, all from one set.
    """
    shifted = None
    if name == "sst2":
        pool = read_examples(data / "sst2/train.tsv", text="sentence")
        dev = _shuffled(read_examples(data / "sst2/dev.tsv", text="sentence"))
        validation, test = dev[:VALIDATION], dev[VALIDATION:]
    elif name == "cola":
        pool = _shuffled(_cola(data / "cola/in_domain_train.tsv"))
        validation, pool = pool[:VALIDATION], pool[VALIDATION:]
        test, shifted = _cola(data / "cola/in_domain_dev.tsv"), _cola(data / "cola/out_of_domain_dev.tsv")
    elif name == "amazon":
        rows = assets.rated(assets.fetch_demo().snippets, "amazonReviewSnippets")
        pool = _shuffled(read_examples([{"text": t, "label": int(r > 0)} for r, t in rows if r], text="text"))
        validation, test, pool = pool[:VALIDATION], pool[VALIDATION : 2 * VALIDATION], pool[2 * VALIDATION :]
    else:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {name!r}")
    held = {str(t) for part in (validation, test, shifted) if part is not None for t in part.texts}
    texts: dict[str, int] = {}
    for i, text in enumerate(pool.texts):
        if str(text) not in held:
            texts.setdefault(str(text), i)
    rows = np.array(list(texts.values()))
    chosen = np.random.default_rng([seed, 1]).choice(rows, size=TRAIN, replace=False)
    return Task(name, pool[chosen], validation, test, shifted)


def _cola(path: Path) -> Examples:
    return read_examples(path, text="sentence", label="label", header=_COLA)


def _shuffled(examples: Examples) -> Examples:
    return examples[np.random.default_rng(0).permutation(len(examples))]
