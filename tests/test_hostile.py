"""Models and inputs meant to fool the engine: right, or refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn

import ntkengine as ntk
from ntkengine.errors import CheckFailed, InputError
from ntkengine.gram.engine import compute_gram
from tests.brute import contracted, gradients, relative_error, tiny_inputs, tiny_model

D = 4


def truth(model, inputs, contraction="trace"):
    G = gradients(model, inputs, {n for n, _ in model.named_parameters()})
    return contracted(G, G, contraction)


class Net(nn.Module):
    """A linear, something odd, a head."""

    def __init__(self, odd, **more):
        super().__init__()
        torch.manual_seed(0)
        self.l, self.head, self.odd = nn.Linear(D, D), nn.Linear(D, 2), odd
        for name, value in more.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.head(torch.tanh(self.odd(self, x)))


def hidden_use(net, x):
    """Adds a second use of the weight, zero on most samples, with none of its module's calls."""
    return net.l(x) + (x[:, :1] > 2).to(x) * nn.functional.linear(x * x, net.l.weight)


def rare_use(net, x):
    return net.l(x) + (nn.functional.linear(x * x, net.l.weight) if bool((x[:, 0] > 2).any()) else 0)


@pytest.mark.parametrize("odd", [hidden_use, rare_use])
@pytest.mark.parametrize("seed", range(3))
def test_a_use_that_the_probed_samples_do_not_feel(odd, seed):
    x = torch.randn(60, D, generator=torch.Generator().manual_seed(seed)).double().clamp(max=1.9)
    x[37, 0] = 3.0
    model = Net(odd).double()
    try:
        gram = compute_gram(model, {"x": x}, params="all", precision="exact", seed=seed)
    except CheckFailed as error:
        assert "l.weight" in str(error)  # noqa: PT017
        return
    assert max(relative_error(gram.values, truth(model, {"x": x}))) < 1e-9


