"""Weights that stay in their file: the same Gram, and no weight in memory but the one at work."""

from __future__ import annotations

import copy
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import ntkengine as ntk
from ntkengine.errors import InputError, NonFinite
from ntkengine.inputs import resident, streaming
from ntkengine.inputs.fingerprint import fingerprint_model
from tests import zoo
from tests.brute import relative_error, tiny_inputs, tiny_model
from tests.tiny import edit_config


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(streaming, "STREAMED", 256)


@pytest.fixture(params=["bert", "llama", "gpt2"])
def folder(request, tmp_path):
    model = tiny_model(request.param)
    model.save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


LORA = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}


@pytest.mark.parametrize("precision", ["high", "exact", "fast"])
def test_streamed_equals_loaded(folder, precision):
    loaded, streamed = (ntk.load_model(folder, num_labels=3, stream=s) for s in (False, True))
    assert sum(streaming.entry_of(p) is not None for p in streamed.parameters()) > 10
    inputs = tiny_inputs(loaded, zoo.LENGTHS, 12)
    grams = [ntk.compute_gram(m, inputs, params="all", precision=precision) for m in (loaded, streamed)]
    tolerance = {"exact": 1e-13, "high": 1e-6, "fast": 2e-2}[precision]
    assert max(relative_error(grams[1].values, grams[0].values)) < tolerance
    assert np.allclose(grams[1].outputs, grams[0].outputs, atol=1e-2 if precision == "fast" else 1e-5)
    assert fingerprint_model(loaded) == fingerprint_model(streamed)


def test_streamed_lora(folder):
    peft = {"peft_type": "LORA", "r": 2, "target_modules": LORA[folder.name], "init_lora_weights": False}
    grams = []
    for stream in (False, True):
        model = ntk.load_model(folder, num_labels=3, peft=peft, stream=stream)
        grams.append(ntk.compute_gram(model, tiny_inputs(model, zoo.LENGTHS, 12), precision="exact"))
    assert max(relative_error(grams[1].values, grams[0].values)) < 1e-13


@pytest.mark.parametrize("start", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"use_dora": True}])
def test_an_adapter_that_starts_from_weights_left_in_a_file_is_refused(folder, start):
    peft = {"peft_type": "LORA", "r": 2, "target_modules": LORA[folder.name], **start}
    with pytest.raises(InputError, match="without stream"):
        ntk.load_model(folder, num_labels=3, peft=peft, stream=True)


def test_a_weight_is_in_memory_only_while_it_works(folder):
    model = ntk.load_model(folder, num_labels=3, stream=True)
    inputs = tiny_inputs(model, zoo.LENGTHS, 12)
    f = model(**inputs).logits
    assert torch.isfinite(f).all()
    for name, p in model.named_parameters():
        if streaming.entry_of(p) is not None:
            assert p.untyped_storage().nbytes() == p.element_size()
            assert torch.isnan(p).all(), name
            owner, _, local = name.rpartition(".")
            assert local not in model.get_submodule(owner).__dict__
    held = []

    def look(x):
        held.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(look, lambda x: x):
        model(**inputs)
    big = {tuple(p.shape) for p in model.parameters() if streaming.entry_of(p) is not None}
    assert not any(tuple(x.shape) in big or tuple(x.T.shape) in big for x in held if x.ndim == 2)


@pytest.mark.parametrize("name", ["bert", "roberta", "t5", "modernbert", "distilbert"])
def test_a_new_head_is_drawn_as_without_streaming(name, tmp_path):
    whole = zoo.model(name) if name in zoo.MODELS else tiny_model(name)
    tf.AutoModel.from_config(whole.config).save_pretrained(tmp_path / "body")
    models = [ntk.load_model(tmp_path / "body", num_labels=5, stream=s, seed=3) for s in (False, True)]
    assert all(m.ntk_head_new for m in models)
    assert fingerprint_model(models[0]) == fingerprint_model(models[1])


def test_what_cannot_be_streamed_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="stream=True needs a model directory with safetensors files"):
        ntk.load_model("some/hub-id", stream=True)
    (other := tmp_path / "other").mkdir()
    tiny_model("llama").save_pretrained(other)
    (other / "config.json").write_text((folder / "config.json").read_text())
    if folder.name != "llama":
        with pytest.raises(InputError, match="no file holds .* load it without stream"):
            ntk.load_model(other, num_labels=3, stream=True)


