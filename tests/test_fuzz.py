"""Random module trees: every Gram equals brute force, or is refused by name; never silently wrong."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from ntkengine.errors import CheckFailed, InputError
from ntkengine.gram.engine import compute_gram
from tests.brute import contracted, gradients, relative_error

D, WORDS = 4, 11
DRAWS = 500
refused: list[str] = []


class Scale(nn.Module):
    """A raw parameter, used outside any leaf."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(D))
        self.table = nn.ParameterList([nn.Parameter(torch.randn(D, D) / 2)])

    def forward(self, h):
        return h * self.scale + h @ self.table[0]


class Convolution(nn.Module):
    def __init__(self, groups):
        super().__init__()
        self.conv = nn.Conv1d(D, D, 3, padding=1, groups=groups)

    def forward(self, h):
        return self.conv(h.transpose(1, 2)).transpose(1, 2)


class Groups(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.norm = nn.GroupNorm(2, D) if kind == "group" else nn.BatchNorm1d(D)

    def forward(self, h):
        return self.norm(h.transpose(1, 2)).transpose(1, 2)


class Positions(nn.Module):
    """A table looked up without a sample axis, or with one."""

    def __init__(self, batched):
        super().__init__()
        self.table, self.batched = nn.Embedding(32, D), batched

    def forward(self, h):
        ids = torch.arange(h.shape[1])
        return h + self.table(ids.expand(len(h), -1) if self.batched else ids)


class Rows(nn.Module):
    """Samples and tokens folded into one axis around a module."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, h):
        return self.inner(h.reshape(1, -1, D)).reshape(h.shape)


class Experts(nn.Module):
    """Rows routed to one of two linears."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(D, D) for _ in range(2)])

    def forward(self, h):
        rows = h.reshape(-1, D)
        out = torch.zeros_like(rows)
        chosen = (rows[:, 0] > 0).long()
        for i, expert in enumerate(self.experts):
            index = (chosen == i).nonzero()[:, 0]
            out[index] = expert(rows[index])
        return out.reshape(h.shape)


class Fused(nn.Module):
    """A three-dimensional weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, D, D) / 2)

    def forward(self, h):
        return torch.einsum("ntd,edk->ntk", torch.tanh(h), self.weight)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, h):
        return torch.softmax(self.query(h) @ self.key(h).transpose(1, 2), -1) @ h


class Transposed(nn.Module):
    """A linear's weight, used as it is and transposed."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, h):
        return nn.functional.linear(torch.tanh(self.linear(h)), self.linear.weight.T)


class Tied(nn.Module):
    """Two modules that hold one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D, bias=False)
        self.second.weight = self.first.weight

    def forward(self, h):
        return self.second(torch.tanh(self.first(h)))


class Sum(nn.Module):
    """Branches, their sum, and the input."""

    def __init__(self, branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, h):
        out = h.clone()
        for branch in self.branches:
            out += branch(h)  # in place
        return out


class Twice(nn.Module):
    """One module called twice."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, h):
        return self.inner(torch.tanh(self.inner(h)))


class Stack(nn.Module):
    """Blocks of one shape, as in a transformer; the last may be the first again."""

    def __init__(self, blocks, shared):
        super().__init__()
        self.layers = nn.ModuleList([*blocks, blocks[0]] if shared else blocks)

    def forward(self, h):
        for layer in self.layers:
            h = layer(h)
        return h


class Model(nn.Module):
    """Tokens or vectors → body → pooled → head."""

    def __init__(self, body, *, tokens, pool, tied, C):
        super().__init__()
        self.embed = nn.Embedding(WORDS, D, padding_idx=0) if tokens else nn.Linear(D, D)
        self.body, self.pool = body, pool
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(D, WORDS if tied else C, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight
        self.C = C

    def forward(self, x):
        h = self.body(self.embed(x))
        h = {"mean": lambda: h.mean(1), "first": lambda: h[:, 0], "last": lambda: h[:, -1]}[self.pool]()
        return self.head(torch.tanh(h))[:, : self.C]


LEAVES = {
    "linear": lambda: nn.Linear(D, D),
    "bare": lambda: nn.Linear(D, D, bias=False),
    "layer": lambda: nn.LayerNorm(D),
    "rms": lambda: nn.RMSNorm(D),
    "group": lambda: Groups("group"),
    "batch": lambda: Groups("batch"),
    "conv": lambda: Convolution(1),
    "depthwise": lambda: Convolution(D),
    "scale": Scale,
    "fused": Fused,
    "positions": lambda: Positions(False),
    "own positions": lambda: Positions(True),
    "experts": Experts,
    "attention": Attention,
    "transposed": Transposed,
    "tied": Tied,
    "tanh": nn.Tanh,
    "prelu": nn.PReLU,
    "bilinear": lambda: nn.Sequential(nn.Linear(D, D), nn.GLU(), nn.Linear(D // 2, D)),
}
leaf = st.sampled_from(sorted(LEAVES)).map(lambda name: ("leaf", name))
trees = st.recursive(
    leaf,
    lambda inner: st.one_of(
        st.tuples(st.just("chain"), st.lists(inner, min_size=1, max_size=3)),
        st.tuples(st.just("sum"), st.lists(inner, min_size=1, max_size=2)),
        st.tuples(st.just("twice"), inner),
        st.tuples(st.just("rows"), inner),
        st.tuples(st.just("stack"), inner, st.integers(2, 3), st.booleans()),
    ),
    max_leaves=5,
)


def build(tree) -> nn.Module:
    kind, inner = tree[0], tree[1]
    if kind == "leaf":
        return LEAVES[inner]()
    if kind == "chain":
        return nn.Sequential(*map(build, inner))
    if kind == "sum":
        return Sum([build(t) for t in inner])
    if kind == "stack":
        return Stack([Sum([build(inner)]) for _ in range(tree[2])], tree[3])
    return {"twice": Twice, "rows": Rows}[kind](build(inner))


@settings(max_examples=DRAWS, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    tree=trees,
    tokens=st.booleans(),
    tied=st.booleans(),
    pool=st.sampled_from(["mean", "first", "last"]),
    C=st.integers(1, 3),
    n=st.integers(1, 5),
    T=st.integers(1, 5),
    contraction=st.sampled_from(["trace", "full", "per-output"]),
    seed=st.integers(0, 2**16),
)
def test_exact_or_refused(tree, tokens, tied, pool, C, n, T, contraction, seed):
    torch.manual_seed(seed)
    model = Model(build(tree), tokens=tokens, pool=pool, tied=tokens and tied, C=C).double().eval()
    x = torch.randint(0, WORDS, (n, T)) if tokens else torch.randn(n, T, D).double()
    names = {name for name, _ in model.named_parameters()}
    G = gradients(model, {"x": x}, names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            gram = compute_gram(model, {"x": x}, params="all", precision="exact", contraction=contraction)
        except (CheckFailed, InputError) as error:
            refused.append(f"{tree}: {error}")
            return
    truth = contracted(G, G, contraction)
    if not truth.any():  # nothing but padding: no gradient at all
        assert not gram.values.any()
    else:
        assert max(relative_error(gram.values, truth)) < 1e-9
    assert {row.parameter for row in gram.plan.parameters} | set(gram.plan.unused) == names


def test_hardly_anything_was_refused():
    if not refused:
        return
    print("\n".join(refused))
    assert len(refused) <= DRAWS // 20, f"{len(refused)} of {DRAWS} refused, such as {refused[0]}"


@pytest.mark.parametrize("name", sorted(LEAVES))
def test_every_kind_of_module(name):
    torch.manual_seed(0)
    model = Model(
        Stack([Sum([LEAVES[name]()]), Sum([LEAVES[name]()])], False), tokens=True, pool="mean", tied=True, C=2
    )
    model = model.double().eval()
    x = torch.randint(0, WORDS, (6, 5))
    G = gradients(model, {"x": x}, {n for n, _ in model.named_parameters()})
    gram = compute_gram(model, {"x": x}, params="all", precision="exact", contraction="full")
    assert max(relative_error(gram.values, contracted(G, G, "full"))) < 1e-9
