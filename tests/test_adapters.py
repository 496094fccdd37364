"""Every adapter method, trainable parameters only, at its usual start and away from it, against brute force."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import transformers

from ntkengine.errors import InputError
from ntkengine.gram.engine import compute_gram
from tests import zoo
from tests.brute import contracted, gradients, relative_error, tiny_inputs, tiny_model

_QV = {"target_modules": ["query", "value"]}
_CLASSES = {"task_type": "SEQ_CLS"}
METHODS = {
    "lora": ("bert", peft.LoraConfig(r=2, lora_alpha=4, **_QV)),
    "rslora": ("bert", peft.LoraConfig(r=2, lora_alpha=4, use_rslora=True, **_QV)),
    "dora": ("bert", peft.LoraConfig(r=2, lora_alpha=4, use_dora=True, **_QV)),
    "lora-bias": ("bert", peft.LoraConfig(r=2, bias="lora_only", **_QV)),
    "lora-embedding": ("bert", peft.LoraConfig(r=2, target_modules=["word_embeddings", "query"])),
    "lora-classes": ("llama", peft.LoraConfig(r=2, target_modules="all-linear", **_CLASSES)),
    "modules-to-save": ("bert", peft.LoraConfig(r=2, modules_to_save=["classifier"], **_QV)),
    "adalora": ("bert", peft.AdaLoraConfig(init_r=2, target_r=1, total_step=10, **_QV)),
    "ia3": ("bert", peft.IA3Config(target_modules=["key", "output.dense"], feedforward_modules=["output.dense"])),
    "loha": ("bert", peft.LoHaConfig(r=2, **_QV)),
    "lokr": ("bert", peft.LoKrConfig(r=2, **_QV)),
    "vera": ("bert", peft.VeraConfig(r=4, **_QV)),
    "oft": ("bert", peft.OFTConfig(oft_block_size=4, **_QV)),
    "layer-norms": ("bert", peft.LNTuningConfig(target_modules=["LayerNorm"])),
    "trainable-tokens": (
        "bert",
        peft.TrainableTokensConfig(token_indices=list(range(3, 30)), target_modules=["word_embeddings"]),
    ),
    "prompt": ("bert", peft.PromptTuningConfig(num_virtual_tokens=4, **_CLASSES)),
    "p-tuning": ("llama", peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=8, **_CLASSES)),
    "prefix": ("llama", peft.PrefixTuningConfig(num_virtual_tokens=4, **_CLASSES)),
    "prefix-projected": (
        "bert",
        peft.PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=8, **_CLASSES),
    ),
    "experts": ("mixtral", peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"])),
}


def adapted(method: str, *, away: bool) -> torch.nn.Module:
    kind, config = METHODS[method]
    base = zoo.model(kind) if kind in zoo.MODELS else tiny_model(kind)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, config)
    return moved(model) if away else model.eval()


def moved(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def assert_equals_brute_force(model, precisions=("exact", "high")):
    inputs, eval_inputs = tiny_inputs(model, zoo.LENGTHS, 12), tiny_inputs(model, zoo.EVAL_LENGTHS, 12, seed=1)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    G, H = gradients(model, inputs, names), gradients(model, eval_inputs, names)
    for precision, tolerance in (("exact", 1e-9), ("high", 1e-5)):
        if precision not in precisions:
            continue
        gram = compute_gram(model, inputs, eval_inputs=eval_inputs, precision=precision)
        assert max(relative_error(gram.values, contracted(G, G, "trace"))) < tolerance
        assert max(relative_error(gram.cross, contracted(H, G, "trace"))) < tolerance
    assert {row.parameter for row in gram.plan.parameters} | set(gram.plan.unused) == names
    return gram


@pytest.mark.parametrize("away", [False, True], ids=["start", "away"])
@pytest.mark.parametrize("method", METHODS)
def test_equals_brute_force(method, away):
    assert_equals_brute_force(adapted(method, away=away))


def test_biases_only():
    model = tiny_model("bert")
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    gram = assert_equals_brute_force(model)
    assert {row.strategy for row in gram.plan.parameters} == {"explicit"}


@pytest.mark.parametrize("active", [["default"], ["second"], ["default", "second"]], ids=["first", "second", "both"])
def test_several_adapters_on_one_model(active):
    model = adapted("lora", away=False)
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["key", "value"]))
    model.base_model.set_adapter(active)
    model = moved(model)
    gram = assert_equals_brute_force(model)
    used = {name for name in ("default", "second") if any(f".{name}." in r.parameter for r in gram.plan.parameters)}
    assert used == set(active)


def test_at_the_start_the_gram_is_quadratic_in_a():
    # At B = 0 only B has a gradient: K = s² Σ_t,s (A a_t · A a_s)(d_t · d_s).
    model = adapted("lora", away=False)
    inputs = tiny_inputs(model, zoo.LENGTHS, 12)
    A = {n for n, p in model.named_parameters() if p.requires_grad and "lora_A" in n}
    before = compute_gram(model, inputs, precision="exact")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in A:
                p.mul_(4.0)
    after = compute_gram(model, inputs, precision="exact")
    assert max(relative_error(after.values, 16.0 * np.asarray(before.values))) < 1e-12
    assert not np.abs(gradients(model, inputs, A)).any()


def quantised(how: str) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, vocab_size=97, num_labels=3, num_key_value_heads=4, pad_token_id=0)
    model = transformers.LlamaForSequenceClassification(config).eval()  # rows of whole quantisation blocks (64)
    if how == "torchao int8":
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        quantization.quantize_(model.model, quantization.Int8WeightOnlyConfig())
        return model
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    for name, linear in list(model.model.named_modules()):
        if isinstance(linear, torch.nn.Linear):
            q = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            q.weight = bnb.nn.Params4bit(linear.weight.data.clone(), requires_grad=False, quant_type="nf4")
            parent, _, key = name.rpartition(".")
            setattr(model.model.get_submodule(parent), key, q.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


@pytest.mark.parametrize("how", ["torchao int8", "bitsandbytes nf4"])
@pytest.mark.filterwarnings("ignore")
def test_lora_over_a_quantised_base(how, tmp_path):
    model = moved(
        peft.get_peft_model(quantised(how), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]))
    )
    inputs = tiny_inputs(model, zoo.LENGTHS, 12)
    chosen = [p for p in model.parameters() if p.requires_grad]
    gram = compute_gram(model, inputs, out=tmp_path / "k.h5")
    again = compute_gram(model, inputs, out=tmp_path / "k.h5")
    assert np.array_equal(again.values, gram.values)
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False  # a kernel for inference, which has no derivative
    rows = []
    for i in range(len(zoo.LENGTHS)):
        f = model(**{k: v[i : i + 1] for k, v in inputs.items()}).logits
        for c in range(3):
            grads = torch.autograd.grad(f[0, c], chosen, retain_graph=True)
            rows.append(torch.cat([g.reshape(-1) for g in grads]))
    G = torch.stack(rows).reshape(len(zoo.LENGTHS), 3, -1).double().numpy()
    assert max(relative_error(gram.values, contracted(G, G, "trace"))) < 1e-5


def test_weights_packed_for_inference_are_refused():
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight.quant_state = SimpleNamespace(packing_format_for_cpu=True)
    with pytest.raises(InputError, match="mlp.up_proj .*no derivative; load the model again"):
        compute_gram(model, tiny_inputs(model, zoo.LENGTHS, 12))
