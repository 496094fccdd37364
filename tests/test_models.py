"""Loading: what comes out, and every refusal with its message."""

from __future__ import annotations

import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from ntkengine.errors import InputError
from ntkengine.inputs.models import load_model
from tests.tiny import edit_config, save_tiny

LORA = {"peft_type": "LORA", "r": 2, "target_modules": "query,value"}


@pytest.fixture
def saved(tmp_path):
    return save_tiny(tmp_path / "model")


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama"])
def test_loads_every_kind(tmp_path, kind):
    model = load_model(save_tiny(tmp_path / kind, kind))
    assert not model.training
    assert model.ntk_tokenizer is not None
    assert not model.ntk_head_new
    assert model.config.pad_token_id is not None
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_new_heads_are_reproducible_and_leave_the_random_state_alone(tmp_path):
    saved = save_tiny(tmp_path / "body", head=False)
    state = torch.random.get_rng_state()
    one, two, other = (load_model(saved, num_labels=3, seed=s) for s in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert one.ntk_head_new
    assert one.classifier.out_features == 3
    assert torch.equal(one.classifier.weight, two.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)


@pytest.mark.parametrize(("task", "kind"), [("causal-lm", "llama"), ("masked-lm", "bert")])
def test_the_words_of_a_language_model_are_never_random(tmp_path, task, kind):
    saved = save_tiny(tmp_path / kind, kind)  # a classifier's weights
    with pytest.raises(InputError, match=rf"{kind}: its weights hold no head for task '{task}': .* would be random"):
        load_model(saved, task=task)


def test_adapter_is_all_that_is_trainable(saved):
    model = load_model(saved, peft=LORA)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 3 * 2 * 2
    assert all("lora_" in name for name in trainable)
    assert model.ntk_tokenizer is not None


@pytest.mark.parametrize("targets", ["query", "query, value", ["query"], r".*\.layer\.1\..*query", "all-linear"])
def test_modules_of_an_adapter_are_a_name_names_or_a_pattern(saved, targets):
    model = load_model(saved, peft={"peft_type": "LORA", "r": 2.0, "lora_alpha": 3.5, "target_modules": targets})
    assert any("query.lora_A" in name for name, p in model.named_parameters() if p.requires_grad)


def test_dtype(saved):
    assert next(load_model(saved, dtype="float64").parameters()).dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, "dtype: expected one of float32"),
        ({"task": "vision"}, "task: expected one of"),
        ({"device": "tpu9"}, "device: 'tpu9' cannot be used here"),
        ({"peft": {"peft_type": "PREFIX_TUNING"}}, "peft.task_type: PREFIX_TUNING needs one, such as SEQ_CLS"),
        ({"peft": {"peft_type": "LORAX"}}, "peft.peft_type: expected one of .*, got 'LORAX'; did you mean 'LORA'.$"),
        ({"peft": LORA | {"rank": 3}}, "peft.rank: LORA has no such field"),
        ({"peft": LORA | {"target_modules": "q_proj"}}, "modules of this model are called .*query"),
        (
            {"peft": LORA | {"target_modules": ["query", "walue"]}},
            "^peft.target_modules: 'walue' matches no module; did you mean 'value'.$",
        ),
        (
            {"peft": LORA | {"target_modules": ["query", "selv.value"]}},
            "^peft.target_modules: 'selv.value' matches no module; did you mean 'self.value'.$",
        ),
        ({"peft": LORA | {"modules_to_save": ["klassifier"]}}, "^peft.modules_to_save: .* did you mean 'classifier'.$"),
        ({"peft": LORA | {"exclude_modules": ["zzz"]}}, "^peft.exclude_modules: 'zzz' matches no module$"),
        ({"peft": LORA | {"target_parameters": ["up.weight"]}}, "^peft.target_parameters: 'up.weight' matches"),
        ({"peft": "lora"}, "peft: expected a peft config or a mapping of its fields, got 'lora'"),
        ({"peft": LORA | {"r": 0}}, "peft: `r` should be a positive integer"),
        ({"peft": LORA | {"r": "x"}}, "^peft.r: expected a number, got 'x'$"),
        ({"peft": LORA | {"r": 1.5}}, "^peft.r: expected a whole number, got 1.5$"),
        ({"peft": LORA | {"use_rslora": "yes"}}, "^peft.use_rslora: expected true or false, got 'yes'$"),
        ({"peft": LORA | {"target_modules": 5}}, "^peft.target_modules: expected a list of names, got 5$"),
        ({"peft": LORA | {"bias": "some"}}, "^peft: [^;]*$"),
        ({"num_labels": 0}, "num_labels: expected an integer >= 1, got 0"),
        ({"num_labels": 5}, "classifier.* has another number of outputs than num_labels=5 asks for"),
    ],
)
def test_bad_arguments(saved, arguments, message):
    with pytest.raises(InputError, match=message):
        load_model(saved, **arguments)


def test_directories_that_are_no_models(tmp_path, saved):
    with pytest.raises(InputError, match="no such model directory"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="config.json"):
        load_model(tmp_path / "empty")
    weights = saved / "model.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    with pytest.raises(InputError, match="holds no weights"):
        load_model(saved)
    torch.save(tensors, saved / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickle form"):
        load_model(saved)
    assert load_model(saved, allow_pickle=True) is not None
    weights.write_bytes(b"\x00" * 100)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(saved)


def test_a_wrong_field_of_the_configuration_is_named(saved):
    edit_config(saved, hidden_size="wide")
    with pytest.raises(InputError, match=r"cannot be loaded \(config.json: hidden_size: expected int, got 'wide'\)$"):
        load_model(saved)


def test_weights_that_cannot_be_used(saved):
    weights = saved / "model.safetensors"
    tensors = load_file(weights)
    name = "bert.encoder.layer.1.output.dense.weight"
    bad = tensors[name].clone()
    bad[3, 4] = float("nan")
    save_file(tensors | {name: bad}, weights, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"not finite: {name}"):
        load_model(saved)
    save_file({k: v for k, v in tensors.items() if k != name}, weights, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"do not cover the model: {name}"):
        load_model(saved)


@pytest.mark.parametrize(("task", "prefix"), [("sequence-classification", "bert."), ("encoder", "")])
def test_a_weight_of_another_shape_is_named(saved, task, prefix):
    edit_config(saved, intermediate_size=48)
    told = rf"{prefix}encoder.layer.0.intermediate.dense.bias: expected shape \(48,\), .* got \(64,\)"
    with pytest.raises(InputError, match=told):
        load_model(saved, task=task)


def test_hub_out_of_reach(monkeypatch):
    def nobody(*_, **__):
        raise OSError("no network")

    asked = []
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: asked.append(1) or nobody())
    began = time.perf_counter()
    with pytest.raises(
        InputError, match=r"such-model: is no local directory, the hub does not answer .* no such model$"
    ):
        load_model("nobody/no-such-model")
    assert time.perf_counter() - began < 10  # the hub's client would wait for half a minute, twice
    assert len(asked) == 1


@pytest.mark.parametrize("name", ["models/of/mine", "mine/", "my model", "~nobody-at-all/m", "m" * 300, "a\0b", ""])
def test_names_of_no_hub_are_directories(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="no such model directory|expected a model directory"):
        load_model(name)