def test_what_is_left_in_a_file_is_not_trained_nor_displaced(folder):
    model = ntk.load_model(folder, num_labels=3, stream=True)
    inputs, big = tiny_inputs(model, zoo.LENGTHS, 12), next(n for n, p in model.named_parameters() if p.ndim > 1)
    y = np.eye(3)[np.arange(len(zoo.LENGTHS)) % 3]
    for optimizer in ("adam", "sgd"):
        with pytest.raises(InputError, match="stays in its file, and cannot be trained"):
            ntk.fine_tune(model, inputs, y, learning_rate=1e-3, params=big, optimizer=optimizer)
    with pytest.raises(InputError, match=f"linearize: {big} stays in its file"):
        ntk.linearize(model, big)
    loaded = ntk.load_model(folder, num_labels=3)
    rest = [n for n, p in model.named_parameters() if streaming.entry_of(p) is None]
    runs = [ntk.fine_tune(m, inputs, y, learning_rate=1e-3, params=rest) for m in (loaded, model)]
    assert runs[0].history[-1].displacement > 0
    assert np.allclose(runs[0].outputs, runs[1].outputs, atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_reads_the_same_file(folder, copied):
    model = ntk.load_model(folder, num_labels=3, stream=True)
    next(model.parameters()).requires_grad_(False)
    other, inputs = copied(model), tiny_inputs(model, [3, 7], 7)
    assert all(streaming.entry_of(p) == streaming.entry_of(q) for p, q in both(model, other))
    assert all(p.requires_grad == q.requires_grad and p is not q for p, q in both(model, other))
    assert torch.equal(model(**inputs).logits, other(**inputs).logits)
    again = copy.deepcopy(other)
    assert torch.equal(model(**inputs).logits, again(**inputs).logits)


def both(model, other):
    return zip(model.parameters(), other.parameters(), strict=True)


class Peeks(torch.nn.Module):
    """Reads a weight without calling its module."""

    def __init__(self, model, owner):
        super().__init__()
        self.model, self.owner = model, owner

    def forward(self, ids):
        return self.model(input_ids=ids).logits + self.model.get_submodule(self.owner).weight.sum()


def test_a_weight_used_outside_its_module_is_not_silently_wrong(folder):
    model = ntk.load_model(folder, num_labels=3, stream=True)
    big = next(n for n, p in model.named_parameters() if streaming.entry_of(p) is not None and n.count(".") > 3)
    ids = tiny_inputs(model, [12] * 5, 12)["input_ids"]
    with pytest.raises(NonFinite, match="is NaN where another module than its own reads it: load the model without"):
        ntk.compute_gram(Peeks(model, big.removesuffix(".weight")), {"ids": ids}, params=["all", f"!model.{big}"])


class Writes(Peeks):
    """Scales a weight in place."""

    def forward(self, ids):
        with torch.no_grad():
            self.model.get_submodule(self.owner).weight.div_(2)
        return self.model(input_ids=ids).logits


def test_a_model_that_writes_to_a_weight_left_in_a_file_is_refused(folder):
    model = ntk.load_model(folder, num_labels=3, stream=True)
    big = next(n for n, p in model.named_parameters() if streaming.entry_of(p) is not None and n.count(".") > 3)
    ids = tiny_inputs(model, [12] * 5, 12)["input_ids"]
    with pytest.raises(InputError, match="Writes writes to a weight left in its file: load the model without stream$"):
        ntk.compute_gram(Writes(model, big.removesuffix(".weight")), {"ids": ids})


def test_a_hook_of_an_embedding_reads_its_whole_table(folder):
    loaded, streamed = pair(folder)
    norms = []
    for model in (loaded, streamed):
        table = model.get_input_embeddings()
        table.requires_grad_(False).register_forward_pre_hook(lambda m, _: norms.append(m.weight.norm()))
        model(**tiny_inputs(model, [3, 2], 3))
    assert torch.equal(*norms)


def test_a_short_file_is_refused(folder):
    file = next(folder.glob("*.safetensors"))
    whole = file.read_bytes()
    model = ntk.load_model(folder, num_labels=3, stream=True)
    file.write_bytes(whole[: len(whole) // 4])  # after it was opened

    def run():
        ntk.compute_gram(model, tiny_inputs(model, zoo.LENGTHS, 12))

    with pytest.raises(InputError, match="was changed after the model was loaded"):
        run()
    file.write_bytes(whole[:-1000])
    with pytest.raises(InputError, match="is not a safetensors file .*file not fully covered"):
        ntk.load_model(folder, num_labels=3, stream=True)


@pytest.mark.parametrize(("lora", "ahead"), [(False, False), (True, False), (False, True)])
def test_a_model_of_fewer_digits_than_its_file_is_what_loading_it_gives(tmp_path, monkeypatch, lora, ahead):
    monkeypatch.setattr(resident, "brought_ahead", lambda _device: ahead)
    tiny_model("llama").save_pretrained(tmp_path)
    peft = {"peft_type": "LORA", "r": 2, "target_modules": LORA["llama"], "init_lora_weights": False} if lora else None
    loaded, streamed = (ntk.load_model(tmp_path, 3, peft, "bfloat16", stream=s) for s in (False, True))
    assert [p.dtype for p in streamed.parameters()] == [p.dtype for p in loaded.parameters()]
    assert [b.dtype for b in streamed.buffers()] == [b.dtype for b in loaded.buffers()]
    inputs = tiny_inputs(loaded, [5, 3, 7], 7)
    grams = [ntk.compute_gram(m, inputs, precision="exact") for m in (loaded, streamed)]
    assert max(relative_error(grams[1].values, grams[0].values)) < 1e-13


@pytest.mark.parametrize("shards", [False, True])
def test_files_that_lie_beside_the_model_are_not_read(tmp_path, shards):
    tiny_model("bert", seed=5).save_pretrained(tmp_path / "other")
    tiny_model("bert").save_pretrained(tmp_path / "it", max_shard_size="60KB" if shards else "1GB")
    for name in ("model-00009-of-00009", "model.fp16", "optimizer"):
        shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "it" / f"{name}.safetensors")
    loaded, streamed = (ntk.load_model(tmp_path / "it", num_labels=3, stream=s) for s in (False, True))
    assert fingerprint_model(loaded) == fingerprint_model(streamed)
    (tmp_path / "it" / f"model.safetensors{'.index.json' * shards}").unlink()
    with pytest.raises(InputError, match=r"stream=True needs model.safetensors or model.safetensors.index.json"):
        ntk.load_model(tmp_path / "it", num_labels=3, stream=True)


def test_the_file_that_a_config_names_is_the_one(tmp_path):
    for name, seed in (("it", 0), ("other", 5)):
        tiny_model("bert", seed=seed).save_pretrained(tmp_path / name)
    mine = (tmp_path / "it" / "model.safetensors").rename(tmp_path / "it" / "mine.safetensors")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "it")
    edit_config(tmp_path / "it", transformers_weights="mine.safetensors")
    loaded, streamed = pair(tmp_path / "it")
    assert fingerprint_model(loaded) == fingerprint_model(streamed)
    mine.unlink()
    for name in ("mine.safetensors", "../other/model.safetensors"):
        edit_config(tmp_path / "it", transformers_weights=name)
        with pytest.raises(InputError, match=f"stream=True needs {name}, its config's transformers_weights, in the f"):
            ntk.load_model(tmp_path / "it", num_labels=3, stream=True)


def pair(folder, dtype="float32", task="sequence-classification"):
    """The model of a folder, loaded and streamed."""
    return [ntk.load_model(folder, num_labels=3, dtype=dtype, task=task, stream=s) for s in (False, True)]


def test_names_that_loading_changes(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(vocab_size=97, **sizes)).save_pretrained(tmp_path / "renamed")
    loaded, streamed = pair(tmp_path / "renamed", task="causal-lm")
    assert fingerprint_model(loaded) == fingerprint_model(streamed)
    tiny_model("bert").save_pretrained(tmp_path / "older")
    file = tmp_path / "older" / "model.safetensors"
    held = {
        k.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): v for k, v in load_file(file).items()
    }
    save_file(held | {"bert.embeddings.position_ids": torch.arange(64)[None]}, file, {"format": "pt"})
    loaded, streamed = pair(tmp_path / "older")
    assert fingerprint_model(loaded) == fingerprint_model(streamed)
    zoo.model("mixtral").save_pretrained(tmp_path / "joined")
    with pytest.raises(InputError, match="no file holds .*experts.* under that name; load it without stream"):
        ntk.load_model(tmp_path / "joined", num_labels=3, stream=True)


