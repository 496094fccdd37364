"""Readouts of language models against brute force: label words, sequence and token losses."""

from __future__ import annotations

import functools

import numpy as np
import peft
import pytest
import torch
import transformers as tf

import ntkengine as ntk
from ntkengine.errors import InputError
from ntkengine.gram.engine import compute_gram
from ntkengine.inputs.fingerprint import fingerprint_function
from tests import zoo
from tests.brute import VOCABULARY, contracted, gradients, relative_error, tiny_inputs

_SIZES = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MASK = 3


def causal(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":
        return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **_SIZES)).eval()
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**config, tie_word_embeddings=True, **_SIZES)).eval()


def prompts(model, side: str):
    """Ragged prompts; padded on the left they bring their positions along."""
    inputs = tiny_inputs(model, zoo.LENGTHS, 12)
    if side == "left":
        width = inputs["input_ids"].shape[1]
        for i, n in enumerate(zoo.LENGTHS):
            inputs = {k: v.index_copy(0, torch.tensor([i]), v[i].roll(width - n)[None]) for k, v in inputs.items()}
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return inputs


def assert_brute_force(model, inputs, readout, expected_f, *, params="all"):
    names = {n for n, p in model.named_parameters() if params == "all" or p.requires_grad}
    G = gradients(model, inputs, names, expected_f)
    for precision, tolerance in (("exact", 1e-9), ("high", 1e-5)):
        gram = compute_gram(model, inputs, params=params, readout=readout, precision=precision, contraction="full")
        assert max(relative_error(gram.values, contracted(G, G, "full"))) < tolerance
    return gram


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_label_words_after_ragged_prompts(kind):
    model = causal(kind)
    right, left = prompts(model, "right"), prompts(model, "left")
    words = ntk.LabelWords((7, 50))

    def truth(out, one):
        return out.logits[:, one["attention_mask"][0].nonzero()[-1, 0]][:, [7, 50]]

    grams = [assert_brute_force(model, inputs, words, truth) for inputs in (right, left)]
    assert relative_error(grams[1].values, grams[0].values)[0] < 1e-5  # padding's side changes nothing
    assert relative_error(grams[1].outputs, grams[0].outputs)[0] < 1e-5
    alone = [model(right["input_ids"][i : i + 1, :n]).logits[0, -1, [7, 50]] for i, n in enumerate(zoo.LENGTHS)]
    assert np.allclose(grams[0].outputs, torch.stack(alone).detach().numpy(), atol=1e-5)
    margin = compute_gram(model, right, params="all", readout=ntk.LabelWords((7, 50), margin=True))
    assert np.allclose(margin.outputs[:, 0], grams[0].outputs[:, 1] - grams[0].outputs[:, 0], atol=1e-5)


