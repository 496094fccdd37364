"""Arguments of a kind that a public function does not take, each refused in one line that names it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ntkengine as ntk
from ntkengine.errors import InputError
from tests.tiny import save_tiny

Y = np.eye(2)[np.arange(6) % 2]
X = {"x": torch.linspace(-1, 1, 24).reshape(6, 4)}
ROWS = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]


class Other:
    """Nothing that any argument may be."""


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return ntk.load_model(save_tiny(tmp_path_factory.mktemp("tiny") / "bert")).ntk_tokenizer


CALLS = {
    "path, of open_gram": ntk.open_gram,
    "path, of verify_gram": ntk.verify_gram,
    "num_labels": lambda given: ntk.load_model(".", num_labels=given),
    "dtype": lambda given: ntk.load_model(".", dtype=given),
    "device": lambda given: ntk.load_model(".", device=given),
    "readout": lambda given: ntk.compute_gram(model(), X, readout=given),
    "out": lambda given: ntk.compute_gram(model(), X, out=given),
    "targets, of compute_gram": lambda given: ntk.compute_gram(model(), X, targets=given),
    "progress": lambda given: ntk.compute_gram(model(), X, progress=given),
    "text": lambda given: ntk.read_examples(ROWS, given),
    "label": lambda given: ntk.read_examples(ROWS, label=given),
    "label_names": lambda given: ntk.read_examples(ROWS, label_names=given),
    "header": lambda given: ntk.read_examples(ROWS, header=given),
    "tokenizer": lambda given: ntk.tokenize(["w1"], tokenizer=given),
    "targets": lambda given: ntk.fit_head(model(), X, given),
    "folds": lambda given: ntk.fit_head(model(), X, Y, folds=given),
    "inputs, of fit_head": lambda given: ntk.fit_head(model(), given, Y),
    "inputs": lambda given: ntk.linearize(model())(given),
    "num_classes": lambda given: ntk.encode_targets([0, 1], "logits", given),
    "LabelWords.tokens": ntk.LabelWords,
    "LabelWords.of": lambda given: ntk.LabelWords.of(given, None),
    "Preconditioner": ntk.Preconditioner,
    "optimizer state": lambda given: ntk.Preconditioner.from_optimizer(given, model()),
}
MAY_BE_NONE = {"device", "out", "targets, of compute_gram", "progress", "label", "label_names", "header"}
MAY_BE_CALLED = {"readout", "progress"}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("given", [None, 5.5, Other(), Other], ids=["none", "a number", "an object", "a class"])
def test_another_kind_is_refused(name, given):
    if name not in (MAY_BE_NONE if given is None else MAY_BE_CALLED if given is Other else ()):
        said = "tokenize" if given is None and name == "tokenizer" else name.partition(",")[0]
        with pytest.raises(InputError, match=f"^{said}.*: .*") as refused:
            CALLS[name](given)
        assert "\n" not in str(refused.value)


def test_lists_and_paths_of_every_make_are_taken(tokenizer, tmp_path):
    assert ntk.LabelWords(np.array([3, 5])).tokens == ntk.LabelWords(torch.tensor([3, 5])).tokens == (3, 5)
    found = ntk.read_examples(ROWS, label_names=np.array(["1", "0"]))
    assert found.labels.tolist() == [0, 1]
    assert ntk.tokenize(["w1"], tokenizer=tokenizer, max_length=np.int64(5))["input_ids"].shape == (1, 3)
    with pytest.raises(InputError, match="^max_length: expected an integer >= 1, got 2.5"):
        ntk.tokenize(["w1"], tokenizer=tokenizer, max_length=2.5)
    gram = ntk.compute_gram(model(), X, out=tmp_path / "k.h5")
    np.testing.assert_array_equal(ntk.open_gram(str(tmp_path / "k.h5")).values[:], gram.values[:])
    assert ntk.verify_gram(tmp_path / "k.h5") == []
