"""Jobs on language models: what a job file says is the call in Python, and what does not go together is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import ntkengine as ntk
from ntkengine import cli
from ntkengine.errors import InputError
from ntkengine.finetunejob import run_finetune
from ntkengine.jobfile import make_job, merged
from ntkengine.jobs import run_gram
from ntkengine.selectjob import run_select
from tests.brute import VOCABULARY
from tests.tiny import WORDS, tiny_sentences

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
KINDS = {
    "causal-lm": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, intermediate_size=24, pad_token_id=0)),
    "masked-lm": lambda: tf.BertForMaskedLM(tf.BertConfig(**SMALL, intermediate_size=24)),
}
LORA = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}
ENDS = {"causal-lm": "[CLS] $A", "masked-lm": "[CLS] $A [SEP]"}
TEMPLATES = {"causal-lm": "{text} w7 {pair} w9", "masked-lm": "{text} w7 {mask} w9 {pair}"}


def save(path, task, ends=None):
    torch.manual_seed(0)
    KINDS[task]().save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=ends or ENDS[task], special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(path)  # fmt: skip


def pairs(n, seed):
    return list(zip(tiny_sentences(n, seed), tiny_sentences(n, seed + 10), strict=True))


def job(folder, task, changes=None, classes=("a", "b")):
    """Return a job on a folder's model and data, which are written first."""
    save(folder / "model", task)
    for name, n, seed in (("train.tsv", 9, 0), ("dev.tsv", 4, 1)):
        rows = [f"{a}\t{b}\t{classes[i % len(classes)]}" for i, (a, b) in enumerate(pairs(n, seed))]
        (folder / name).write_text("text\tsecond\tlabel\n" + "\n".join(rows) + "\n", encoding="utf-8")
    tables = {
        "model": {
            "path": str(folder / "model"),
            "task": task,
            "peft": LORA,
        },
        "data": {
            "train": str(folder / "train.tsv"),
            "eval": str(folder / "dev.tsv"),
            "text_pair": "second",
            "template": TEMPLATES[task],
        },
        "gram": {"readout": "margin", "words": ["w1", "w4"]},
        "finetune": {"learning_rate": 1e-2, "epochs": 2, "batch_size": 4},
    }
    return make_job(merged(tables, changes or {}))


def prompts(task, n, seed):
    made = {
        "causal-lm": [f"{a} w7 {b} w9" for a, b in pairs(n, seed)],
        "masked-lm": [f"{a} w7 [MASK] w9 {b}" for a, b in pairs(n, seed)],
    }
    return made[task]


@pytest.mark.parametrize("task", KINDS)
@pytest.mark.parametrize(("readout", "words"), [("margin", ["w1", "w4"]), ("logits", ["w2", "w8", "w3"])])
def test_a_job_is_the_call(tmp_path, task, readout, words):
    classes = ("a", "b", "c")[: len(words)]
    found = run_gram(job(tmp_path, task, {"gram": {"readout": readout, "words": words}}, classes))
    model = ntk.load_model(tmp_path / "model", task=task, peft=LORA)
    inputs, held = (ntk.tokenize(prompts(task, *part), model) for part in ((9, 0), (4, 1)))
    place = "last" if task == "causal-lm" else "mask"
    f = ntk.LabelWords.of(words, model.ntk_tokenizer, place, margin=readout == "margin")
    wanted = ntk.compute_gram(model, inputs, eval_inputs=held, readout=f)
    for name in ("values", "cross", "outputs", "eval_outputs"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), err_msg=name)
    y = np.arange(9) % len(words)
    np.testing.assert_array_equal(found.targets, ntk.encode_targets(y, readout, len(words)))
    assert "fold" not in found.extras  # no head is fitted


@pytest.mark.parametrize("task", KINDS)
def test_training_and_selection_read_the_words_too(tmp_path, task):
    it = job(tmp_path, task)
    run = run_finetune(it, save=tmp_path / "tuned")  # loads what it saved, and compares f
    model = ntk.load_model(tmp_path / "tuned", task=task)
    place = "last" if task == "causal-lm" else "mask"
    f = ntk.LabelWords.of(["w1", "w4"], model.ntk_tokenizer, place, margin=True)
    gram = ntk.compute_gram(model, ntk.tokenize(prompts(task, 9, 0), model), readout=f)
    np.testing.assert_allclose(run.outputs, gram.outputs, rtol=1e-4, atol=1e-6)
    ranking = run_select(make_job(merged({"model": {"path": it.model.path, "task": task}}, tables_of(it))), repeats=1)
    assert {choice.outcome is not None for choice in ranking.choices} == {True}


def tables_of(it):
    return {
        "data": {name: getattr(it.data, name) for name in ("train", "eval", "text_pair", "template")},
        "gram": {"readout": "margin", "words": ["w1", "w4"], "params": "all"},
        "finetune": {"learning_rate": 1e-2, "epochs": 2, "batch_size": 4},
    }