def test_label_words_at_the_mask():
    model = zoo.model("bert-mlm")
    inputs = zoo.inputs("bert-mlm", model, zoo.LENGTHS)
    where = [n // 2 for n in zoo.LENGTHS]
    inputs["input_ids"][inputs["input_ids"] == MASK] = 4
    inputs["input_ids"][torch.arange(7), where] = MASK

    def truth(out, one):
        return out.logits[:, (one["input_ids"][0] == MASK).nonzero()[0, 0]][:, [5, 9, 20]]

    assert_brute_force(model, inputs, ntk.LabelWords((5, 9, 20), "mask", MASK), truth)
    inputs["input_ids"][2, :1] = MASK
    with pytest.raises(InputError, match="expected one mask token in every example, one has 2"):
        compute_gram(model, inputs, readout=ntk.LabelWords((5, 9), "mask", MASK))


def test_label_words_at_the_first_decoded_token():
    model = zoo.model("t5-lm")
    inputs = zoo.inputs("t5-lm", model, zoo.LENGTHS)
    assert_brute_force(model, inputs, ntk.LabelWords((5, 9), 0), zoo.first_decoded)
    with pytest.raises(InputError, match="position='last' needs a model whose logits follow input_ids"):
        compute_gram(model, inputs, readout=ntk.LabelWords((5, 9)))


def test_labels_alone_do_not_run_an_encoder_decoder():
    model = zoo.model("t5-lm")
    inputs = zoo.inputs("t5-lm", model, zoo.LENGTHS)
    inputs["labels"] = inputs.pop("decoder_input_ids")
    with pytest.raises(
        InputError, match=r"cannot be run .* \(labels only reach the readout: give decoder_input_ids too\)$"
    ):
        compute_gram(model, inputs, readout="loss")


def test_label_words_after_virtual_tokens():
    model = peft.get_peft_model(causal("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    inputs = prompts(model, "right")

    def truth(out, one):
        return out.logits[:, 3 + int(one["attention_mask"].sum()) - 1][:, [7, 50]]

    assert_brute_force(model.eval(), inputs, ntk.LabelWords((7, 50)), truth, params="trainable")


def token_losses(out, labels, *, shift):
    logits, labels = (out.logits[0, :-1], labels[0, 1:]) if shift else (out.logits[0], labels[0])
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)


TUNINGS = {
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def own_losses(model, inputs, names):
    """Return the loss that the model itself gives for each example's labels, in float32, and its gradients (N, P)."""
    wanted = [p for n, p in model.named_parameters() if n in names]
    losses = [model(**{k: v[i : i + 1] for k, v in inputs.items()}).loss for i in range(len(inputs["labels"]))]
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, wanted)]) for loss in losses]
    return torch.stack(losses).detach().numpy(), torch.stack(rows).numpy()


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("first", ["scored", "not scored"])
def test_the_loss_after_virtual_tokens_is_the_one_that_is_trained(tuning, first):
    torch.manual_seed(1)
    model = peft.get_peft_model(causal("gpt2"), TUNINGS[tuning]()).double().eval()
    inputs = prompts(model, "right")
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    if first == "not scored":
        inputs["labels"][:, 0] = -100
    losses, G = own_losses(model, inputs, {n for n, p in model.named_parameters() if p.requires_grad})
    gram = compute_gram(model, inputs, readout="loss", precision="exact")
    np.testing.assert_allclose(gram.outputs[:, 0], losses, rtol=1e-6)
    assert relative_error(gram.values, G @ G.T)[0] < 1e-5
    each = compute_gram(model, inputs, readout=ntk.TokenLoss(), precision="exact").outputs
    scored = (inputs["labels"] if tuning != "prefix" else inputs["labels"][:, 1:]) != -100
    assert each.shape == scored.shape
    np.testing.assert_allclose(each.sum(1) / scored.sum(1).numpy(), losses, rtol=1e-6)


def test_the_loss_after_an_image_is_the_models_own():
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tf.GitConfig(
        vision_config=vision | {"image_size": 8, "patch_size": 4}, hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=24, max_position_embeddings=32, **_SIZES,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.GitForCausalLM(config).double().eval()
    ids = torch.randint(3, VOCABULARY, (3, 5))
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images, "labels": ids}
    losses, G = own_losses(model, inputs, {"output.weight", "output.bias"})
    gram = compute_gram(model, inputs, params="output.*", readout="loss", precision="exact")
    np.testing.assert_allclose(gram.outputs[:, 0], losses, rtol=1e-6)
    assert relative_error(gram.values, G @ G.T)[0] < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "bert-mlm", "t5-lm"])
def test_losses_of_tokens_and_sequences(name):
    model = causal("gpt2") if name == "gpt2" else zoo.model(name)
    inputs = tiny_inputs(model, zoo.LENGTHS, 12)
    shift = name == "gpt2"
    if name == "t5-lm":
        generator = torch.Generator().manual_seed(0)
        inputs["labels"] = torch.randint(3, VOCABULARY, (7, 4), generator=generator)
        inputs["decoder_input_ids"] = torch.cat([torch.zeros(7, 1, dtype=torch.long), inputs["labels"][:, :-1]], 1)
    else:
        inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][1, 2:] = -100
    if name != "t5-lm":
        inputs["labels"][inputs["attention_mask"] == 0] = -100
    scored = (inputs["labels"][:, int(shift) :] != -100).sum(1).numpy()

    def each(out, one):
        return token_losses(out, one["labels"], shift=shift)[None]

    def mean(out, one):
        losses = token_losses(out, one["labels"], shift=shift)
        return (losses.sum() / (one["labels"][:, int(shift) :] != -100).sum()).reshape(1, 1)

    tokens = assert_brute_force(model, inputs, ntk.TokenLoss(), each)
    assert tokens.outputs.shape == (7, inputs["labels"].shape[1] - int(shift))
    assert ((tokens.outputs != 0).sum(1) == scored).all()
    whole = assert_brute_force(model, inputs, "loss", mean)
    assert np.allclose(whole.outputs[:, 0], tokens.outputs.sum(1) / scored, atol=1e-5)
    total = compute_gram(model, inputs, params="all", readout=ntk.SequenceLoss("sum"), precision="exact")
    exact = compute_gram(model, inputs, params="all", readout=ntk.SequenceLoss(), precision="exact")
    assert max(relative_error(total.values, np.outer(scored, scored) * np.asarray(exact.values))) < 1e-9


