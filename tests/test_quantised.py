"""Quantised layers that a gradient does not pass, or that one dtype cannot run, are refused in one line."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
import transformers

import ntkengine as ntk
from ntkengine.errors import InputError
from ntkengine.gram.engine import compute_gram
from ntkengine.inputs.differentiable import check_differentiable

pytestmark = pytest.mark.filterwarnings("ignore")
DYNAMIC = "torch's own"
INPUTS = {"input_ids": torch.arange(3, 33).reshape(5, 6), "attention_mask": torch.ones(5, 6, dtype=torch.long)}


def llama(config: str = "") -> torch.nn.Module:
    """Return a classifier whose linear maps are quantised as torchao's config says, or its output projections alone."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = transformers.LlamaConfig(**sizes, vocab_size=97, num_labels=2, pad_token_id=0)
    model = transformers.LlamaForSequenceClassification(settings).eval()
    if config == DYNAMIC:
        for layer in model.model.layers:
            one = torch.nn.Sequential(layer.self_attn.o_proj)
            one = torch.ao.quantization.quantize_dynamic(one, {torch.nn.Linear}, dtype=torch.qint8)
            layer.self_attn.o_proj = one[0]
    elif config:
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        quantization.quantize_(model.model, getattr(quantization, config)())
    return model


def adapted(model: torch.nn.Module) -> torch.nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["v_proj"]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DYNAMIC, r"self_attn.o_proj \(Linear\) computes in integers, which has no derivative; "),
        ("Int8DynamicActivationInt8WeightConfig", r"q_proj \(Linear\) rounds its activations, which has no derivative"),
        ("Int8DynamicActivationIntxWeightConfig", r"q_proj \(Linear\) rounds its activations, which has no derivative"),
    ],
)
def test_layers_that_gradients_do_not_pass_are_refused(config, message):
    model = llama(config)
    x = torch.randn(1, 4, 64, requires_grad=True)
    through = torch.autograd.grad(model.model.layers[0].self_attn.o_proj(x).sum() + x.sum(), x)[0]
    assert torch.equal(through, torch.ones_like(x))  # nothing came through the layer
    model = adapted(model)
    calls = [lambda p=p: compute_gram(model, INPUTS, precision=p, check=False) for p in ("exact", "high", "fast")]
    calls.append(lambda: ntk.linearize(model))
    calls.append(lambda: ntk.fine_tune(model, INPUTS, np.ones((5, 2)), learning_rate=1e-2))
    for call in calls:
        with pytest.raises(InputError, match=f"^model: .*{message}"):
            call()


def test_stand_ins_for_float_operations_are_no_integer_layers():
    quantized = torch.ao.nn.quantized
    check_differentiable(torch.nn.Sequential(quantized.FloatFunctional(), quantized.Embedding(4, 16)))
    with pytest.raises(InputError, match="^model: 0 .Conv1d. computes in integers"):
        check_differentiable(torch.nn.Sequential(quantized.dynamic.Conv1d(2, 2, 1)))


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig"])
def test_weights_alone_in_few_bits(config, caplog):
    model = adapted(llama(config))
    chosen = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for n in range(5):
        f = model(**{name: x[n : n + 1] for name, x in INPUTS.items()}).logits[0]
        grads = [torch.autograd.grad(f[c], chosen, retain_graph=True) for c in range(2)]
        rows.append(torch.stack([torch.cat([g.reshape(-1) for g in of]) for of in grads]))
    J = torch.stack(rows).double()
    wanted = torch.einsum("ncp,mcp->nm", J, J).numpy()
    np.testing.assert_allclose(compute_gram(model, INPUTS).values, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())
    assert ("the noise of this Gram is unknown" in caplog.text) is (config != "Int8WeightOnlyConfig")
    if config.startswith("Intx"):
        with pytest.raises(InputError, match="^model: its weights, .*Int8Tensor, cannot be made float64"):
            compute_gram(model, INPUTS, precision="exact")
    if config.startswith("Float8"):
        for precision, dtype in (("exact", "float64"), ("fast", "bfloat16")):
            with pytest.raises(InputError, match=f"cannot be run on example 0 in {dtype}: "):
                compute_gram(model, INPUTS, precision=precision)
    with pytest.raises(
        InputError, match=r"^linearize: expected plain tensors as weights, .*proj.* is one of \w+Tensor$"
    ):
        ntk.linearize(model)
