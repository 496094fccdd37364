"""DataLoaders that keep the order of their examples, and those that do not; columns of tokenised data sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler

from ntkengine.errors import InputError
from ntkengine.gram.engine import compute_gram
from ntkengine.inputs.examples import tokenize
from ntkengine.inputs.tokenised import collated

IDS = torch.arange(5, 77).reshape(12, 6)
ROWS = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in IDS]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(ROWS)


class Reversed(Sampler):
    def __iter__(self):
        return iter(range(len(ROWS) - 1, -1, -1))

    def __len__(self):
        return len(ROWS)


class Skipping(SequentialSampler):
    def __iter__(self):
        return iter(range(0, len(ROWS), 2))


class ByLength(BatchSampler):
    pass


class Loop(DataLoader):
    def __iter__(self):
        return iter(list(super().__iter__())[::-1])


def in_order(size, *, drop_last=False):
    return BatchSampler(SequentialSampler(ROWS), size, drop_last)


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(ROWS, batch_size=5),
        DataLoader(ROWS, batch_size=4, drop_last=True),
        DataLoader(ROWS, batch_sampler=in_order(5)),
        DataLoader(ROWS, batch_sampler=in_order(6, drop_last=True)),
        DataLoader(ROWS, batch_size=None),
        DataLoader(Stream(), batch_size=5),
        DataLoader(Stream(), batch_size=1, drop_last=True),
    ],
)
def test_loaders_in_order_give_their_examples(loader):
    assert torch.equal(collated(loader)["input_ids"], IDS)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (DataLoader(ROWS, batch_sampler=BatchSampler(RandomSampler(ROWS), 4, False)), "at random.*shuffle=False"),
        (DataLoader(ROWS, batch_sampler=in_order(5, drop_last=True)), "drops the last 2 examples; drop_last=False"),
        (DataLoader(ROWS, batch_sampler=BatchSampler(range(12), 5, True)), "got one with range;"),
        (DataLoader(ROWS, batch_sampler=ByLength(SequentialSampler(ROWS), 4, False)), "got one with ByLength;"),
        (DataLoader(ROWS, batch_sampler=[[1, 0], [2, 3]]), r"got one with list; .* pass list\(loader\)"),
        (DataLoader(ROWS, sampler=Reversed(), batch_size=4), "got one with Reversed;"),
        (DataLoader(ROWS, sampler=Reversed(), batch_size=None), "got one with Reversed;"),
        (DataLoader(ROWS, sampler=Skipping(ROWS), batch_size=4), "got one with Skipping;"),
        (DataLoader(ROWS, sampler=SequentialSampler(ROWS[:8]), batch_size=4), "draws 8 of the 12 examples it has"),
        (DataLoader(Stream(), batch_size=5, drop_last=True), "drops the last examples of an iterator"),
        (Loop(ROWS, batch_size=4), "in order .*, got Loop;"),
        (DataLoader(ROWS, batch_size=4, num_workers=2, in_order=False), "as its workers finish them; in_order=True"),
    ],
)
def test_other_loaders_are_refused(loader, message):
    with pytest.raises(InputError, match=f"^inputs: .*{message}"):
        collated(loader)
    if loader.num_workers == 0:  # what is asked for by hand is taken as it is
        assert len(collated(list(loader))["input_ids"]) <= len(IDS)


def test_what_a_trainer_draws_from(model_folder, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

    model = AutoModelForSequenceClassification.from_pretrained(model_folder)

    def trainer(**options):
        settings = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], dataloader_pin_memory=False, **options)
        return Trainer(model=model, args=settings, train_dataset=ROWS, eval_dataset=ROWS)

    with pytest.raises(InputError, match="at random"):
        collated(trainer(per_device_train_batch_size=4).get_train_dataloader())
    assert torch.equal(collated(trainer(per_device_eval_batch_size=5).get_eval_dataloader())["input_ids"], IDS)
    loader = trainer(per_device_eval_batch_size=5).get_eval_dataloader(Stream())
    assert torch.equal(collated(loader)["input_ids"], IDS)
    loader.skip_batches = 1
    with pytest.raises(InputError, match="skips its first 1 batches"):
        collated(loader)


class Columns:
    """What is used of a tokenised `datasets.Dataset`."""

    def __init__(self, **columns):
        self._columns, self.column_names = columns, list(columns)

    def __iter__(self):
        for values in zip(*self._columns.values(), strict=True):
            yield dict(zip(self._columns, values, strict=True))


class Boxed(torch.nn.Module):
    """Its `forward` names what it takes."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(80, 4)
        self.linear = torch.nn.Linear(4, 2)
        self.config = type("Config", (), {"pad_token_id": 0})()

    def forward(self, input_ids, attention_mask, bbox):
        boxes = bbox.to(self.linear.weight.dtype).mean(-1, keepdim=True) / 100
        return self.linear((self.embedding(input_ids) * boxes * attention_mask[..., None]).mean(1))


class Open(Boxed):
    def forward(self, input_ids, attention_mask, **more):
        return super().forward(input_ids, attention_mask, more["bbox"])


class Opener(Boxed):
    def forward(self, **inputs):
        return super().forward(**inputs)


def boxed_data(**more):
    boxes = torch.arange(12 * 6 * 4).reshape(12, 6, 4)
    columns = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "bbox": boxes}
    return columns, Columns(**{name: value.tolist() for name, value in columns.items()}, **more)


@pytest.mark.parametrize("kind", [Boxed, Opener])
def test_a_data_set_gives_the_gram_of_its_columns_as_a_mapping(kind):
    torch.manual_seed(0)
    model = kind()
    columns, data = boxed_data(idx=list(range(12)), text=["w"] * 12, label=[0, 1] * 6)
    found, wanted = compute_gram(model, data), compute_gram(model, columns)
    np.testing.assert_array_equal(found.values, wanted.values)
    assert not np.array_equal(found.values, compute_gram(model, columns | {"bbox": columns["bbox"] + 50}).values)
    # Without a model, columns of numbers stay; what forward does not take is left out.
    assert tokenize(data).keys() == {*columns, "labels"}
    assert collated(boxed_data(score=[0.5] * 12)[1], Boxed()).keys() == columns.keys()


def test_a_column_that_may_be_an_input_is_refused():
    data = boxed_data()[1]
    with pytest.raises(InputError, match=r"^dataset: whether column 'bbox' is an input is unknown: .*remove_columns"):
        compute_gram(Open(), data)
    pytest.importorskip("peft", reason="peft is not installed")
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(Boxed(), LoraConfig(target_modules=["linear"]))  # whose own forward takes anything
    assert collated(data, adapted).keys() == {"input_ids", "attention_mask", "bbox"}
