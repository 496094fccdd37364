"""Tiny pretrained-looking models on disk: random weights, a word-level tokenizer, everything a loader expects.

And the file of a small Gram.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ntkengine.gram.engine import compute_gram
from tests.brute import VOCABULARY, tiny_inputs, tiny_model

WORDS = [f"w{i}" for i in range(VOCABULARY - 5)]


def save_tiny(path: Path, kind: str = "bert", num_labels: int = 2, *, head: bool = True) -> Path:
    """Save a tiny classifier (or, without its head, the bare encoder) and its tokenizer; return the directory."""
    model = tiny_model(kind, num_labels)
    chosen = model if head else getattr(model, model.base_model_prefix)
    chosen.save_pretrained(path)
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(path)
    return path


def edit_config(path: Path, **changes: object) -> None:
    """Change fields of a saved config."""
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def tiny_sentences(n: int, seed: int = 0) -> list[str]:
    """Return n sentences of 2 to 9 known words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=rng.integers(2, 10))) for _ in range(n)]


def compute_small(path: Path) -> None:
    """Compute a Gram with modules, eval examples, targets and a job into a file, or go on from what is there."""
    model = tiny_model("bert", num_labels=2)
    y = np.array([[-1.0], [1.0]])[[0, 1, 0, 1, 1, 0, 1]]
    compute_gram(
        model,
        tiny_inputs(model, [5, 3, 4, 6, 2, 7, 3], 7),
        eval_inputs=tiny_inputs(model, [4, 5, 3], 5, seed=1),
        readout="margin",
        params="*.layer.*",
        targets=y,
        eval_targets=y[:3],
        per_module=True,
        out=path,
        job={"data": {"train": "train.tsv"}},
    )
