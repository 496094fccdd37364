"""What only a few examples do is found by running more of them again: padding read, neighbours felt, rows exchanged."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from torch import nn

import ntkengine as ntk
from ntkengine.errors import CheckFailed, InputError
from ntkengine.gram import anew
from tests.brute import contracted, gradients, relative_error, tiny_inputs, tiny_model, with_lora


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def odd(self, x):
        return x[:, 0] > 0.3  # a third of the examples


class Capacity(Base):
    """An expert has room for two rows of a batch."""

    def forward(self, x):
        h = torch.tanh(self.a(x))
        served = self.odd(x) & (self.odd(x).int().cumsum(0) <= 2)
        return self.c(torch.where(served[:, None], torch.tanh(self.b(h)), h))


class Sorted(Base):
    """Odd rows go through a layer in sorted order and are put back: f of each is its own, their rows are not."""

    def forward(self, x):
        h = torch.tanh(self.a(x))
        i = self.odd(x).nonzero()[:, 0]
        order = torch.arange(len(x))
        order[i] = i[torch.argsort(x[i, 1])]
        return self.c(torch.tanh(self.b(h[order]))[torch.argsort(order)])


def drawn(n=400):
    return {"x": torch.randn(n, 6, generator=torch.Generator().manual_seed(1))}


@pytest.fixture
def blind(monkeypatch):
    """Let the trials before the sweep, the check and the noise see nothing: what is tested is alone."""
    monkeypatch.setattr("ntkengine.gram.check.Check.sweep", lambda _: None)
    monkeypatch.setattr("ntkengine.gram.check.Check.entries", lambda *_: None)
    monkeypatch.setattr("ntkengine.gram.noise.LIMIT", dict.fromkeys(("exact", "high", "fast"), np.inf))
    monkeypatch.setattr("ntkengine.gram.finer.LIMIT", dict.fromkeys(("exact", "high", "fast"), np.inf))


@pytest.mark.parametrize("precision", ["high", "exact"])
@pytest.mark.parametrize("seed", [1, 2])
def test_examples_that_feel_others_are_found(blind, precision, seed):
    with pytest.raises(CheckFailed, match="depend"):
        ntk.compute_gram(Capacity(), drawn(), params="all", seed=seed, precision=precision)


@pytest.mark.parametrize("contraction", ["trace", "full", "per-output", "sum-of-outputs"])
def test_rows_that_are_exchanged_are_found(blind, contraction):
    with pytest.raises(CheckFailed, match=r"vᵀKv is .* by plain autograd and .* in the Gram|depends on the batch"):
        ntk.compute_gram(Sorted(), drawn(), params="all", contraction=contraction)


def test_rows_exchanged_among_eval_examples_or_second_inputs_are_found(blind):
    calm = {"x": drawn(60)["x"].clone()}
    calm["x"][:, 0] = 0.0
    for second in ({"eval_inputs": drawn(60)}, {"inputs2": drawn(60)}):
        with pytest.raises(CheckFailed, match=r"vᵀKv is"):
            ntk.compute_gram(Sorted(), calm, params="all", seed=1, **second)


@pytest.mark.parametrize("n", [9, 20, 24, 60])
@pytest.mark.parametrize("options", [{"transform": "sign"}, {}, {"memory_gib": 0.2, "transform": "sign"}])
def test_few_examples_do_not_run_in_the_batches_of_the_sweep_again(blind, n, options):
    with pytest.raises(CheckFailed, match="depend"):
        ntk.compute_gram(Capacity(), drawn(n), params="all", **options)


@pytest.mark.parametrize("contraction", ["trace", "full", "per-output", "sum-of-outputs"])
@pytest.mark.parametrize("second", [None, "eval_inputs", "inputs2"])
def test_it_agrees_with_what_is_right(monkeypatch, contraction, second):
    seen = []
    compare = anew._compare_products
    monkeypatch.setattr(anew, "_compare_products", lambda *given: seen.append(compare(*given)))
    monkeypatch.setattr(anew, "agreement", lambda _: 2e-6)  # far below what it allows
    model = with_lora(tiny_model("bert", 2), ["query", "value"], away_from_start=True)
    inputs, more = tiny_inputs(model, [3, 7, 5, 7, 2, 4, 6, 6], 9), tiny_inputs(model, [4, 6, 2], 7)
    given = {} if second is None else {second: more}
    for params in ("trainable", "all"):
        gram = ntk.compute_gram(model, inputs, params=params, contraction=contraction, **given)
        assert gram.meta["checked"]
    scale = {n: torch.rand(p.shape, generator=torch.Generator().manual_seed(3)) + 0.1
             for n, p in model.named_parameters() if p.requires_grad}  # fmt: skip
    ntk.compute_gram(model, inputs, contraction=contraction, transform=ntk.Preconditioner(scale), **given)
    assert len(seen) == 3


def test_whole_gradients_that_do_not_fit_are_taken_in_parts_or_not_at_all(monkeypatch):
    seen = []
    pulled = anew._pulled
    monkeypatch.setattr(anew, "_pulled", lambda *given: seen.append(list(given[3])) or pulled(*given))
    monkeypatch.setattr(anew, "agreement", lambda _: 2e-6)
    model, inputs = Base(), {"x": torch.randn(9, 6)}
    model.forward = lambda x: model.c(torch.tanh(model.b(torch.tanh(model.a(x)))))
    names = [n for n, _ in model.named_parameters()]
    grouped = anew.grouped
    for limit, expected in ((60, [["a.weight", "a.bias"], ["b.weight"], ["b.bias", "c.weight", "c.bias"]]), (8, [[]])):
        monkeypatch.setattr(anew, "grouped", lambda entries, _, limit=limit: grouped(entries, limit))
        seen.clear()
        ntk.compute_gram(model, inputs, params="all")
        assert seen == expected
    assert {n for part in [["a.weight", "a.bias"], ["b.weight"], ["b.bias", "c.weight", "c.bias"]] for n in part} == {
        *names
    }


class ReadsPadding(nn.Module):
    """One in four examples, by its first token, reads its padding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.out = nn.Embedding(40, 8), nn.Linear(8, 2)

    def forward(self, input_ids, attention_mask):
        h = torch.tanh(self.table(input_ids))
        mask = attention_mask[..., None].to(h.dtype)
        mask = torch.where((input_ids[:, :1, None] % 4) == 0, torch.ones_like(mask), mask)
        return self.out((h * mask).sum(1))