def test_of_two_names_for_one_weight_the_one_that_loading_takes_is_read(tmp_path):
    tiny_model("bert").save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "encoder.layer.0.attention.self.query.weight"
    held = load_file(file)
    gamma = {"bert.embeddings.LayerNorm.gamma": held["bert.embeddings.LayerNorm.weight"] + 1}
    save_file(held | {name: held[f"bert.{name}"] + 1} | gamma, file, {"format": "pt"})
    loaded, streamed = pair(tmp_path)
    assert fingerprint_model(loaded) == fingerprint_model(streamed)


def test_a_buffer_that_loading_makes_itself_is_not_read(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    rounded = model.model.rotary_emb.inv_freq.bfloat16().float()
    save_file(load_file(file) | {"model.rotary_emb.inv_freq": rounded}, file, {"format": "pt"})
    loaded, streamed = pair(tmp_path)
    assert torch.equal(loaded.model.rotary_emb.inv_freq, streamed.model.rotary_emb.inv_freq)
    inputs = tiny_inputs(loaded, [5, 3, 7], 7)
    assert torch.equal(loaded(**inputs).logits, streamed(**inputs).logits)


def test_a_buffer_that_is_not_saved_has_the_digits_that_loading_gives_it(tmp_path):
    config = tf.GPTJConfig(vocab_size=97, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, n_positions=64)
    tf.GPTJForCausalLM(config).save_pretrained(tmp_path)
    loaded, streamed = pair(tmp_path, "bfloat16", task="causal-lm")
    tables = [m.transformer.h[0].attn.embed_positions for m in (loaded, streamed)]
    assert torch.equal(*tables)
    assert fingerprint_model(loaded) == fingerprint_model(streamed)


OWN_CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput as Output

class Config(PretrainedConfig):
    model_type = "own"

class Own(PreTrainedModel):
    config_class, base_model_prefix, all_tied_weights_keys = Config, "body", {}

    def __init__(self, config):
        super().__init__(config)
        self.body = torch.nn.Embedding(97, 32)
        self.score = torch.nn.Linear(32, config.num_labels)
        self.register_buffer("table", torch.arange(32) / 7, persistent=False)
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, input_ids, attention_mask=None):
        return Output(logits=self.score(torch.tanh(self.body(input_ids) * self.table).mean(1)))
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN_CODE)
    classes = {"AutoConfig": "own.Config", "AutoModelForSequenceClassification": "own.Own"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": classes}))
    torch.manual_seed(0)
    save_file({"body.weight": torch.randn(97, 32)}, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_buffer_that_loading_leaves_unset_is_what_its_own_code_makes(own, stream, dtype):
    model = ntk.load_model(own, dtype=dtype, trust_remote_code=True, stream=stream)
    assert torch.equal(model.table, (torch.arange(32) / 7).to(model.table.dtype))


def test_a_new_head_that_its_own_code_leaves_unset_starts_as_its_modules_do(own):
    cases = (False, 3), (True, 3), (False, 4)
    models = [ntk.load_model(own, trust_remote_code=True, stream=s, seed=n) for s, n in cases]
    heads = [torch.cat([m.score.weight.flatten(), m.score.bias]).detach() for m in models]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert all(0 < float(h.abs().max()) <= 32**-0.5 for h in heads)


def test_no_part_of_a_bare_model_is_made_up(tmp_path):
    zoo.model("mixtral").save_pretrained(tmp_path / "joined")
    zoo.model("bert-mlm").save_pretrained(tmp_path / "unpooled")
    for name, part in (("joined", "layers.0.mlp.experts.gate_up_proj"), ("unpooled", "pooler.dense.weight")):
        with pytest.raises(InputError, match=f"no file holds {part} under that name; load it without stream"):
            ntk.load_model(tmp_path / name, task="encoder", stream=True)


def test_weights_that_loading_quantises(folder):
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(InputError, match="its weights are quantised; load it without stream"):
        ntk.load_model(folder, num_labels=3, stream=True)


def test_an_adapter_beside_the_model_is_not_left_out(folder):
    peft = {"peft_type": "LORA", "r": 2, "target_modules": LORA[folder.name]}
    ntk.load_model(folder, num_labels=3, peft=peft).save_pretrained(folder)
    assert any("lora_A" in name for name, _ in ntk.load_model(folder, num_labels=3).named_parameters())
    with pytest.raises(InputError, match="holds an adapter beside its model; load it without stream"):
        ntk.load_model(folder, num_labels=3, stream=True)


def test_dtypes_that_a_model_keeps(tmp_path):
    zoo.model("t5").save_pretrained(tmp_path)
    loaded, streamed = pair(tmp_path, "float16")
    assert {p.dtype for p in streamed.parameters()} == {torch.float16, torch.float32}
    assert fingerprint_model(loaded) == fingerprint_model(streamed)


def test_tied_weights_that_differ_are_refused(tmp_path):
    config = tf.LlamaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    model = tf.LlamaForCausalLM(config)  # not tied
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=True)
    with pytest.raises(InputError, match="embed_tokens.weight and lm_head.weight are tied by its config, and differ"):
        ntk.load_model(tmp_path, task="causal-lm", stream=True)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=True)
    loaded, streamed = pair(tmp_path, task="causal-lm")
    assert fingerprint_model(loaded) == fingerprint_model(streamed)
    assert streamed.lm_head.weight is streamed.model.embed_tokens.weight


def test_buffers_are_read_too(tmp_path):
    config = tf.ResNetConfig(num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = tf.ResNetModel(config)
    for name, b in model.named_buffers():
        b.add_(3 if name.endswith("tracked") else torch.rand_like(b))
    model.save_pretrained(tmp_path)
    loaded, streamed = pair(tmp_path, task="encoder")
    assert fingerprint_model(loaded) == fingerprint_model(streamed)
