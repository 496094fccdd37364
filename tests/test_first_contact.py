"""What a model does in its first calls, and on examples that are not the first: settled before anything is trusted."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
import transformers as tf

import ntkengine as ntk
from ntkengine.errors import InputError
from tests.brute import contracted, gradients, relative_error, tiny_inputs, tiny_model

_SIZES = {"hidden_size": 16, "vocab_size": 60, "num_labels": 2}


class RwkvClassifier(torch.nn.Module):
    """RWKV divides the weights of deep blocks in its first call in eval mode, and notes that it has."""

    def __init__(self):
        super().__init__()
        self.rwkv = tf.RwkvModel(tf.RwkvConfig(vocab_size=40, hidden_size=8, num_hidden_layers=8, context_length=16))
        self.head = torch.nn.Linear(8, 2)

    def forward(self, input_ids):
        return self.head(self.rwkv(input_ids).last_hidden_state[:, -1])


def test_weights_that_a_first_call_changes_are_changed_once(caplog):
    torch.manual_seed(0)
    model = RwkvClassifier()
    inputs = {"input_ids": torch.randint(0, 40, (5, 6))}
    ready = copy.deepcopy(model).eval()
    with torch.no_grad():
        f = ready(**inputs).numpy()
    truth = np.asarray(ntk.compute_gram(ready, inputs, params="all", readout=lambda out, _: out).values)
    for _ in range(3):
        gram = ntk.compute_gram(model, inputs, params="all", readout=lambda out, _: out)
        assert max(relative_error(gram.outputs, f)) < 1e-5
        assert max(relative_error(gram.values, truth)) < 1e-5
    assert "its forward pass wrote to rwkv.blocks." in caplog.text
    for (name, p), q in zip(model.named_parameters(), ready.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_detached_readout_is_refused_through_blocks_too(kind):
    model = tiny_model(kind)
    inputs = tiny_inputs(model, [3, 5, 4, 6], 6)
    for call in (ntk.compute_gram, ntk.plan_gram):
        with pytest.raises(InputError, match="depend on none of the selected parameters .* is the readout detached"):
            call(model, inputs, params="all", readout=lambda out, _: out.logits.detach())


def test_outputs_that_depend_on_the_batch_are_said(caplog):
    model = tiny_model("bert")
    inputs = tiny_inputs(model, [5, 5, 5, 5, 5], 5)
    with caplog.at_level(logging.WARNING):
        ntk.compute_gram(model, inputs, params="all", readout=lambda out, _: out.logits)
        assert "of its batch" not in caplog.text
        ntk.compute_gram(model, inputs, params="all", readout=lambda out, _: out.logits - out.logits.mean(0) / 2)
    assert "depends on the others of its batch" in caplog.text
    assert "this is the kernel of each example alone" in caplog.text


@pytest.mark.parametrize("seed", range(3))
def test_padding_that_a_strided_convolution_sees_is_not_cut(seed):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = tf.CanineConfig(**sizes, max_position_embeddings=64, num_hash_buckets=64, num_hash_functions=4)
    torch.manual_seed(seed)
    model = tf.CanineForSequenceClassification(config).eval()
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 17, 12)
    ids = torch.tensor(rng.integers(2, 60, (12, 16)))
    mask = (torch.arange(16) < torch.tensor(lengths)[:, None]).long()
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    gram = ntk.compute_gram(model, inputs, params="all", precision="exact")
    names = {n for n, _ in model.named_parameters()}
    G = gradients(model, inputs, names)
    assert max(relative_error(gram.values, contracted(G, G, "trace"))) < 1e-9


def test_examples_that_a_model_cannot_take_are_named():
    model = tiny_model("bert")
    inputs = tiny_inputs(model, [5] * 6, 5)
    inputs["input_ids"][4, 2] = 5000
    targets = np.eye(3)[[0, 1, 2] * 2]
    recipe = {"optimizer": "sgd", "learning_rate": 0.1, "epochs": 1}
    for call in (
        lambda: ntk.compute_gram(model, inputs, params="all"),
        lambda: ntk.fine_tune(model, inputs, targets, recipe),
    ):
        with pytest.raises(InputError, match="cannot be run on example 4: index out of range"):
            call()
    for call in (lambda: ntk.fit_head(model, inputs, targets), lambda: ntk.linearize(model, "all")(inputs)):
        with pytest.raises(InputError, match="cannot be run on .*: index out of range"):
            call()


def test_a_model_without_a_padding_token_is_refused_in_one_line():
    model = tiny_model("llama")
    inputs = tiny_inputs(model, [5, 5, 5], 5)
    model.config.pad_token_id = None
    with pytest.raises(
        InputError, match=r"on two examples at once: .*padding token.* \(set model.config.pad_token_id\)"
    ):
        ntk.compute_gram(model, inputs, params="all")
    with pytest.raises(InputError, match=r"on a batch of 3 .*padding token.* \(set model.config.pad_token_id\)"):
        ntk.fit_head(model, inputs, np.eye(3))
    alone = {k: v[:1] for k, v in inputs.items()}
    assert ntk.compute_gram(model, alone, params="all").shape == (1, 1)


class Strided(torch.nn.Module):
    """A convolution with a stride of eight over the tokens, and the masked mean of what it gives."""

    def __init__(self):
        super().__init__()
        self.table, self.head = torch.nn.Embedding(30, 6), torch.nn.Linear(6, 2)
        self.mixed = torch.nn.Conv1d(6, 6, 8, stride=8, padding=4)

    def forward(self, input_ids, attention_mask):
        x = torch.tanh(self.mixed(self.table(input_ids).transpose(1, 2)))
        return self.head(x.mean(2) * attention_mask.sum(1, keepdim=True) / 8)


@pytest.mark.parametrize("seed", range(3))
def test_padding_that_a_stride_of_eight_sees_is_not_cut(seed):
    torch.manual_seed(seed)
    lengths = np.random.default_rng(seed).choice([16, 24, 32, 40, 44], 40)
    mask = (torch.arange(64) < torch.tensor(lengths)[:, None]).long()
    inputs = {"input_ids": torch.randint(1, 30, (40, 64)) * mask, "attention_mask": mask}
    model = Strided()
    gram = ntk.compute_gram(model, inputs, params="all", readout=lambda out, _: out)
    with torch.no_grad():
        assert max(relative_error(gram.outputs, model(**inputs).numpy())) < 1e-5


def test_an_output_near_zero_does_not_keep_the_padding():
    model = tiny_model("bert", num_labels=2)
    inputs = tiny_inputs(model, [3 + i % 12 for i in range(36)], 48)
    with torch.no_grad():
        f = model(**{k: v[:1] for k, v in inputs.items()}).logits
        model.classifier.bias[1] += f[0, 0] - f[0, 1]  # the first example's margin is nothing but rounding
    plan = ntk.plan_gram(model, inputs, params="all", readout="margin")
    assert plan.microbatches == 1


def test_training_a_model_whose_first_call_changes_its_weights():
    torch.manual_seed(0)
    model = RwkvClassifier()
    inputs = {"input_ids": torch.randint(0, 40, (6, 5))}
    with pytest.raises(
        InputError, match="the first call of RwkvClassifier writes to its weights; call it once in eval"
    ):
        ntk.linearize(copy.deepcopy(model), "all", readout=lambda out, _: out)(inputs)
    recipe = {"optimizer": "sgd", "learning_rate": 1e-3, "epochs": 1}
    run = ntk.fine_tune(model, inputs, np.zeros((6, 2)), recipe, params="all", readout=lambda out, _: out)
    for _ in range(2):
        with torch.no_grad():
            assert max(relative_error(model.eval()(**inputs).numpy(), run.outputs)) < 1e-5


@pytest.mark.parametrize(("name", "value"), [("token_type_ids", 7), ("position_ids", 700)])
def test_other_ids_that_a_model_has_no_row_for(name, value):
    model = tiny_model("bert")
    inputs = tiny_inputs(model, [5] * 4, 5)
    inputs[name] = torch.zeros_like(inputs["input_ids"])
    inputs[name][2, 1] = value
    with pytest.raises(InputError, match="cannot be run on example 2: "):
        ntk.compute_gram(model, inputs, params="all")


class Wrapped(torch.nn.Module):
    """What hands its arguments on by name."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, {}

    def forward(self, **given):
        return self.model(**given)


def test_a_wrapper_gets_its_inputs_by_name():
    model = tiny_model("bert")
    ids = {"input_ids": tiny_inputs(model, [5] * 4, 5)["input_ids"]}
    wrapped = ntk.compute_gram(Wrapped(model), ids, params="all")
    assert max(relative_error(wrapped.values, ntk.compute_gram(model, ids, params="all").values)) < 1e-5
