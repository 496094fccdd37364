"""The engine against brute force: architectures, adapters, contractions, readouts, precisions, invariances."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ntkengine.errors import CheckFailed, InputError, NonFinite
from ntkengine.gram import computing, planning, run, strategies
from ntkengine.gram.engine import compute_gram, plan_gram
from ntkengine.gram.layout import Layout
from tests.brute import KINDS, contracted, gradients, relative_error, tiny_inputs, tiny_model, with_lora

LENGTHS = [11, 3, 5, 7, 2, 9, 5]
EVAL_LENGTHS = [4, 13, 6, 8]
TOLERANCE = {"exact": 1e-9, "high": 1e-5}
CONTRACTIONS = ("trace", "full", "per-output", "sum-of-outputs")
LORA_TARGETS = {
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "v_proj"],
}


def summed(out, _inputs):
    return out.logits.sum(1, keepdim=True)


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    model = tiny_model(request.param)
    inputs, eval_inputs = tiny_inputs(model, LENGTHS, 12), tiny_inputs(model, EVAL_LENGTHS, 15, seed=1)
    names = {name for name, _ in model.named_parameters()}
    truth = {None: (gradients(model, inputs, names), gradients(model, eval_inputs, names))}
    # Some models round to float32 inside: the gradient of a sum is compared with the gradient of that sum.
    truth["sum"] = gradients(model, inputs, names, summed), gradients(model, eval_inputs, names, summed)
    return model, inputs, eval_inputs, truth


@pytest.mark.parametrize("precision", ["exact", "high"])
@pytest.mark.parametrize("contraction", CONTRACTIONS)
def test_all_parameters_equal_brute_force(case, contraction, precision):
    model, inputs, eval_inputs, truth = case
    G, H = truth["sum" if contraction == "sum-of-outputs" else None]
    gram = compute_gram(
        model, inputs, eval_inputs=eval_inputs, params="all", contraction=contraction, precision=precision
    )
    assert max(relative_error(gram.values, contracted(G, G, contraction))) < TOLERANCE[precision]
    assert max(relative_error(gram.cross, contracted(H, G, contraction))) < TOLERANCE[precision]
    two = compute_gram(model, eval_inputs, inputs, params="all", contraction=contraction, precision=precision)
    assert max(relative_error(two.values, contracted(H, G, contraction))) < TOLERANCE[precision]
    assert not gram.meta["unused_parameters"]
    assert gram.plan.blocks == 3


@pytest.mark.parametrize("away", [False, True], ids=["start", "away"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["exact", "high"])
def test_lora_equals_brute_force(kind, away, precision):
    model = with_lora(tiny_model(kind), LORA_TARGETS[kind], away_from_start=away)
    inputs, eval_inputs = tiny_inputs(model, LENGTHS, 12), tiny_inputs(model, EVAL_LENGTHS, 15, seed=1)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in names)
    G, H = gradients(model, inputs, names), gradients(model, eval_inputs, names)
    for contraction in CONTRACTIONS[:3]:
        gram = compute_gram(model, inputs, eval_inputs=eval_inputs, contraction=contraction, precision=precision)
        assert max(relative_error(gram.values, contracted(G, G, contraction))) < TOLERANCE[precision]
        assert max(relative_error(gram.cross, contracted(H, G, contraction))) < TOLERANCE[precision]


def test_per_module_grams_sum_to_the_whole_and_each_is_right():
    model = tiny_model("bert")
    inputs = tiny_inputs(model, LENGTHS, 12)
    gram = compute_gram(model, inputs, params="all", precision="exact", per_module=True)
    assert np.abs(sum(gram.modules.values()) - gram.values).max() < 1e-12 * np.abs(gram.values).max()
    for module in ("bert.encoder.layer.1.attention.self.query", "bert.embeddings.word_embeddings", "classifier"):
        names = {f"{module}.{local}" for local in ("weight", "bias")}
        G = gradients(model, inputs, names)
        assert max(relative_error(gram.modules[module], contracted(G, G, "trace"))) < 1e-9
        assert gram.meta["module_trace"][module] == pytest.approx(np.trace(gram.modules[module]), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_results_do_not_depend_on_batch_composition(monkeypatch, kind):
    model = tiny_model(kind)
    inputs = tiny_inputs(model, LENGTHS, 12)
    reference = compute_gram(model, inputs, params="all", precision="exact")
    order = np.array([3, 0, 6, 2, 5, 1, 4])
    permuted = compute_gram(model, {k: v[order] for k, v in inputs.items()}, params="all", precision="exact")
    assert max(relative_error(permuted.values, np.asarray(reference.values)[np.ix_(order, order)])) < 1e-9
    assert max(relative_error(permuted.outputs, reference.outputs[order])) < 1e-9
    wider = {
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (0, 9), value=model.config.pad_token_id),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 9)),
    }
    assert (
        max(relative_error(compute_gram(model, wider, params="all", precision="exact").values, reference.values)) < 1e-9
    )
    for tokens in (1, 10, 25):
        monkeypatch.setattr(planning, "fit", lambda *_, tokens=tokens, **__: Layout(microbatch_tokens=tokens))
        again = compute_gram(model, inputs, params="all", precision="exact")
        assert again.plan.microbatches > 1
        assert max(relative_error(again.values, reference.values)) < 1e-9


def test_results_do_not_depend_on_tiles(monkeypatch):
    model = tiny_model("llama")
    inputs = tiny_inputs(model, LENGTHS, 12)
    reference = compute_gram(model, inputs, params="all", precision="exact", contraction="full")
    monkeypatch.setattr(strategies, "TILE_PARAMETERS", 96)
    monkeypatch.setattr(strategies, "_PAIR_BYTES", 1000)
    again = compute_gram(model, inputs, params="all", precision="exact", contraction="full")
    assert max(relative_error(again.values, reference.values)) < 1e-12


@pytest.mark.parametrize("kept", [0, 50_000], ids=["replayed", "some kept"])
def test_replayed_blocks_equal_kept_ones(monkeypatch, kept):
    # A budget for activations decides which microbatches recompute their blocks; numbers do not depend on it.
    monkeypatch.setattr(planning, "fit", lambda *_, **__: Layout(microbatch_tokens=20))
    for kind in KINDS:
        model = tiny_model(kind)
        inputs = tiny_inputs(model, LENGTHS, 12)
        reference = compute_gram(model, inputs, params="all", precision="exact", contraction="full")
        with monkeypatch.context() as patch:
            patch.setattr(computing, "KEEP_BYTES", kept)
            again = compute_gram(model, inputs, params="all", precision="exact", contraction="full")
        assert max(relative_error(again.values, reference.values)) < 1e-12


@pytest.mark.parametrize("strategy", ["ghost", "materialise"])
def test_strategies_agree(monkeypatch, strategy):
    model = tiny_model("bert")
    inputs = tiny_inputs(model, LENGTHS, 12)
    names = {name for name, _ in model.named_parameters()}
    G = gradients(model, inputs, names)

    def forced(kind, *args):
        return (strategy, 1.0) if kind in ("outer", "mixed") else strategies.choose(kind, *args)

    monkeypatch.setattr(run, "choose", forced)
    for contraction in CONTRACTIONS[:3]:
        gram = compute_gram(model, inputs, params="all", contraction=contraction, precision="exact")
        assert max(relative_error(gram.values, contracted(G, G, contraction))) < 1e-9
    assert strategy in {row.strategy for row in gram.plan.parameters}


def test_readouts():
    model = tiny_model("bert", num_labels=2)
    inputs = tiny_inputs(model, LENGTHS, 12) | {"labels": torch.tensor([0, 1, 1, 0, 1, 0, 0])}
    names = {name for name, _ in model.named_parameters()}
    functions = {
        "margin": lambda out, _: out.logits[:, 1:] - out.logits[:, :1],
        "loss": lambda out, one: torch.nn.functional.cross_entropy(out.logits, one["labels"], reduction="none")[
            :, None
        ],
    }
    for name, function in functions.items():
        G = gradients(model, inputs, names, function)
        for readout in (name, function):
            gram = compute_gram(model, inputs, params="all", precision="exact", readout=readout)
            assert max(relative_error(gram.values, contracted(G, G, "trace"))) < 1e-9
            assert gram.outputs.shape == (7, 1)


def test_params_by_glob_and_list():
    model = tiny_model("bert")
    inputs = tiny_inputs(model, LENGTHS, 12)
    names = {name for name, _ in model.named_parameters() if ".layer.1." in name}
    G = gradients(model, inputs, names)
    truth = contracted(G, G, "trace")
    for params in ("*.layer.1.*", sorted(names)):
        assert max(relative_error(compute_gram(model, inputs, params=params, precision="exact").values, truth)) < 1e-9


def test_tied_embeddings_and_language_model_head():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_embd=16, n_layer=2, n_head=2, n_positions=32, pad_token_id=0)
    ).eval()
    inputs = tiny_inputs(model, LENGTHS, 12)

    def words(out, one):
        last = one["attention_mask"].sum(1) - 1
        return out.logits[torch.arange(len(last)), last][:, [5, 9]]

    names = {name for name, _ in model.named_parameters()}
    G = gradients(model, inputs, names, words)
    gram = compute_gram(model, inputs, params="all", precision="exact", readout=words)
    assert max(relative_error(gram.values, contracted(G, G, "trace"))) < 1e-9
    assert "mixed" not in {row.strategy for row in gram.plan.parameters}


class Odd(torch.nn.Module):
    """Raw parameters, a branch, reuse, routed rows, a broadcast table, in-place writes."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.randn(8))
        self.first, self.again = torch.nn.Linear(6, 8), torch.nn.Linear(8, 8)
        self.experts = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(2)])
        self.table = torch.nn.Embedding(5, 8)
        self.unused = torch.nn.Linear(3, 3)
        self.head = torch.nn.Linear(8, 2)

    def forward(self, x):
        h = torch.relu(self.first(x)) * self.scale
        h = self.again(self.again(h)) + self.table(torch.arange(x.shape[1]))[None]
        rows = h.reshape(-1, 8)
        out = torch.zeros_like(rows)
        chosen = (rows[:, 0] > 0).long()
        for i, expert in enumerate(self.experts):
            index = (chosen == i).nonzero()[:, 0]
            out[index] = expert(rows[index])
        out.add_(1.0)
        return self.head(out.view_as(h).mean(1))