@pytest.mark.parametrize("seed", range(6))
def test_padding_that_some_examples_read_stays_or_is_refused(seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 40, (40, 12), generator=generator)
    mask = (torch.arange(12) < torch.where(torch.arange(40) % 2 == 0, 5, 9)[:, None]).long()
    model, inputs = ReadsPadding(), {"input_ids": ids * mask, "attention_mask": mask}
    found = []
    with contextlib.suppress(CheckFailed):
        found.append(ntk.compute_gram(model, inputs, params="all"))
    if found:
        G = gradients(model, inputs, [n for n, _ in model.named_parameters()])
        assert max(relative_error(found[0].values, contracted(G, G, "trace"))) < 1e-5


class Caching(nn.Module):
    """Keeps what its bias gives, in eval mode, for every later call."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.c, self.bias = nn.Linear(6, 8), nn.Linear(8, 2), nn.Parameter(torch.randn(8))
        self.kept = {} if kind is dict else None
        self.constant = torch.ones(8)  # which is needed, and from no parameter

    def forward(self, x):
        if isinstance(self.kept, dict):
            if "b" not in self.kept:
                self.kept["b"] = 2 * self.bias
            b = self.kept["b"]
        else:
            if self.kept is None:
                self.kept = 2 * self.bias
            b = self.kept
        return self.c(torch.tanh(self.a(x) * self.constant + b))


@pytest.mark.parametrize("kind", [dict, None])
@pytest.mark.parametrize("before", [False, True])
def test_a_cache_filled_before_hides_no_parameter(kind, before):
    model = Caching(kind).eval()
    if before:
        with torch.no_grad():
            model(drawn(3)["x"])
    held, constant = model.kept["b"] if kind is dict and before else model.kept, model.constant
    with pytest.raises(InputError, match="kept keeps what one call computed from the parameters"):
        ntk.compute_gram(model, drawn(9), params="all")
    assert (model.kept["b"] if kind is dict and before else model.kept) is held or model.kept == held
    assert model.constant is constant


class Square(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Casting(nn.Module):
    def __init__(self, mapped):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.mapped = nn.Linear(6, 8), nn.Linear(8, 2), mapped

    def forward(self, x):
        h = torch.softmax(self.a(x).float(), -1).to(x.dtype)
        return self.b(torch.vmap(Square.apply)(h) if self.mapped else h * h)


def test_exact_is_exact_where_a_function_is_mapped():
    x = drawn(7)
    plain, mapped = (ntk.compute_gram(Casting(m), x, params="all", precision="exact") for m in (False, True))
    assert max(relative_error(mapped.values, plain.values)) < 1e-14
    assert mapped.noise < 1e-13 * np.linalg.norm(mapped.values, 2)


class Refusing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        raise AssertionError("only in train mode")


def test_a_backward_pass_that_raises_is_one_line():
    model = Base()
    model.forward = lambda x: model.c(Refusing.apply(model.a(x)))
    message = "model: Base cannot be run in parts and backwards: AssertionError: only in train mode"
    with pytest.raises(InputError, match=message):
        ntk.compute_gram(model, drawn(9), params="all")


def test_padding_that_changes_f_is_told(caplog):
    ids = torch.randint(1, 40, (12, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) < (2 + torch.arange(12) % 6)[:, None]).long()
    model = ReadsPadding()
    inputs = {"input_ids": torch.where(torch.arange(9) == 0, 4, ids * mask), "attention_mask": mask}
    ntk.compute_gram(model, inputs, params="all")
    assert "inputs: padding changes f, by a relative" in caplog.text