class Words:
    """A tokenizer of three words."""

    unk_token_id, mask_token_id = 0, 9
    known = {" great": [4], " bad": [5], " terrible": [6, 7], " odd": [0]}

    def encode(self, word, add_special_tokens):
        assert not add_special_tokens
        return self.known[word]

    def decode(self, ids):
        return f"<{ids[0]}>"


def test_bad_readouts():
    assert ntk.LabelWords.of([" great", " bad"], Words()).tokens == (4, 5)
    assert ntk.LabelWords.of([" great", " bad"], Words(), "mask").mask_token_id == 9
    model = causal("gpt2")
    inputs = prompts(model, "right")
    cases = {
        "' terrible': expected one token, got ": lambda: ntk.LabelWords.of([" terrible"], Words()),
        "' odd': expected one token": lambda: ntk.LabelWords.of([" odd"], Words()),
        "tokens: expected different token ids": lambda: ntk.LabelWords((4, 4)),
        "position: expected 'last', 'mask' or an index": lambda: ntk.LabelWords((4, 5), "first"),
        "needs mask_token_id": lambda: ntk.LabelWords((4, 5), "mask"),
        "margin=True needs 2 words, got 3": lambda: ntk.LabelWords((4, 5, 6), margin=True),
        "token 97 is beyond the model's 97 words": lambda: compute_gram(
            model, inputs, params="all", readout=ntk.LabelWords((97,))
        ),
        "position 12 is beyond": lambda: compute_gram(model, inputs, readout=ntk.LabelWords((4,), 12)),
        "reduction: expected 'mean' or 'sum'": lambda: ntk.SequenceLoss("max"),
        r"needs inputs\['labels'\]": lambda: compute_gram(model, inputs, readout=ntk.TokenLoss()),
        "use LabelWords": lambda: compute_gram(model, inputs, readout="logits"),
        "no token of example": lambda: compute_gram(
            model, inputs | {"labels": torch.full_like(inputs["input_ids"], -100)}, readout="loss"
        ),
    }
    for message, use in cases.items():
        with pytest.raises(InputError, match=message):
            use()
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9))
    given = {"input_ids": torch.randint(0, 9, (3, 5)), "labels": torch.randint(0, 9, (3, 5))}
    with pytest.raises(InputError, match="say shift=True or shift=False"):
        compute_gram(plain, given, params="all", readout="loss")
    gram = compute_gram(plain, given, params="all", readout=ntk.SequenceLoss(shift=True))
    assert gram.values.shape == (3, 3)


def test_another_readout_is_another_job(tmp_path):
    model = causal("gpt2")
    inputs = prompts(model, "right")
    out = tmp_path / "k.h5"
    compute_gram(model, inputs, params="*h.1.*", readout=ntk.LabelWords((4, 5)), out=out)
    compute_gram(model, inputs, params="*h.1.*", readout=ntk.LabelWords((4, 5)), out=out)
    with pytest.raises(InputError, match="holds another job: readout"):
        compute_gram(model, inputs, params="*h.1.*", readout=ntk.LabelWords((4, 6)), out=out)


def test_a_function_is_known_by_what_it_does():
    def make(k):
        return lambda out, _x: out.logits[:, k]

    same, other = fingerprint_function(make(1)), fingerprint_function(make(2))
    assert same == fingerprint_function(make(1)) != other
    assert fingerprint_function(lambda x: x + 1) != fingerprint_function(lambda x: x + 2)
    partials = [fingerprint_function(functools.partial(zoo.words_at_last, inputs=i)) for i in (1, 1, 2)]
    assert partials[0] == partials[1] != partials[2]
    heads = [torch.nn.Linear(2, 2) for _ in range(2)]
    assert fingerprint_function(heads[0]) != fingerprint_function(heads[1])
    first, second = (functools.partial(zoo.words_at_last, torch.tensor([i])) for i in (1, 2))
    assert fingerprint_function(first) != fingerprint_function(second)


@pytest.mark.parametrize(("name", "warned"), [("gpt2", True), ("llama", False)])
def test_left_padding_that_moves_positions_is_told(name, warned, caplog):
    model = causal(name)
    inputs = prompts(model, "left")
    inputs.pop("position_ids")
    compute_gram(model, inputs, params="all", readout=ntk.LabelWords((7, 50)))
    assert ("counts positions from the first column" in caplog.text) is warned
