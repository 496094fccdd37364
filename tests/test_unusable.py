"""Models without a kernel, or no gradient where one is looked for: refused by name; those that only look so: right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn
from torch.utils.checkpoint import CheckpointFunction, checkpoint

import ntkengine as ntk
from ntkengine.errors import CheckFailed, InputError, NonFinite
from tests import zoo
from tests.brute import TwoLinears as Net
from tests.brute import gradients, relative_error, tiny_inputs, tiny_model

D = 5


def plain(net, x):
    return net.two(net.one(x).tanh())


def reentrant(net, x):
    h = net.one(x)
    return net.two(sum(checkpoint(lambda z: net.one(z).tanh(), given, use_reentrant=True) for given in (h, x)))


def hooked():
    net = Net(plain)
    net.one.weight.register_hook(lambda g: 2 * g)
    return net


def made(context):
    with context:
        return Net(plain)


@pytest.fixture
def x():
    torch.manual_seed(1)
    return {"x": torch.randn(4, D)}


@pytest.mark.parametrize("precision", ["exact", "high"])
def test_reentrant_checkpointing_changes_nothing(x, precision):
    model = Net(reentrant)
    gram = ntk.compute_gram(model, x, params="all", precision=precision)
    model.forward_of = lambda net, x: net.two(net.one(net.one(x)).tanh() + net.one(x).tanh())
    G = gradients(model, x, [n for n, _ in model.named_parameters()])
    assert max(relative_error(gram.values, np.einsum("ncp,mcp->nm", G, G))) < 1e-6
    assert "apply" not in vars(CheckpointFunction)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            lambda: Net(lambda net, x: plain(net, x).detach()),
            {},
            "the outputs depend on none of the selected",
        ),
        (
            lambda: Net(plain),
            {"readout": lambda out, _: out.argmax(1, keepdim=True).float()},
            r"none of the selected parameters \(one.weight, …\): is the readout detached",
        ),
        (hooked, {"precision": "exact"}, "params: one.weight has a hook that changes its gradient"),
        (lambda: made(torch.inference_mode()), {}, r"one.weight was made in torch.inference_mode\(\)"),
        (lambda: made(torch.device("meta")), {}, "one.weight is on the meta device and has no values"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), {}, "0.weight has no shape yet; run the model once"),
        (lambda: torch.jit.trace(nn.Linear(D, 2), torch.zeros(1, D)), {}, "TorchScript"),
    ],
)
def test_refused(x, make, options, message):
    with pytest.raises(InputError, match=message):
        ntk.compute_gram(make(), x, params="all", **options)


def test_autocast_around_the_call_is_off_inside(x):
    wanted = ntk.compute_gram(Net(plain), x, params="all")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gram = ntk.compute_gram(Net(plain), x, params="all")
    np.testing.assert_array_equal(np.asarray(gram), np.asarray(wanted))


def test_parameters_without_entries_alone(x):
    model = Net(plain)
    model.none = nn.Parameter(torch.zeros(0, 3))
    with pytest.raises(InputError, match="params: expected parameters with entries, got none of size 0"):
        ntk.compute_gram(model, x, params="none")


def test_a_hook_on_another_parameter_is_no_matter(x):
    gram = ntk.compute_gram(hooked(), x, params=["two.weight"], precision="exact")
    wanted = ntk.compute_gram(Net(plain), x, params=["two.weight"], precision="exact")
    np.testing.assert_array_equal(np.asarray(gram), np.asarray(wanted))


def test_operations_without_a_second_derivative():
    bag, x = nn.Sequential(nn.EmbeddingBag(9, 4), nn.Linear(4, 2)), {"x": torch.arange(8).reshape(4, 2)}
    with pytest.raises(CheckFailed, match="its backward pass cannot be differentiated .*; compute_gram takes it"):
        ntk.TangentProducts(bag, x, params="all")
    with pytest.raises(InputError, match=r"linearize: Sequential has no forward-mode derivative \(.*embedding_bag"):
        ntk.linearize(bag, "all", readout=lambda out, _: out)(x)


def test_a_model_that_rounds_to_float32_inside_float64():
    settings = tf.Mamba2Config(
        vocab_size=97, hidden_size=16, num_heads=4, head_dim=8, state_size=8, num_hidden_layers=2, n_groups=1,
        chunk_size=8, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.Mamba2ForCausalLM(settings).eval()
    inputs = tiny_inputs(model, [9, 3, 5], 10)
    gram = ntk.compute_gram(model, inputs, params="*layers.1*", readout=zoo.words_at_last)
    G = gradients(model, inputs, [n for n, _ in model.named_parameters() if "layers.1" in n], zoo.words_at_last)
    assert max(relative_error(gram.values, np.einsum("ncp,mcp->nm", G, G))) < 1e-5
    assert gram.meta["noise_relative"] < 1e-6


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("kind", ["FourierFTConfig", "ShiraConfig"])
def test_adapters_that_keep_or_round_what_they_compute(kind):
    peft = pytest.importorskip("peft")
    size = {"n_frequency": 10} if kind == "FourierFTConfig" else {"r": 2}
    config = getattr(peft, kind)(target_modules=["query"], **size)
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model("bert"), config)
    inputs = tiny_inputs(model, [9, 3, 5], 10)
    gram = ntk.compute_gram(model, inputs)
    assert gram.meta["noise_relative"] < 1e-6
    exact = ntk.compute_gram(model, inputs, precision="exact")
    assert max(relative_error(gram.values, exact.values)) < 1e-5


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("where", ["train", "eval", "second"])
def test_an_infinite_slope_is_told_of_the_example_that_has_it(where, check):
    class Root(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.outer = torch.nn.Linear(4, 2), torch.nn.Linear(2, 2)

        def forward(self, x):
            return self.outer(torch.sqrt((x[:, :1] != 0).float() * self.inner(x).abs()))

    x = torch.randn(40, 4)
    x[36, 0] = 0  # f is finite, and its slope is not
    good, bad = {"x": x[:8]}, {"x": x}
    more = {"eval": {"eval_inputs": bad}, "second": {"inputs2": bad}}.get(where, {})
    of = " of the eval inputs" if where == "eval" else ""
    with pytest.raises(NonFinite, match=rf"gradient is not finite for example 36{of}"):
        ntk.compute_gram(Root(), bad if where == "train" else good, **more, check=check)