def test_any_torch_module():
    torch.manual_seed(0)
    model = Odd()
    x = torch.randn(6, 4, 6)
    double = Odd().double()
    double.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    rows = []
    for i in range(6):
        f = double(x[i : i + 1].double())
        for c in range(2):
            grads = torch.autograd.grad(f[0, c], list(double.parameters()), retain_graph=True, allow_unused=True)
            rows.append(
                torch.cat(
                    [
                        (torch.zeros_like(p) if g is None else g).reshape(-1)
                        for p, g in zip(double.parameters(), grads, strict=True)
                    ]
                )
            )
    G = torch.stack(rows).view(6, 2, -1).numpy()
    for precision, contraction in (("exact", "trace"), ("high", "trace"), ("exact", "full")):
        gram = compute_gram(
            model, {"x": x}, params="all", readout=lambda out, _: out, precision=precision, contraction=contraction
        )
        assert max(relative_error(gram.values, contracted(G, G, contraction))) < TOLERANCE[precision]
    assert gram.meta["unused_parameters"] == ["unused.weight", "unused.bias"]
    assert gram.meta["one_by_one"]


class Routed(torch.nn.Module):
    """An expert that few samples reach."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(2, 4)
        self.expert = torch.nn.Linear(4, 4)
        self.bonus = torch.nn.Parameter(torch.randn(4))
        self.head = torch.nn.Linear(4, 2)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        index = (x[:, 0] > 5).nonzero()[:, 0]
        if len(index):
            h = h.index_add(0, index, self.expert(h[index]) * self.bonus)
        return self.head(h)


def test_parameters_that_only_some_samples_reach():
    torch.manual_seed(0)
    model = Routed()
    x = torch.rand(12, 2)
    x[[3, 8], 0] = 7.0
    double = Routed().double()
    double.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    rows = []
    for i in range(12):
        for c in range(2):
            grads = torch.autograd.grad(
                double(x[i : i + 1].double())[0, c], list(double.parameters()), allow_unused=True
            )
            pairs = zip(double.parameters(), grads, strict=True)
            rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in pairs]))
    G = torch.stack(rows).view(12, 2, -1).numpy()
    for check in (True, False):
        gram = compute_gram(model, {"x": x}, params="all", readout=lambda out, _: out, precision="exact", check=check)
        assert max(relative_error(gram.values, contracted(G, G, "trace"))) < 1e-9


def test_model_is_left_as_found():
    model = tiny_model("bert").train()
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    compute_gram(model, tiny_inputs(model, [3, 4], 5), params="trainable")
    assert model.training
    assert model.bert.encoder.layer[0].training
    assert not model.bert.embeddings.word_embeddings.weight.requires_grad
    assert model.classifier.weight.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_noise_covers_the_true_error():
    model = tiny_model("bert")
    inputs = tiny_inputs(model, [2 + i % 9 for i in range(40)], 12)
    exact = compute_gram(model, inputs, params="all", precision="exact")
    high = compute_gram(model, inputs, params="all", precision="high")
    true = np.linalg.norm(np.asarray(high.values) - exact.values, 2)
    assert true / 3 < high.noise < 3 * true
    assert exact.noise < 1e-9 * high.noise * 1e3


def test_one_sample_and_long_tail():
    model = tiny_model("llama")
    inputs = tiny_inputs(model, [5], 5)
    names = {name for name, _ in model.named_parameters()}
    G = gradients(model, inputs, names)
    gram = compute_gram(model, inputs, params="all", precision="exact")
    assert max(relative_error(gram.values, contracted(G, G, "trace"))) < 1e-9


def test_check_stops_a_wrong_sweep(monkeypatch):
    model = tiny_model("bert")
    inputs = tiny_inputs(model, LENGTHS, 12)
    right = run.contract

    def wrong(factors, strategy, total, root):
        if factors.name.endswith("layer.1.output.dense.weight"):
            for uses in factors.chunks:
                for use in uses:
                    use.d = use.d * 1.01
        right(factors, strategy, total, root)

    monkeypatch.setattr(run, "contract", wrong)
    with pytest.raises(
        CheckFailed,
        match=r"layer\.1\.output\.dense\.weight \(of Linear\): differs from plain autograd by .* between examples",
    ):
        compute_gram(model, inputs, params="all")


def test_non_finite_gradient_names_module_and_example():
    class Root(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)

        def forward(self, x):
            return self.last(torch.sqrt(self.first(x) * 0 + x))

    x = torch.rand(20, 2) + 0.5
    x[11] = 0.0  # √ has an infinite slope at 0
    with pytest.raises(NonFinite, match=r"first\.(weight|bias).* example 11"):
        compute_gram(Root(), {"x": x}, params="all", readout=lambda out, _: out)


def test_non_finite_output_names_the_example():
    model = tiny_model("bert")
    inputs = tiny_inputs(model, LENGTHS, 12)

    def bad(out, one):
        return out.logits / (one["attention_mask"].sum(1, keepdim=True) != 7)

    with pytest.raises(NonFinite, match="example 3"):
        compute_gram(model, inputs, params="all", readout=bad, check=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"contraction": "sum"}, "contraction: expected one of 'trace'"),
        ({"precision": "low"}, "precision: expected one of 'exact'"),
        ({"backend": "cuda"}, "backend: expected one of"),
        ({"readout": "logit"}, "readout: expected one of"),
        ({"readout": "margin"}, "expected 2 logits, got 3"),
        ({"readout": "loss"}, "inputs have no 'labels'"),
        ({"readout": lambda out, _: out.logits[0]}, r"expected a tensor of shape \(N="),
        ({"params": "nothing.*"}, "params 'nothing.*': matches no parameter"),
        ({"params": []}, "got an empty list"),
        ({"targets": np.zeros((3, 1))}, "targets: expected 7 rows"),
        ({"eval_targets": np.zeros((3, 1))}, "eval_targets: given without eval_inputs"),
        ({"out": "/no/such/folder/k.h5"}, "out: folder"),
        ({"comm": object()}, "comm: expected an mpi4py communicator or None, got object"),
    ],
)
def test_bad_arguments(arguments, message):
    model = tiny_model("bert")
    with pytest.raises(InputError, match=message):
        compute_gram(model, tiny_inputs(model, LENGTHS, 12), **{"params": "all", **arguments})


def test_bad_inputs():
    model = tiny_model("bert")
    inputs = tiny_inputs(model, LENGTHS, 12)
    for bad, message in [
        ({}, "expected a mapping"),
        ({"input_ids": [[1, 2]]}, "expected a tensor"),
        (inputs | {"attention_mask": inputs["attention_mask"][:3]}, "expected 7 samples"),
        ({k: v[:0] for k, v in inputs.items()}, "got N = 0"),
        (inputs | {"attention_mask": torch.zeros_like(inputs["attention_mask"])}, "attends to no token"),
        ({"inputs_embeds": torch.full((2, 3, 32), float("nan"))}, "not finite"),
    ]:
        with pytest.raises(InputError, match=message):
            compute_gram(model, bad, params="all")


def test_plan_says_what_the_run_does():
    model = tiny_model("bert")
    inputs = tiny_inputs(model, LENGTHS, 12)
    plan = plan_gram(model, inputs, params="all")
    gram = compute_gram(model, inputs, params="all")
    assert {r.parameter for r in plan.parameters} == {r.parameter for r in gram.plan.parameters}
    assert {r.parameter for r in plan.parameters} == {name for name, _ in model.named_parameters()}
    assert plan.flops > 0
    assert plan.peak_bytes > 0
    assert plan.seconds > 0
    assert {r.path for r in plan.parameters} == {"outer", "lookup", "diagonal"}


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_plan_knows_which_tokens_count_in_the_top_block(kind):
    model = tiny_model(kind)
    inputs = tiny_inputs(model, [12] * 6, 12)
    plan = plan_gram(model, inputs, params="all")
    gram = compute_gram(model, inputs, params="all", check=False)
    rows = {r.parameter: (r.strategy, r.tokens, r.flops) for r in plan.parameters}
    assert rows == {r.parameter: (r.strategy, r.tokens, r.flops) for r in gram.plan.parameters}
    assert {1, 12} <= {tokens for _, tokens, _ in rows.values()}  # one token at the top, all of them below
    width, blocks = model.config.hidden_size, model.config.num_hidden_layers
    assert plan.hidden_bytes == 6 * 12 * width * 4 * (blocks + plan.outputs)


def test_tokens_that_many_samples_share_are_summed_once(monkeypatch):
    model = tiny_model("bert")
    inputs = tiny_inputs(model, LENGTHS, 12)
    for arguments in ({}, {"contraction": "full"}, {"contraction": "per-output"}, {"transform": "asymmetric-sign"}):
        arguments |= {"params": ["*embeddings.weight"], "precision": "exact"}
        monkeypatch.undo()
        mixed = compute_gram(model, inputs, **arguments)
        for threshold in (0, 10**6):  # none, or all, as features
            monkeypatch.setattr(strategies, "_COMMON", threshold)
            assert max(relative_error(compute_gram(model, inputs, **arguments).values, mixed.values)) < 1e-12


def test_a_memory_limit_keeps_no_activations(monkeypatch):
    model = tiny_model("bert")
    inputs = tiny_inputs(model, LENGTHS, 12)
    budgets = []
    right = computing.sum_tiled
    monkeypatch.setattr(computing, "sum_tiled", lambda *a, **k: budgets.append(k["keep_bytes"]) or right(*a, **k))
    free, bounded = (compute_gram(model, inputs, params="all", precision="exact", memory_gib=m) for m in (None, 1.0))
    assert budgets == [computing.KEEP_BYTES, 0]
    assert max(relative_error(bounded.values, free.values)) < 1e-12


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("contraction", ["trace", "full", "per-output"])
def test_fast_is_as_far_off_as_it_says(kind, contraction):
    model = tiny_model(kind)
    inputs = tiny_inputs(model, [3, 9, 12, 5, 7, 1, 8, 10, 2, 6, 4, 11] * 2, 12)
    exact = compute_gram(model, inputs, params="all", contraction=contraction, precision="exact")
    fast = compute_gram(model, inputs, params="all", contraction=contraction, precision="fast")
    error = np.asarray(fast.values) - np.asarray(exact.values)
    true = max(np.linalg.norm(layer, 2) for layer in (error if error.ndim == 3 else error[None]))
    assert 0.3 * true < fast.noise < 3 * true
    assert 1e-4 < max(relative_error(fast.values, exact.values)) < 5e-2
    assert next(model.parameters()).dtype == torch.float32


def test_fast_under_transforms_and_adapters():
    model = with_lora(tiny_model("bert"), ["query", "value"], away_from_start=True)
    inputs = tiny_inputs(model, LENGTHS, 12)
    for transform in ("sgd", "sign", "asymmetric-sign"):
        exact = compute_gram(model, inputs, transform=transform, precision="exact")
        fast = compute_gram(model, inputs, transform=transform, precision="fast")
        assert max(relative_error(fast.values, exact.values)) < 5e-2