def test_complex_buffers_stay_complex_in_float64():
    def turn(net, x):
        z = torch.view_as_complex(net.l(x).view(-1, D // 2, 2)) * net.f.to(
            torch.promote_types(x.dtype, torch.complex64)
        )
        return torch.view_as_real(z).flatten(1)

    model = Net(turn)
    model.register_buffer("f", torch.polar(torch.ones(D // 2), torch.rand(D // 2) * 6))
    x = torch.randn(6, D)
    for precision, tolerance in (("exact", 1e-6), ("high", 1e-5)):  # the brute force is float64 with the same buffer
        gram = compute_gram(model, {"x": x}, params="all", precision=precision)
        assert max(relative_error(gram.values, truth(model, {"x": x}))) < tolerance
        assert gram.noise < 1e-4


def test_plain_tensor_attributes_follow_the_precision():
    model = Net(lambda net, x: net.l(x) @ net.t, t=torch.randn(D, D))
    x = torch.randn(6, D)
    compute_gram(model, {"x": x}, params="all", precision="exact")
    gram = compute_gram(model, {"x": x}, params="all")
    assert gram.noise < 1e-4
    assert model.t.dtype == torch.float32


class Capacity(nn.Module):
    """Only the first rows of a batch go through: what an expert's capacity does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.l, self.head = nn.Linear(D, D), nn.Linear(D, 2)

    def forward(self, x):
        keep = (torch.arange(len(x)) < 8)[:, None]
        return self.head(torch.tanh(x + self.l(x) * keep))


@pytest.mark.parametrize("precision", ["exact", "high"])
def test_dependence_on_large_batches_is_refused(precision):
    for seed in range(4):
        with pytest.raises(CheckFailed):
            compute_gram(Capacity(), {"x": torch.randn(40, D)}, params="all", precision=precision, seed=seed)


class Dropped(nn.Module):
    """Calls its module on every example, and for one of them uses the weight elsewhere instead."""

    def __init__(self):
        super().__init__()
        self.l, self.head = nn.Linear(D, D), nn.Linear(D, 2)

    def forward(self, x):
        out = []
        for row in x.split(1):
            y = self.l(row)
            if row[0, 0] > 2:
                y = nn.functional.linear(row * row, self.l.weight, self.l.bias)
            out.append(y)
        return self.head(torch.tanh(torch.cat(out)))


def test_a_call_whose_output_is_dropped_hides_no_other_use():
    torch.manual_seed(0)
    x = torch.randn(60, D).clamp(max=1.9)
    x[37, 0] = 3.0
    for seed in range(3):
        with pytest.raises(CheckFailed, match="used 1 times, but only 0 times through its module"):
            compute_gram(Dropped().eval(), {"x": x}, params="all", precision="exact", check=False, seed=seed)


class OneBackward(torch.autograd.Function):
    """A product whose backward pass cannot be differentiated."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g.detach() @ w.detach().T, x.detach().T @ g.detach()


class Custom(nn.Module):
    """An operation of that kind below an ordinary one."""

    def __init__(self):
        super().__init__()
        self.w, self.head = nn.Parameter(torch.randn(D, D)), nn.Linear(D, 3)

    def forward(self, x):
        return self.head(torch.tanh(OneBackward.apply(x, self.w)))


class Coupled(nn.Module):
    """An output that depends on the batch."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(D, 2)

    def forward(self, x):
        h = torch.tanh(self.l(x))
        return h / (1 + h.square().mean(0, keepdim=True).sqrt())


@pytest.mark.parametrize("contraction", ["full", "trace"])
def test_products_refuse_what_they_cannot_differentiate(contraction):
    torch.manual_seed(0)
    x = {"x": torch.randn(40, D)}
    with pytest.raises(CheckFailed, match="derivative of its backward pass is not its Jacobian"):
        ntk.TangentProducts(Custom(), x, params="all", contraction=contraction)
    with pytest.raises(CheckFailed, match="f of example 0 depends on the other examples"):
        ntk.TangentProducts(Coupled(), x, params="all", contraction=contraction)


def test_memory_order_and_numbers_among_the_parameters():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 16, 2))
    model.register_parameter("unused", nn.Parameter(torch.tensor(2.0)))
    inputs = {"input": torch.randn(5, 3, 6, 6)}
    K = compute_gram(model, inputs, params="all").values
    again = compute_gram(model.to(memory_format=torch.channels_last), inputs, params="all").values
    assert np.allclose(K, again, rtol=1e-5)


class Table(nn.Module):
    """A leaf with an argument whose leading axis is no sample axis."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(D))

    def forward(self, h, positions):
        return h * self.w + (positions * self.w).sin()


class Tabled(nn.Module):
    def __init__(self, T):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = Table(), nn.Linear(D, 2)
        self.register_buffer("positions", torch.randn(T, D))

    def forward(self, x):
        return self.head(self.table(x, self.positions).tanh().mean(1))


@pytest.mark.parametrize("n", [3, 7, 12])
def test_an_argument_with_as_many_rows_as_samples(n):
    model, x = Tabled(12).double(), torch.randn(n, 12, D).double()
    gram = compute_gram(model, {"x": x}, params="all", precision="exact", per_module=True)
    assert max(relative_error(gram.values, truth(model, {"x": x}))) < 1e-9
    G = gradients(model, {"x": x}, {"table.w"})
    assert max(relative_error(gram.modules["table"], contracted(G, G, "trace"))) < 1e-9


class Once(nn.Module):
    """Changes its own attention for good when it meets a short input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.kind = nn.Embedding(20, D), nn.Linear(D, 2), "sparse"
        self.config = tf.PretrainedConfig()

    def forward(self, input_ids, attention_mask):
        if input_ids.shape[1] < 8:
            self.kind = "full"
        h = self.embed(input_ids) * attention_mask[..., None]
        return self.head((h if self.kind == "full" else h * h).sum(1))


def test_a_model_that_changes_itself_on_short_inputs():
    model = Once()
    inputs = tiny_inputs_of(20, [12, 3, 9, 5])
    gram = compute_gram(model, inputs, params="all", precision="exact")
    assert model.kind == "sparse"
    assert max(relative_error(gram.values, truth(model, inputs))) < 1e-9


def tiny_inputs_of(words, lengths):
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.randint(1, words, mask.shape) * mask, "attention_mask": mask}


def test_models_that_do_not_repeat_themselves():
    with pytest.raises(CheckFailed, match="gives another output on the same input"):
        compute_gram(
            Net(lambda net, x: nn.functional.dropout(net.l(x), 0.5, training=True)),
            {"x": torch.randn(4, D)},
            params="all",
        )


def test_what_a_forward_pass_writes_is_restored():
    def count(net, x):
        net.seen.add_(1)
        return net.l(x)

    model = Net(count)
    model.register_buffer("seen", torch.zeros(()))
    compute_gram(model, {"x": torch.randn(4, D)}, params="all")
    assert model.seen == 0


@pytest.mark.parametrize("precision", ["exact", "high"])
def test_modules_without_gradient_and_named_tuples(precision):
    def silent(net, x):
        with torch.no_grad():
            shift = net.l(x)
        return net.l(x) + shift

    x = torch.randn(5, D)
    model = Net(silent)
    gram = compute_gram(model, {"x": x}, params="all", precision=precision)
    assert max(relative_error(gram.values, truth(model, {"x": x}))) < 1e-5


def test_an_encoder_with_a_padding_mask_and_sparse_tables():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(20, 8, sparse=True), nn.Linear(8, 2)
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 2)
            self.config = tf.PretrainedConfig()

        def forward(self, input_ids, attention_mask):
            h = self.encoder(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)
            return self.head(h[:, 0])

    model, inputs = Encoder().eval(), tiny_inputs_of(20, [7, 3, 5])
    gram = compute_gram(model, inputs, params="all", precision="exact")
    assert model.embed.sparse
    model.embed.sparse = False
    assert max(relative_error(gram.values, truth(model, inputs))) < 1e-9


def test_a_file_of_another_activation_scale_or_global_is_refused(tmp_path):
    l1, l2 = nn.Linear(D, D), nn.Linear(D, 2)
    x = {"x": torch.randn(5, D)}
    compute_gram(nn.Sequential(l1, nn.GELU(), l2), x, params="all", out=tmp_path / "a.h5")
    for other in (nn.ReLU(), nn.GELU(approximate="tanh")):
        with pytest.raises(InputError, match="holds another job"):
            compute_gram(nn.Sequential(l1, other, l2), x, params="all", out=tmp_path / "a.h5")
    again = compute_gram(nn.Sequential(l1, nn.GELU(), l2), x, params="all", out=tmp_path / "a.h5")
    assert np.isfinite(np.asarray(again)).all()
    readout = lambda o, _: o[:, COLUMN : COLUMN + 1]  # noqa: E731
    compute_gram(nn.Sequential(l1, l2), x, params="all", readout=readout, out=tmp_path / "b.h5")
    globals()["COLUMN"] = 1
    with pytest.raises(InputError, match="holds another job"):
        compute_gram(nn.Sequential(l1, l2), x, params="all", readout=readout, out=tmp_path / "b.h5")


COLUMN = 0


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    tiny_model("bert").save_pretrained(tmp_path / "m")
    model = ntk.load_model(tmp_path / "m", num_labels=3)
    assert model.ntk_tokenizer is None
    with pytest.raises(InputError, match="no tokenizer"):
        ntk.tokenize(["a b"], model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": 5}, "params: expected"),
        ({"params": [None]}, "params: expected"),
        ({"readout": lambda o, _: o.logits.argmax(1, keepdim=True)}, "expected .N, C. real numbers"),
        ({"readout": lambda o, _: o.logits[:, :0]}, "C ≥ 1"),
        ({"readout": lambda o, _: o.nothing}, "cannot be run on example"),
        ({"readout": "loss", "labels": torch.tensor([0, 1, 2, 3, 0, 1, 2])}, "labels in 0..2, got 0..3"),
        ({"readout": "loss", "labels": torch.tensor([0, 1, -100, 1, 0, 1, 2])}, "labels in 0..2"),
        ({"readout": "loss", "labels": torch.rand(7, 3)}, "whole numbers, one class each"),
        ({"ids": 10**6}, "cannot be run on example"),
    ],
)
def test_bad_calls_are_one_plain_line(change, message):
    model = tiny_model("bert")
    inputs = tiny_inputs(model, [5, 9, 12, 7, 3, 8, 10], 12)
    change = dict(change)
    if "labels" in change:
        inputs["labels"] = change.pop("labels")
    if "ids" in change:
        inputs["input_ids"][:] = change.pop("ids")
    with pytest.raises(InputError, match=message) as caught:
        compute_gram(model, inputs, **{"params": "all", **change})
    assert "\n" not in str(caught.value)


def test_the_loss_of_a_speech_model_is_not_a_language_models():
    config = tf.Wav2Vec2Config(
        vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    model = tf.Wav2Vec2ForCTC(config).eval()
    inputs = {"input_values": torch.randn(2, 400), "labels": torch.randint(1, 12, (2, 5))}
    with pytest.raises(InputError, match="expected labels of"):
        compute_gram(model, inputs, params="all", readout="loss")


def test_unpadded_rows_against_padded_columns():
    model = Pooled()
    rows, columns = tiny_inputs_of(20, [9, 9, 9]), tiny_inputs_of(20, [9, 4, 5])
    for check in (True, False):
        gram = compute_gram(model, rows, columns, params="all", precision="exact", check=check)
        names = {n for n, _ in model.named_parameters()}
        G, H = gradients(model, rows, names), gradients(model, columns, names)
        assert max(relative_error(gram.values, contracted(G, H, "trace"))) < 1e-9


class Pooled(nn.Module):
    """Averages over padding too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(20, D), nn.Linear(D, 2)
        self.config = tf.PretrainedConfig()

    def forward(self, input_ids, attention_mask):
        return self.head(torch.tanh(self.embed(input_ids).mean(1) + attention_mask.sum(1, keepdim=True)))


def test_a_model_that_float64_breaks_keeps_its_gram(caplog):
    def single(net, x):
        if x.dtype == torch.float64:
            raise RuntimeError("no float64 here")
        return net.l(x)

    model, x = Net(single), torch.randn(5, D)
    gram = compute_gram(model, {"x": x}, params="all")
    assert np.isnan(gram.noise)
    assert "no float64 here" in caplog.text