def test_the_loss_of_whole_texts_needs_no_words(tmp_path):
    it = job(tmp_path, "causal-lm")
    tables = {
        "model": {"path": it.model.path, "task": "causal-lm"},
        "data": {"train": it.data.train, "label": ""},
        "gram": {"readout": "loss"},
    }
    found = run_gram(make_job(tables))
    model = ntk.load_model(it.model.path, task="causal-lm")
    inputs = ntk.tokenize([a for a, _ in pairs(9, 0)], model)
    assert not inputs["attention_mask"].all()
    with torch.no_grad():
        for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
            ids = ids[: int(mask.sum())][None]
            loss = model(input_ids=ids, labels=ids).loss
            assert found.outputs[row, 0] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("causal-lm", {"model": {"task": "translation"}}, "model.task: expected one of sequence-class.*, got 'transl"),
        ("causal-lm", {"model": {"task": "sequence-classification"}}, "gram.words: expected model.task causal-lm or"),
        ("causal-lm", {"model": {"num_labels": 2}}, "model.num_labels: is of a classification head"),
        ("causal-lm", {"head": {"fit": True}}, "head.fit: is of a classification head"),
        ("causal-lm", {"gram": {"words": ["w1", "w2", "w3"]}}, "gram.words: expected two for readout 'margin', got 3"),
        (
            "causal-lm",
            {"gram": {"words": ["w1", "w2", "w3"], "readout": "logits"}},
            r"gram.words: expected one for each class in order \(a, b\), got 3",
        ),
        ("causal-lm", {"gram": {"words": ["w1", "w2 w3"]}}, "LabelWords: 'w2 w3': expected one token"),
        (
            "causal-lm",
            {"gram": {"readout": "loss"}},
            "gram.readout: expected 'logits' or 'margin' of the words, got 'l",
        ),
        ("causal-lm", {"data": {"truncate": True}}, "data.truncate: would cut the end of a prompt"),
        (
            "causal-lm",
            {"data": {"template": "{text} w9"}},
            r"data.template: expected a text with \{text\} and \{pair\}",
        ),
        ("causal-lm", {"data": {"template": "{text} {pair} {mask}"}}, "data.template: expected a text with"),
        ("masked-lm", {"data": {"template": "{text} {pair}"}}, r"with \{text\} and \{pair\} and \{mask\}, once each"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, task, changes, message):
    with pytest.raises(InputError, match=message):
        run_gram(job(tmp_path, task, changes))


@pytest.mark.parametrize(
    ("task", "gram", "message"),
    [
        ("causal-lm", {}, "gram.words: are missing: one for each class"),
        ("masked-lm", {"readout": "loss"}, "gram.words: are missing"),
        ("masked-lm", {"words": ["w1", "w2"]}, "data.template: is missing"),
    ],
)
def test_what_is_missing_is_named(tmp_path, task, gram, message):
    it = job(tmp_path, task)
    tables = {"model": {"path": it.model.path, "task": task}, "data": {"train": it.data.train}, "gram": gram}
    with pytest.raises(InputError, match=message):
        run_gram(make_job(tables))


def test_a_tokenizer_that_ends_prompts_is_refused(tmp_path):
    it = job(tmp_path, "causal-lm")
    save(tmp_path / "model", "causal-lm", "[CLS] $A [SEP]")
    with pytest.raises(InputError, match=r"its tokenizer ends prompts with \[SEP\], which no word follows"):
        run_gram(it)


def test_braces_of_a_text_stay(tmp_path):
    it = job(tmp_path, "causal-lm")
    texts = [("{pair} w1", "w2"), ("w3", "{text} {} w4")]
    rows = "".join(f"{a}\t{b}\t{label}\n" for (a, b), label in zip(texts, "ab", strict=True))
    (tmp_path / "train.tsv").write_text("text\tsecond\tlabel\n" + rows, encoding="utf-8")
    model = ntk.load_model(tmp_path / "model", task="causal-lm", peft=it.model.peft)
    f = ntk.LabelWords.of(["w1", "w4"], model.ntk_tokenizer, margin=True)
    wanted = ntk.compute_gram(model, ntk.tokenize([f"{a} w7 {b} w9" for a, b in texts], model), readout=f)
    np.testing.assert_array_equal(run_gram(it).values, wanted.values)


def test_flags_are_the_job_file(tmp_path, capsys):
    it = job(tmp_path, "causal-lm", {"model": {"peft": {"target_modules": ["q_proj"]}}})
    wanted = run_gram(it)
    flags = [
        "gram", "--model", it.model.path, "--task", "causal-lm", "--peft", "lora", "--rank", "2", "--target", "q_proj",
        "--data", it.data.train, "--eval", it.data.eval, "--pair-column", "second", "--template", it.data.template,
        "--readout", "margin", "--words", "w1,w4", "--out", tmp_path / "k.h5",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        cli.main([str(flag) for flag in flags])
    assert stop.value.code == 0, capsys.readouterr().err
    np.testing.assert_array_equal(ntk.open_gram(tmp_path / "k.h5").values, wanted.values)
    for command in ("forecast", "info"):
        with pytest.raises(SystemExit) as stop:
            cli.main([command, str(tmp_path / "k.h5")])
        assert stop.value.code == 0, capsys.readouterr().err
