"""A decoder whose own loss does not shift its labels is told, where the readout's does."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import ntkengine as ntk

_BART = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LLAMA = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def cut_out():
    torch.manual_seed(0)
    return tf.BartForCausalLM(tf.BartConfig(**_BART))


def decoder():
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=40, **_LLAMA))


@pytest.fixture
def inputs():
    ids = torch.randint(3, 40, (3, 6), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(6) < torch.tensor([3, 6, 4])[:, None], ids, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize(
    ("readout", "named"), [("loss", "Sequence"), (ntk.SequenceLoss("sum"), "Sequence"), (ntk.TokenLoss(), "Token")]
)
def test_a_loss_that_shifts_otherwise_is_told(inputs, readout, named, caplog):
    ntk.compute_gram(cut_out(), inputs, readout=readout, params="*fc1.weight")
    assert (
        "the own loss of BartForCausalLM predicts label t from position t, this one label t + 1; "
        f"{named}Loss(shift=False) for labels made for it"
    ) in caplog.text


@pytest.mark.parametrize(
    ("make", "readout"),
    [
        (decoder, "loss"),
        (cut_out, ntk.SequenceLoss(shift=False)),
        (cut_out, ntk.SequenceLoss(shift=True)),
        (cut_out, ntk.LabelWords((3, 4))),
    ],
)
def test_the_same_loss_and_a_choice_bring_no_word(inputs, make, readout, caplog):
    ntk.compute_gram(make(), inputs, readout=readout, params=["*fc1.weight" if make is cut_out else "*up_proj.weight"])
    assert "own loss" not in caplog.text


def test_an_own_loss_that_fails_or_is_another_brings_no_word(inputs, caplog):
    class Failing(tf.BartForCausalLM):
        def forward(self, *args, labels=None, **kwargs):
            if labels is not None:
                raise ValueError("no labels today")
            return super().forward(*args, **kwargs)

    class Smoothed(tf.BartForCausalLM):
        def forward(self, *args, labels=None, **kwargs):
            out = super().forward(*args, labels=labels, **kwargs)
            return out if labels is None else type(out)(loss=out.loss + 0.3, logits=out.logits)

    for kind in (Failing, Smoothed):
        ntk.compute_gram(kind(tf.BartConfig(**_BART)), inputs, readout="loss", params="*fc1.weight")
    assert "own loss" not in caplog.text
