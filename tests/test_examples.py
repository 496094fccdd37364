"""Reading and tokenizing: every source gives the same examples; every refusal says file, line and what was expected."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ntkengine.errors import InputError
from ntkengine.inputs.examples import Examples, read_examples, tokenize
from ntkengine.inputs.models import load_model
from tests.tiny import save_tiny, tiny_sentences

TEXTS = ['w1 "w2', "w3, w4", "w5 w6 w7"]
LABELS = ["bad", "good", "bad"]


def write(path, content):
    path.write_text(content, encoding="utf-8")
    return path


def sources(folder):
    rows = [{"text": t, "label": x} for t, x in zip(TEXTS, LABELS, strict=True)]
    yield write(folder / "a.jsonl", "\n".join(json.dumps(r) for r in rows))
    yield write(folder / "a.json", json.dumps(rows))
    yield write(folder / "a.tsv", "text\tlabel\n" + "".join(f"{r['text']}\t{r['label']}\n" for r in rows))
    yield write(folder / "a.csv", 'text,label\n"w1 ""w2",bad\n"w3, w4",good\nw5 w6 w7,bad\n')
    yield rows
    yield {"text": TEXTS, "label": LABELS}


def test_every_source_gives_the_same(tmp_path):
    for source in sources(tmp_path):
        examples = read_examples(source)
        assert list(examples.texts) == TEXTS
        assert examples.labels.tolist() == [0, 1, 0]
        assert list(examples.label_names) == ["bad", "good"]
    assert read_examples(tmp_path / "a.tsv").ids == ["a.tsv:2", "a.tsv:3", "a.tsv:4"]


def test_options(tmp_path):
    path = write(tmp_path / "a.tsv", "s\ty\tp\n" + "".join(f"t{i}\t{10 - i}\tq{i}\n" for i in range(10)))
    examples = read_examples(path, "s", "y", text_pair="p")
    assert examples.texts[0] == ("t0", "q0")
    assert examples.label_names[:3] == ["1", "2", "3"]  # by value, not as text
    assert len(read_examples(path, "s", "y", limit=4)) == 4
    shuffled = read_examples(path, "s", "y", limit=4, shuffle=0)
    assert shuffled.texts != read_examples(path, "s", "y", limit=4).texts
    assert shuffled.texts == read_examples(path, "s", "y", limit=4, shuffle=0).texts
    assert read_examples(path, "s", None).labels is None
    assert read_examples([{"text": "a", "label": 1.0}, {"text": "b", "label": 0}]).labels.tolist() == [1, 0]
    part = examples[2:4]
    assert isinstance(part, Examples)
    assert part.ids == ["a.tsv:4", "a.tsv:5"]
    bare = write(tmp_path / "b.tsv", "x1\t1\nx2\t0\n")
    assert read_examples(bare, header=["text", "label"]).labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "text\tlabel\na\t1\n \t0\n", "a.tsv:3: column 'text' is empty"),
        ("a.tsv", "text\tlabel\na\t1\nb\t\n", "a.tsv:3: column 'label' has no label"),
        ("a.tsv", "text\tlabel\na\t1\nb\n", "a.tsv:3: expected 2 fields, got 1"),
        ("a.tsv", "sentence\tlabel\na\t1\n", "a.tsv:1: no column 'text'; the columns are sentence, label"),
        ("a.tsv", "\ntexts\tlabel\na\t1\n", "a.tsv:2: no column 'text'; did you mean .texts.. the columns are texts"),
        ("a.jsonl", '{"test": "a", "label": 1}\n', "a.jsonl:1: no column 'text'; did you mean .test.."),
        ("a.tsv", "text\tlabel\na\t1\nb\t1.25\n", "a.tsv:3: column 'label' holds decimal numbers .1.25., expected cl"),
        (
            "a.jsonl",
            '{"text": "a", "label": 0.5}\n{"text": "b", "label": 1}\n',
            "a.jsonl:1: column 'label' holds decimal",
        ),
        ("a.csv", "text;label\na;1\n", "a.csv:1: no column 'text'; columns seem to be divided by ';', expected ','$"),
        ("a.csv", "text;label\na, b;1\n", "a.csv:2: expected 1 fields, got 2; columns seem to be divided by ';', exp"),
        ("a.tsv", "text,label\na,1\n", r"a.tsv:1: no column 'text'; columns seem to be divided by ',', expected '.t'$"),
        ("a.tsv", "text\tlabel\na\t1\nb\t1\n", "one class only"),
        ("a.tsv", "text\tlabel\n", "expected at least one example, found none"),
        ("a.tsv", "", "expected at least one example, found none"),
        ("a.tsv", "text\ttext\na\t1\n", "distinct column names"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": \n', "a.jsonl:2: malformed JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl:1: expected a JSON object"),
        ("a.jsonl", '{"text": 5, "label": 1}\n', "is int, not text"),
        ("a.jsonl", '{"text": "a", "label": null}\n', "has no label"),
        ("a.json", '{"text": "a"}', "expected a list of JSON objects"),
        ("a.csv", 'text,label\n"a,1\n', "malformed row"),
        ("a.txt", "a", "expected one of .jsonl"),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n{"text": "a", "text": "b", "label": 0}\n',
            "2: .*key 'text' is there twice",
        ),
        ("a.json", '[{"text": "a", "label": 1, "more": {"k": 1, "k": 1}}]', "key 'k' is there twice"),
        (
            "a.csv",
            "text,label\na,1\nb,0\nc,1.0\n",
            "a.csv:4: .*'label' holds one number written in two ways, 1 and 1.0;",
        ),
        ("a.tsv", "text\tlabel\na\t01\nb\tx\nc\t1\n", "a.tsv:4: .* one number written in two ways, 01 and 1;"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message):
        read_examples(write(tmp_path / name, content))


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([["text", "label"], ["plain", "1"], ['he said "hi"', "0"]], 3),
        ([["text", "label"], ["plain", "1"], ['"hi"', "0"]], 3),
        ([["text", "label"], ["one\ntwo", "1"], ["plain", "0"]], 2),
        ([["label", "text"], ["0", "one\nx\t"], ["1", 'so "it" is']], 2),
        ([["text"], ["plain"], ["one\n\n\ntwo"], ["plain"]], 3),
    ],
)
def test_a_tsv_quoted_as_a_csv_is_refused(tmp_path, rows, line):
    with (tmp_path / "a.tsv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(rows)
    with pytest.raises(InputError, match=f"^a.tsv:{line}: the quotes of '\"[^']*' are those of a csv, .* csv or jsonl"):
        read_examples(tmp_path / "a.tsv", label="label" if "label" in rows[0] else None)


@pytest.mark.parametrize(
    "texts",
    [
        ['"hi" , he said', '"hi"', '"', '""', "it 's 5\" wide", '"" x ""', '"a" and "b"', '"so', 'there"'],
        ['"I went home .', 'Then I slept . "', 'She said " yes " .'],
        ['"I went home .', "and there was nothing more to it", '" No', 'it was not "'],
        ['"never closed', "plain", "plain"],
        ['x "y"', '"one', 'two"', '"three ""'],
    ],
)
def test_quotes_that_stand_in_a_tsv_s_text_are_read_as_they_stand(tmp_path, texts):
    rows = [f"{text}\t{i % 2}\n" for i, text in enumerate(texts)]
    assert list(read_examples(write(tmp_path / "a.tsv", "text\tlabel\n" + "".join(rows))).texts) == texts
    last = [f"{i % 2}\t{text}\n" for i, text in enumerate(texts)]
    found = read_examples(write(tmp_path / "b.tsv", "".join(last)), header=["label", "text"])
    assert list(found.texts) == texts
    assert found.labels.tolist() == [i % 2 for i in range(len(texts))]


def test_numbers_that_are_equal_only_when_rounded_are_classes():
    rows = [{"text": "a", "label": 2**53}, {"text": "b", "label": 2**53 + 1}]
    assert read_examples(rows).label_names == ["9007199254740992", "9007199254740993"]
    rows = [{"text": "a", "label": "1"}, {"text": "b", "label": "1.0"}]
    assert read_examples(rows, label_names=["1", "1.0"]).labels.tolist() == [0, 1]


def test_decimal_numbers_are_classes_when_named(tmp_path):
    path = write(tmp_path / "a.tsv", "text\tlabel\na\t1.5\nb\t2.25\n")
    examples = read_examples(path, label_names=["1.5", "2.25"])
    assert examples.labels.tolist() == [0, 1]
    rows = [{"text": "a", "label": "1.0"}, {"text": "b", "label": "2.0"}, {"text": "c", "label": "v1.5"}]
    assert read_examples(rows[:2]).label_names == ["1.0", "2.0"]  # whole numbers
    assert len(read_examples(rows).label_names) == 3  # not numbers alone


def test_other_refusals(tmp_path):
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    with pytest.raises(InputError, match="no such file"):
        read_examples(tmp_path / "none.tsv")
    (tmp_path / "bytes.tsv").write_bytes(b"text\tlabel\n\xff\xfe\t1\n")
    with pytest.raises(InputError, match="expected UTF-8 text, found byte 0xff"):
        read_examples(tmp_path / "bytes.tsv")
    with pytest.raises(InputError, match="list row 1: unknown label 'y'.*expected one of x, z"):
        read_examples(rows, label_names=["x", "z"])
    with pytest.raises(InputError, match="limit: expected an integer >= 1, got 0"):
        read_examples(rows, limit=0)
    with pytest.raises(InputError, match="expected equal lengths"):
        read_examples({"text": ["a"], "label": []})
    with pytest.raises(InputError, match="got int"):
        read_examples(5)
    with pytest.raises(InputError, match="label_names: expected distinct names, got x, x"):
        read_examples(rows, label_names=["x", "x"])


@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_class_order_is_the_same_in_every_run(seed):
    code = "from ntkengine.inputs.labels import _class_names as f; print(f(['1', '1.0', '0']), f(['2', 'nan', '10']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": seed},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "['0', '1', '1.0'] ['10', '2', 'nan']"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(save_tiny(tmp_path_factory.mktemp("tiny") / "bert"))


def test_tokenize_pads_on_the_right(model):
    examples = read_examples([{"text": t, "label": i % 2} for i, t in enumerate(tiny_sentences(5))])
    inputs = tokenize(examples, model)
    lengths = inputs["attention_mask"].sum(1)
    assert lengths.tolist() == [len(t.split()) + 2 for t in examples.texts]
    assert inputs["input_ids"].shape == (5, int(lengths.max()))
    assert inputs["labels"].tolist() == [0, 1, 0, 1, 0]
    assert torch.equal(inputs["attention_mask"], (torch.arange(int(lengths.max())) < lengths[:, None]).long())
    pairs = tokenize([("w1 w2", "w3"), ("w4", "w5")], model)
    assert pairs["attention_mask"].sum(1).tolist() == [6, 5]


@pytest.mark.parametrize("pad", [None, "[PAD]"])
def test_a_tokenizer_is_left_as_it_was(model, pad):
    from transformers import PreTrainedTokenizerFast

    mine = PreTrainedTokenizerFast(
        tokenizer_object=model.ntk_tokenizer.backend_tokenizer, pad_token=pad, eos_token="[SEP]", unk_token="[UNK]"
    )
    mine.padding_side = "left"
    mine("w1 w2", truncation=True, max_length=3, padding="max_length" if pad else False)

    def state():
        backend = mine.backend_tokenizer
        return mine.pad_token, mine.padding_side, mine.special_tokens_map, backend.padding, backend.truncation

    before = state()
    inputs = tokenize(["w1 w2 w3", "w4"], tokenizer=mine)
    assert state() == before
    assert inputs["input_ids"][1, -1] == mine.convert_tokens_to_ids(pad or "[SEP]")
    assert inputs["attention_mask"][1, -1] == 0
    with pytest.raises(InputError, match="over the limit of 2"):
        tokenize(["w1 w2 w3 w4 w5"], tokenizer=mine, max_length=2)
    assert state() == before


def test_too_long_is_refused_unless_truncated(model):
    texts = ["w1", " ".join(["w2"] * 100)]
    with pytest.raises(InputError, match=r"example 1: has 102 tokens, over the limit of 64; pass truncate=True"):
        tokenize(texts, model)
    assert tokenize(texts, model, truncate=True)["input_ids"].shape == (2, 64)
    assert tokenize(texts, model, truncate=True, max_length=7)["input_ids"].shape == (2, 7)


def test_roberta_positions_start_late(tmp_path):
    model = load_model(save_tiny(tmp_path / "roberta", "roberta"))
    with pytest.raises(InputError, match="limit of 62"):
        tokenize([" ".join(["w2"] * 61)], model)
    assert np.isfinite(model(**tokenize([" ".join(["w2"] * 60)], model)).logits.detach().numpy()).all()


def test_tokenizer_of_another_model(model):
    small = torch.nn.Embedding(5, 2)

    class Other(torch.nn.Module):
        ntk_tokenizer = model.ntk_tokenizer

        def get_input_embeddings(self):
            return small

    with pytest.raises(InputError, match="beyond the model's 5 embeddings"):
        tokenize(["w1 w50"], Other())
    with pytest.raises(InputError, match="carries no tokenizer"):
        tokenize(["w1"], torch.nn.Linear(1, 1))
    with pytest.raises(InputError, match="got none"):
        tokenize([], model)


def test_tokenize_takes_texts_pairs_and_tables_only(model):
    texts = tiny_sentences(3)
    expected = tokenize(texts, model)["input_ids"]
    assert torch.equal(tokenize({"text": texts}, model)["input_ids"], expected)
    lists, tuples = tokenize([["w1", "w3"]], model), tokenize([("w1", "w3")], model)
    assert torch.equal(lists["input_ids"], tuples["input_ids"])
    for given, message in [
        ("w1 w2", "expected Examples, a list of texts or of pairs, or a table, got 'w1 w2'"),
        (5, "expected Examples, .* got 5"),
        (["w1", None], "example 1: expected a text like the others, got None"),
        (["w1", ("w2", "w3")], r"example 1: expected a text like the others, got \('w2', 'w3'\)"),
        ([("w1", "w2"), "w3"], "example 1: expected a pair of texts like the others, got 'w3'"),
        ([{"txt": "w1"}], "list row 0: no column .text.; did you mean .txt.. the columns are txt"),
        (["w1", {"text": "w1"}], "example 1: expected a text like the others"),
    ]:
        with pytest.raises(InputError, match=message):
            tokenize(given, model)
    bare = type("Bare", (), {"pad_token": None, "eos_token": None})()
    with pytest.raises(InputError, match="this one has neither"):
        tokenize(texts, tokenizer=bare)


@pytest.mark.parametrize(("options", "said"), [
    ({"limit": "1"}, "limit: expected an integer >= 1, got '1'"),
    ({"limit": 1.5}, "limit: expected an integer >= 1, got 1.5"),
    ({"shuffle": -1}, "shuffle: expected an integer >= 0, got -1"),
    ({"shuffle": "a"}, "shuffle: expected an integer >= 0, got 'a'"),
    ({"header": ["text", "text"]}, "header: expected distinct column names, got text, text"),
])  # fmt: skip
def test_options_that_are_none_are_refused(tmp_path, options, said):
    (tmp_path / "x.csv").write_text("text,label\na,0\nb,1\n")
    with pytest.raises(InputError, match=said):
        read_examples(tmp_path / "x.csv", **options)


def test_an_empty_text_in_quotes_is_no_blank_line(tmp_path):
    (tmp_path / "x.csv").write_text('text\nfoo\n\n""\nbar\n')
    with pytest.raises(InputError, match=r"x.csv:4: .*empty"):
        read_examples(tmp_path / "x.csv", label=None)


def test_tokens_are_not_cut():
    with pytest.raises(InputError, match="max_length: expected none with examples that are tokens already"):
        tokenize([{"input_ids": [1, 2, 3]}], max_length=2)
