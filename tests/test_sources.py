"""Examples and token ids in the forms that other libraries have them, real or look-alikes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import ntkengine as ntk
from ntkengine.errors import InputError
from ntkengine.gram.engine import compute_gram
from ntkengine.gram.foresight import plan_gram
from ntkengine.inputs.examples import read_examples, tokenize
from ntkengine.inputs.models import load_model
from ntkengine.inputs.sources import as_inputs
from tests.tiny import tiny_sentences

TEXTS = tiny_sentences(6, seed=3)
LABELS = [0, 1, 0, 1, 1, 0]


class ClassLabel:
    names = ("no", "yes")


class FakeDataset:
    """What is used of a `datasets.Dataset`: names, rows, features, a selection of columns."""

    def __init__(self, columns, features=None):
        self._columns, self.column_names = columns, list(columns)
        self.features = dict.fromkeys(columns) | (features or {})

    def select_columns(self, names):
        return FakeDataset({name: self._columns[name] for name in names}, {n: self.features[n] for n in names})

    def __iter__(self):
        for values in zip(*self._columns.values(), strict=True):
            yield dict(zip(self._columns, values, strict=True))


class FakeFrame:
    """What is used of a pandas frame."""

    def __init__(self, columns, names=None):
        self._columns, self.columns = columns, names or list(columns)

    def to_dict(self, _):
        raise AssertionError  # all columns of it

    def __getitem__(self, name):
        return self._columns[name]


def real_dataset(columns, classes=None):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    found = datasets.Dataset.from_dict(columns)
    return found if classes is None else found.cast_column("label", datasets.ClassLabel(names=list(classes)))


def real_frame(columns):
    return pytest.importorskip("pandas", reason="pandas is not installed").DataFrame(columns)


def fake_dataset(columns, classes=None):
    return FakeDataset(columns, None if classes is None else {"label": ClassLabel})


DATASETS = pytest.mark.parametrize("dataset", [fake_dataset, real_dataset])
FRAMES = pytest.mark.parametrize("frame", [FakeFrame, real_frame])
TABLES = pytest.mark.parametrize("table", [fake_dataset, real_dataset, FakeFrame, real_frame, dict])


@TABLES
def test_tables_give_the_same_examples(table):
    found = read_examples(table({"text": TEXTS, "label": LABELS, "further": [None] * 6}))
    assert list(found.texts) == TEXTS
    assert found.labels.tolist() == LABELS
    assert list(found.label_names) == ["0", "1"]
    assert found.ids[3].endswith("row 3")
    assert len(read_examples(table({"text": TEXTS, "label": LABELS}), limit=2)) == 2


@TABLES
def test_refusals_of_tables(table):
    with pytest.raises(InputError, match="no column 'sentence'; the columns are text, label"):
        read_examples(table({"text": TEXTS, "label": LABELS}), "sentence")
    with pytest.raises(InputError, match="row 1: column 'text' is empty"):
        read_examples(table({"text": ["w1", None, "w2"], "label": [0, 1, 0]}))
    with pytest.raises(InputError, match="row 2: column 'label' has no label"):
        read_examples(table({"text": ["w1", "w3", "w2"], "label": ["a", "b", None]}))
    with pytest.raises(InputError, match="expected at least one example, found none"):
        read_examples(table({"text": [], "label": []}))
    with pytest.raises(InputError, match="row 0: column 'text' is int, not text|is int64, not text"):
        read_examples(table({"text": [5, 6], "label": ["a", "b"]}))


@FRAMES
def test_frames(frame):
    with pytest.raises(InputError, match="frame row 1: column 'text' is empty"):
        read_examples(frame({"text": ["w1", float("nan")], "label": [0, 1]}))
    with pytest.raises(InputError, match="frame row 1: column 'label' has no label"):
        read_examples(frame({"text": ["w1", "w2", "w3"], "label": [0.0, float("nan"), 1.0]}))
    assert read_examples(frame({"text": ["w1", "w2"], "label": [1.0, 0.0]})).label_names == ["0", "1"]
    with pytest.raises(InputError, match="column 'label' is list, expected a class"):
        read_examples(frame({"text": ["w1", "w2"], "label": [[0], [1]]}))


def test_a_frame_with_a_column_twice():
    with pytest.raises(InputError, match="frame: expected distinct column names, 'text' is there twice"):
        read_examples(FakeFrame({"text": TEXTS, "label": LABELS}, ["text", "text", "label"]))


def test_what_pandas_has_for_nothing():
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.DataFrame({"text": pandas.array(["w1", pandas.NA], dtype="string"), "label": [0, 1]})
    with pytest.raises(InputError, match="row 1: column 'text' is empty"):
        read_examples(frame)
    frame = pandas.DataFrame({"text": ["w1", "w2", "w3"], "label": pandas.array([0, None, 1], dtype="Int64")})
    with pytest.raises(InputError, match="row 1: column 'label' has no label"):
        read_examples(frame)
    frame = pandas.DataFrame({"text": ["w1", "w2"], "label": pandas.Categorical(["yes", "no"])})
    assert read_examples(frame.iloc[::-1]).labels.tolist() == [0, 1]
    ordered = pandas.Categorical(["good", "bad", "good"], categories=["bad", "fair", "good"][::-1], ordered=True)
    for source in (pandas.DataFrame({"text": TEXTS[:3], "label": ordered}), {"text": TEXTS[:3], "label": ordered}):
        found = read_examples(source)
        assert (list(found.label_names), found.labels.tolist()) == (["good", "fair", "bad"], [0, 2, 0])
        assert read_examples(source, label_names=["bad", "good"]).labels.tolist() == [1, 0, 1]
        with pytest.raises(InputError, match="one class only"):
            read_examples(source, limit=1)
    numbers = pandas.Categorical([1, 3], categories=[3, 1], ordered=True)
    assert read_examples(pandas.DataFrame({"text": TEXTS[:2], "label": numbers})).labels.tolist() == [1, 0]
    double = pandas.concat([frame, frame["text"]], axis=1)
    with pytest.raises(InputError, match="'text' is there twice"):
        read_examples(double)


@pytest.mark.parametrize(
    ("labels", "warning"),
    [
        (["good", "Good", "bad"], "'Good' and 'good' differ only in case, and are two classes"),
        (["good", " good", "bad"], "' good' and 'good' differ only in blanks around them, and are one class"),
        (["good", "bad", "good"], ""),
    ],
)
def test_labels_that_look_alike_are_told(labels, warning, caplog):
    read_examples({"text": TEXTS[:3], "label": labels})
    assert [warning] * bool(warning) == [r.getMessage().removeprefix("column 'label': labels ") for r in caplog.records]
    caplog.clear()
    read_examples({"text": TEXTS[:3], "label": labels}, label_names=sorted({x.strip() for x in labels}))
    assert not caplog.records


@DATASETS
def test_a_data_set_names_its_classes(dataset):
    found = read_examples(dataset({"text": TEXTS, "label": LABELS}, classes=("no", "yes")))
    assert list(found.label_names) == ["no", "yes"]
    assert found.labels.tolist() == LABELS
    turned = read_examples(dataset({"text": TEXTS, "label": LABELS}, classes=("no", "yes")), label_names=["yes", "no"])
    assert turned.labels.tolist() == [1 - label for label in LABELS]
    with pytest.raises(InputError, match="row 1: column 'label' has no label: -1 is none of the classes no, yes"):
        read_examples(dataset({"text": TEXTS[:2], "label": [0, -1]}, classes=("no", "yes")))
    with pytest.raises(InputError, match="one class only"):
        read_examples(dataset({"text": TEXTS[:2], "label": [1, 1]}, classes=("no", "yes")))


def test_real_data_sets_streamed_formatted_and_split(loaded):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    whole = real_dataset({"text": TEXTS, "label": LABELS})
    assert read_examples(whole.to_iterable_dataset()).labels.tolist() == LABELS
    assert read_examples(whole.with_format("torch")).labels.tolist() == LABELS
    with pytest.raises(InputError, match="expected one split, got DatasetDict of train, test; take one of them"):
        read_examples(datasets.DatasetDict(train=whole, test=whole))
    ids = whole.map(lambda row: loaded.ntk_tokenizer(row["text"]))
    found = as_inputs(ids, loaded)
    assert "text" not in found
    assert torch.equal(found["input_ids"], tokenize(TEXTS, loaded)["input_ids"])
    assert found["labels"].tolist() == LABELS
    assert torch.equal(as_inputs(ids.with_format("torch"), loaded)["input_ids"], found["input_ids"])


def test_lists_of_texts_and_of_mappings():
    assert list(read_examples(TEXTS, label=None).texts) == TEXTS
    assert list(read_examples((t for t in TEXTS), "sentence", None).texts) == TEXTS
    for given, message in [
        (TEXTS, "list row 0: a list of texts has no column 'label'; pass label=None"),
        ([{"text": "w1", "label": 0}, "w2"], "list row 1: expected a mapping of columns like the others, got str"),
        ([{"text": "w1", "label": 0}, 5], "list row 1: expected a mapping of columns like the others, got int"),
        ([5], "list row 0: expected a mapping of columns, got int"),
        ([], "expected at least one example"),
        ({"text": ["w1"], "label": []}, "expected equal lengths"),
    ]:
        with pytest.raises(InputError, match=message):
            read_examples(given)
    with pytest.raises(InputError, match="list row 1: expected a text like the others, got dict"):
        read_examples(["w1", {"text": "w2"}], label=None)


@pytest.fixture(scope="module")
def loaded(model_folder):
    return load_model(model_folder)


@TABLES
def test_tokenize_takes_tables(table, loaded):
    wanted = tokenize(TEXTS, loaded)["input_ids"]
    assert torch.equal(tokenize(table({"text": TEXTS}), loaded)["input_ids"], wanted)
    assert torch.equal(tokenize([{"text": text} for text in TEXTS], loaded)["input_ids"], wanted)


def batches(loaded, size=2):
    """Return tokenised batches, each padded to its own longest, and what they are together."""
    parts = [tokenize(TEXTS[i : i + size], loaded) for i in range(0, len(TEXTS), size)]
    assert len({part["input_ids"].shape[1] for part in parts}) > 1
    return parts, tokenize(TEXTS, loaded)


def test_batches_become_one_mapping(loaded):
    parts, whole = batches(loaded)
    labelled = [part | {"label": torch.tensor(LABELS[2 * i : 2 * i + 2])} for i, part in enumerate(parts)]
    for given in (labelled, tuple(labelled), DataLoader(labelled, batch_size=None, shuffle=False)):
        found = as_inputs(given, loaded)
        assert found["labels"].tolist() == LABELS
        for name, value in whole.items():
            assert torch.equal(found[name], value), name
        assert torch.equal(tokenize(given, loaded)["input_ids"], whole["input_ids"])
    rows = [
        {"input_ids": loaded.ntk_tokenizer(text)["input_ids"], "label": y}
        for text, y in zip(TEXTS, LABELS, strict=True)
    ]
    found = as_inputs(rows, loaded)
    assert found["labels"].tolist() == LABELS
    assert torch.equal(found["attention_mask"], whole["attention_mask"])
    assert as_inputs(whole, loaded) is whole


def test_a_loader_of_examples(loaded):
    whole = tokenize(TEXTS, loaded)
    rows = [{name: value[i] for name, value in whole.items()} for i in range(6)]
    assert torch.equal(as_inputs(DataLoader(rows, batch_size=4), loaded)["input_ids"], whole["input_ids"])
    with pytest.raises(InputError, match="draws examples at random.*shuffle=False"):
        as_inputs(DataLoader(rows, batch_size=4, shuffle=True), loaded)
    with pytest.raises(InputError, match="drops the last 2 examples; drop_last=False"):
        as_inputs(DataLoader(rows, batch_size=4, drop_last=True), loaded)
    assert len(as_inputs(DataLoader(rows, batch_size=3, drop_last=True), loaded)["input_ids"]) == 6
    with pytest.raises(
        InputError, match="batch 0: expected token ids, a mapping with input_ids, got a mapping of text"
    ):
        as_inputs(DataLoader([{"text": text} for text in TEXTS], batch_size=2), loaded)


def test_padding_is_what_each_tensor_needs(loaded, monkeypatch):
    monkeypatch.setattr(loaded.config, "pad_token_id", 7)
    ones = torch.ones((1, 2), dtype=torch.long)
    long = torch.ones((1, 4), dtype=torch.long)
    names = ("input_ids", "attention_mask", "labels")
    found = as_inputs([dict.fromkeys(names, ones), dict.fromkeys(names, long)], loaded)
    assert found["input_ids"].tolist() == [[1, 1, 7, 7], [1] * 4]
    assert found["attention_mask"].tolist() == [[1, 1, 0, 0], [1] * 4]
    assert found["labels"].tolist() == [[1, 1, -100, -100], [1] * 4]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"input_ids": [[1, 2, 3]]}, "batch 1: expected input_ids, attention_mask like batch 0, got input_ids"),
        ({"input_ids": [[1, 2, 3]], "attention_mask": [[0, 1, 1]]}, "batch 1: is padded on the left"),
        ({"input_ids": [[1, 2, 3]], "attention_mask": [1]}, "batch 1: batches of different widths need"),
        ({"input_ids": [[1, 2, 3], [1]], "attention_mask": [[1, 1, 1]]}, "expected numbers of one length in input_ids"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 1], [1, 1]]}, "expected 1 examples in attention_mask"),
        ({"input_ids": [[1, 2]], "attention_mask": None}, "batch 1: attention_mask has no value"),
        ({"input_ids": 3, "attention_mask": 1}, r"expected input_ids of shape \(n, T\), got \(\)"),
        ({"input_ids": [["a"]], "attention_mask": [[1]]}, "expected numbers of one length in input_ids"),
        ("w1", "batch 1: expected token ids, a mapping with input_ids, got str"),
    ],
)
def test_batches_that_do_not_go_together(loaded, second, message):
    with pytest.raises(InputError, match=message):
        as_inputs([{"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}, second], loaded)


def test_token_ids_of_another_model_are_refused(loaded):
    with pytest.raises(InputError, match="beyond the model's"):
        tokenize([{"input_ids": torch.tensor([[1, 99999]])}], loaded)


def test_a_gram_is_the_same_from_every_form(loaded):
    parts, whole = batches(loaded)
    options = {"params": "*.layer.0.*query*", "readout": "margin"}
    wanted = np.asarray(compute_gram(loaded, whole, **options))
    forms = {
        "texts": TEXTS,
        "examples": read_examples(TEXTS, label=None),
        "columns": {"text": TEXTS},
        "data set": FakeDataset({"text": TEXTS}),
        "frame": FakeFrame({"text": TEXTS}),
        "batches": parts,
        "loader": DataLoader(parts, batch_size=None),
    }
    for name, form in forms.items():
        np.testing.assert_array_equal(np.asarray(compute_gram(loaded, form, **options)), wanted, err_msg=name)
    np.testing.assert_allclose(ntk.Landmarks(loaded, TEXTS, **options)([1, 4]), wanted[:, [1, 4]], rtol=1e-5)
    gram = compute_gram(loaded, parts, eval_inputs=TEXTS[:2], **options)
    assert gram.cross.shape == (2, 6)
    assert plan_gram(loaded, TEXTS, **options).samples == 6
    for given in (None, 5, torch.ones(2, 2), {}):
        with pytest.raises(InputError, match="inputs: expected a mapping of tensors"):
            compute_gram(loaded, given, **options)


def test_what_a_tokenizer_returns_is_taken_as_it_is(loaded):
    whole = tokenize(TEXTS, loaded)
    ragged = loaded.ntk_tokenizer(TEXTS)
    assert len({len(ids) for ids in ragged["input_ids"]}) > 1
    given = {
        "ragged lists": ragged,
        "lists": {name: value.tolist() for name, value in whole.items()},
        "arrays": {name: value.numpy() for name, value in whole.items()},
        "some": {name: value.tolist() if name == "input_ids" else value for name, value in whole.items()},
    }
    for form, source in given.items():
        found = as_inputs(source, loaded)
        for name, value in whole.items():
            assert torch.equal(found[name], value), (form, name)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": None}, r"^inputs\['input_ids'\]: expected a tensor, or numbers of one shape, got NoneType$"),
        ({"pixel_values": ["a"]}, r"inputs\['pixel_values'\]: expected a tensor, or numbers of one shape, got list"),
        ({"input_ids": [[1], [1, 2]], "attention_mask": [[1]]}, r"inputs\['input_ids'\]: expected a tensor"),
        ({"input_ids": [[1], [1, 2]], "attention_mask": torch.ones(2, 2)}, r"inputs\['input_ids'\]: expected a tensor"),
        ({"input_ids": [["a"], ["b"]]}, "batch 0: expected numbers of one length in input_ids"),
    ],
)
def test_columns_that_are_no_tensors_are_named(loaded, given, message):
    with pytest.raises(InputError, match=message):
        as_inputs(given, loaded)


def test_a_plain_module_takes_a_tensor():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    X = torch.randn(4, 3)
    wanted = np.asarray(compute_gram(model, {"x": X}))
    for given in (X, X.numpy(), X.double().numpy()):
        np.testing.assert_array_equal(np.asarray(compute_gram(model, given)), wanted)
    run = ntk.fine_tune(model, X, np.ones((4, 2)), learning_rate=1e-3, epochs=1)
    assert run.outputs.shape == (4, 2)
    for given, got in ((torch.tensor(1.0), "Tensor"), (np.array(["a"]), "expected a tensor, or numbers")):
        with pytest.raises(InputError, match=got):
            compute_gram(model, given)


def test_heads_and_training_take_every_form_too(model_folder):
    targets = np.array([[-1.0, 1.0] if label else [1.0, -1.0] for label in LABELS])

    def trained(form):
        model = load_model(model_folder)
        head = ntk.fit_head(model, form, targets)
        run = ntk.fine_tune(model, form, targets, learning_rate=1e-2, epochs=1, eval_inputs=form, eval_targets=targets)
        return np.concatenate([head.held_out, run.outputs, run.eval_outputs])

    parts, whole = batches(load_model(model_folder))
    wanted = trained(whole)
    for name, form in {"texts": TEXTS, "data set": FakeDataset({"text": TEXTS}), "batches": parts}.items():
        np.testing.assert_array_equal(trained(form), wanted, err_msg=name)


def test_a_path_is_no_model(tmp_path):
    inputs = {"input_ids": torch.ones(2, 3, dtype=torch.long)}
    for call in (
        lambda m: ntk.compute_gram(m, inputs),
        lambda m: ntk.compute_gram(m, ["w1 w2"]),
        lambda m: ntk.plan_gram(m, inputs),
        lambda m: ntk.tangent_factors(m, inputs),
        lambda m: ntk.fine_tune(m, inputs, [[1.0], [-1.0]], learning_rate=1e-3),
        lambda m: ntk.fit_head(m, inputs, np.eye(2)),
        lambda m: ntk.linearize(m),
        lambda m: ntk.tokenize(["w1 w2"], m),
    ):
        with pytest.raises(
            InputError, match=r"^model: expected a torch.nn.Module, as load_model\(path\) returns, got "
        ):
            call("MODEL_DIR")
    with pytest.raises(InputError, match="got str 'MODEL_DIR'$"):
        ntk.compute_gram("MODEL_DIR", inputs)
    with pytest.raises(InputError, match="got dict$"):
        ntk.compute_gram(inputs, None)
