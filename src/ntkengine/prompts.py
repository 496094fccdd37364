"""Jobs on language models: texts become prompts, and a class is the word that fills their end or their mask."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ntkengine.errors import InputError
from ntkengine.jobparts import Job

if TYPE_CHECKING:
    from torch import Tensor

    from ntkengine.inputs.examples import Examples
    from ntkengine.inputs.language import LabelWords

TASKS = ("sequence-classification", "causal-lm", "masked-lm")


def speaks(job: Job) -> bool:
    """Return whether a job's model is a language model."""
    return job.model.task in TASKS[1:]


def check_prompts(job: Job) -> None:
    """Refuse tables of a job that do not go together.

    Raises:
        InputError: words without a language model or the other way round, or a template that lacks a part.
    """
    task, template, words, readout = job.model.task, job.data.template, job.gram.words, job.gram.readout
    if task is not None and task not in TASKS:
        raise InputError(f"model.task: expected one of {', '.join(TASKS)}, got {task!r}")
    if template is not None:
        wanted = ["text", *(["pair"] if job.data.text_pair else []), *(["mask"] if task == "masked-lm" else [])]
        if sorted(re.findall(r"\{(\w*)\}", template)) != sorted(wanted):
            parts = " and ".join(f"{{{name}}}" for name in wanted)
            raise InputError(f"data.template: expected a text with {parts}, once each, got {template!r}")
    if not speaks(job):
        if words is not None:
            raise InputError(
                f"gram.words: expected model.task {' or '.join(TASKS[1:])} with them, got {task or TASKS[0]}"
            )
        return
    for name, given in (("model.num_labels", job.model.num_labels), ("head.fit", job.head.fit or None)):
        if given is not None:
            raise InputError(f"{name}: is of a classification head, which a language model has not")
    if words is None:
        if readout != "loss" or task != "causal-lm":
            raise InputError("gram.words: are missing: one for each class, whose logits are f")
        return
    if readout not in ("logits", "margin"):
        raise InputError(f"gram.readout: expected 'logits' or 'margin' of the words, got {readout!r}")
    if readout == "margin" and len(words) != 2:
        raise InputError(f"gram.words: expected two for readout 'margin', got {len(words)}")
    if job.data.truncate:
        raise InputError("data.truncate: would cut the end of a prompt; leave long examples out")
    if template is None and (task == "masked-lm" or job.data.text_pair):
        raise InputError("data.template: is missing; e.g. '{text} It was {mask}.', or '{text} {pair}'")


def check_classes(job: Job, train: Examples) -> None:
    """Refuse words that are not one for each class.

    Raises:
        InputError: with the classes in their order.
    """
    words, names = job.gram.words, train.label_names
    if words is not None and train.labels is not None and len(words) != len(names):
        classes = ", ".join(map(str, names))
        raise InputError(f"gram.words: expected one for each class in order ({classes}), got {len(words)}")


def filled(examples: Examples, template: str | None, tokenizer: Any) -> Examples:
    """Return the examples with each text put into the template.

    Raises:
        InputError: it has a mask, and the tokenizer none.
    """
    if template is None:
        return examples
    mask = getattr(tokenizer, "mask_token", None)
    if "{mask}" in template and mask is None:
        raise InputError("data.template: has a {mask}, but the model's tokenizer has no mask token")

    def put(text: str | tuple[str, str]) -> str:
        first, second = (text, "") if isinstance(text, str) else text
        parts = {"text": first, "pair": second, "mask": mask}
        return re.sub(r"\{(text|pair|mask)\}", lambda found: str(parts[found[1]]), template)

    return replace(examples, texts=[put(text) for text in examples.texts])


def readout_of(job: Job, tokenizer: Any) -> str | LabelWords:
    """Return f: the job's readout by name, or of its words.

    Raises:
        InputError: a word that is not one token.
    """
    from ntkengine.inputs.language import LabelWords

    if job.gram.words is None:
        return job.gram.readout
    if tokenizer is None:
        raise InputError("gram.words: expected a model with a tokenizer")
    position = "last" if job.model.task == "causal-lm" else "mask"
    return LabelWords.of(job.gram.words, tokenizer, position, margin=job.gram.readout == "margin")


def check_ends(job: Job, inputs: Mapping[str, Tensor], tokenizer: Any) -> None:
    """Refuse prompts after which the tokenizer puts a token of its own: no word would follow them.

    Raises:
        InputError: naming the token.
    """
    if job.gram.words is None or job.model.task != "causal-lm":
        return
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    last = ids[range(len(ids)), mask.shape[1] - 1 - mask.flip(1).argmax(1)]
    for token in last.unique().tolist():
        if token in tokenizer.all_special_ids:
            name = tokenizer.convert_ids_to_tokens(token)
            raise InputError(
                f"model: its tokenizer ends prompts with {name}, which no word follows; save it in the model's folder "
                "as one that adds nothing there (add_eos_token=False, or without a post-processor)"
            )


def with_labels(job: Job, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return inputs whose every token is a label where f is a language model's loss, else the same."""
    if not speaks(job) or job.gram.words is not None:
        return inputs
    return inputs | {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}
