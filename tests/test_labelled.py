"""Labels are the readout's alone: a model that makes its outputs of them is refused, and one that only may is kept."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import ntkengine as ntk
from ntkengine.errors import InputError
from tests.brute import contracted, gradients, relative_error, tiny_inputs, tiny_model

_SIZES = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip


def score(outputs, inputs):
    """Return the mean log-probability of the labels, (N, 1)."""
    found = outputs.logits.log_softmax(-1).gather(-1, inputs["labels"][..., None])[..., 0]
    return found.mean(1, keepdim=True)


@pytest.mark.parametrize("name", ["Bart", "MBart", "Mvp"])
def test_decoder_inputs_that_a_model_makes_of_labels_are_to_be_given(name):
    torch.manual_seed(0)
    model = getattr(tf, f"{name}ForConditionalGeneration")(getattr(tf, f"{name}Config")(**_SIZES)).eval()
    ids, labels = torch.randint(3, 40, (5, 7)), torch.randint(3, 40, (5, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    for readout in (score, "loss"):
        with pytest.raises(InputError, match=r"of labels too .* decoder_input_ids=model.prepare_decoder_input_ids_fro"):
            ntk.compute_gram(model, inputs, params="*.fc1.weight", readout=readout)
    inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    gram = ntk.compute_gram(model, inputs, params="*.fc1.weight", readout=score)
    with torch.no_grad():
        assert max(relative_error(gram.outputs, score(model(**inputs), inputs).numpy())) < 1e-5  # it sees labels here
    names = [n for n, _ in model.named_parameters() if n.endswith("fc1.weight")]
    J = gradients(model, inputs, names, score)
    assert max(relative_error(gram.values, contracted(J, J, "trace"))) < 1e-5


def test_a_module_of_ones_own_that_reads_labels_is_refused():
    class Reads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 2)

        def forward(self, x, labels=None):
            return self.linear(x) * (1.0 if labels is None else labels[:, None])

    torch.manual_seed(0)
    inputs = {"x": torch.randn(6, 3), "labels": torch.rand(6)}
    with pytest.raises(InputError, match="^inputs: Reads makes its outputs of labels too"):
        ntk.compute_gram(Reads(), inputs, readout=lambda out, _: out)


def test_what_a_model_notes_when_it_sees_labels_is_taken_away():
    model = tiny_model("bert")
    assert model.config.problem_type is None
    inputs = tiny_inputs(model, [5, 7, 4], 7)
    inputs["labels"] = torch.tensor([0, 2, 1])
    ntk.compute_gram(model, inputs, params="all", readout="loss")
    assert model.config.problem_type is None


@pytest.mark.parametrize("labels", [torch.tensor([[0.2, 0.8]] * 3), torch.tensor([5, 6, 7]), torch.rand(3, 4, 5)])
def test_labels_that_only_the_readout_understands_are_its_own(labels):
    model = tiny_model("bert")
    inputs = tiny_inputs(model, [5, 7, 4], 7)
    K = ntk.compute_gram(model, inputs, params="all").values
    again = ntk.compute_gram(model, inputs | {"labels": labels}, params="all").values
    assert max(relative_error(again, K)) < 1e-6


@pytest.mark.parametrize("how", ["first", "first of many", "imports"])
def test_a_loss_that_comes_first_is_not_taken_for_an_output(how):
    model = tiny_model("bert", num_labels=1)
    inputs = tiny_inputs(model, [5, 7, 4], 7)
    K = ntk.compute_gram(model, inputs, params="all").values
    if how == "imports":
        forward = model.forward

        def failing(*given, labels=None, **more):
            if labels is not None:
                raise ModuleNotFoundError("scipy")
            return forward(*given, **more)

        model.forward = failing
    told = inputs | {"labels": torch.rand(3)}
    again = ntk.compute_gram(model, told, params="all", readout=lambda out, _: out[0].reshape(-1, 1)).values
    assert max(relative_error(again, K)) < 1e-6


@pytest.mark.parametrize("row", [0, 2, 4])
def test_labels_are_tried_on_more_than_one_example(row):
    torch.manual_seed(0)
    model = tf.BartForConditionalGeneration(tf.BartConfig(**_SIZES)).eval()
    ids, labels = torch.randint(3, 40, (5, 7)), torch.randint(3, 40, (5, 7))
    labels[row] = ids[row]  # of one example the decoder reads the same either way
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    with pytest.raises(InputError, match="of labels too"):
        ntk.compute_gram(model, inputs, params="*.fc1.weight", readout=score)
