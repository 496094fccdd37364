"""Numbers that do not depend on batches, tiles, strategies or memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ntkengine.gram import computing, layout, lookup, planning, run, strategies
from ntkengine.gram.engine import compute_gram
from ntkengine.gram.layout import Layout
from tests.brute import KINDS, contracted, gradients, relative_error, tiny_inputs, tiny_model

LENGTHS = [11, 3, 5, 7, 2, 9, 5]


CONTRACTIONS = ("trace", "full", "per-output", "sum-of-outputs")


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


@pytest.mark.parametrize("precision", ["exact", "high"])
def test_results_do_not_depend_on_threads(precision):
    model = tiny_model("bert")
    inputs = tiny_inputs(model, [40, 33, 2, 17] * 6, 40)  # products large enough for several threads
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(compute_gram(model, inputs, params="all", precision=precision))
    finally:
        torch.set_num_threads(before)
    scale = np.linalg.norm(found[0].values)
    for gram in found[1:]:
        error = np.linalg.norm(np.asarray(gram.values) - np.asarray(found[0].values))
        assert error <= (1e-12 * scale if precision == "exact" else 2 * max(gram.noise, found[0].noise))


def test_results_do_not_depend_on_tiles(monkeypatch):
    model = tiny_model("llama")
    inputs = tiny_inputs(model, LENGTHS, 12)
    reference = compute_gram(model, inputs, params="all", precision="exact", contraction="full")
    monkeypatch.setattr(strategies, "TILE_PARAMETERS", 96)
    monkeypatch.setattr(strategies, "COLUMNS", 7)
    monkeypatch.setattr(lookup, "_PAIR_BYTES", 1000)
    again = compute_gram(model, inputs, params="all", precision="exact", contraction="full")
    assert max(relative_error(again.values, reference.values)) < 1e-12


@pytest.mark.parametrize("kept", [0, 50_000], ids=["replayed", "some kept"])
def test_replayed_blocks_equal_kept_ones(monkeypatch, kept):
    # A budget for activations decides which microbatches recompute their blocks; numbers do not depend on it.
    monkeypatch.setattr(planning, "fit", lambda *_, **__: Layout(microbatch_tokens=20, keeps=True))
    for kind in KINDS:
        model = tiny_model(kind)
        inputs = tiny_inputs(model, LENGTHS, 12)
        reference = compute_gram(model, inputs, params="all", precision="exact", contraction="full")
        with monkeypatch.context() as patch:
            patch.setattr(layout, "KEEP_BYTES", kept)
            again = compute_gram(model, inputs, params="all", precision="exact", contraction="full")
        assert max(relative_error(again.values, reference.values)) < 1e-12


@pytest.mark.parametrize("strategy", ["ghost", "materialise"])
def test_strategies_agree(monkeypatch, strategy):
    model = tiny_model("bert")
    inputs = tiny_inputs(model, LENGTHS, 12)
    names = {name for name, _ in model.named_parameters()}
    G = gradients(model, inputs, names)

    def forced(kind, *args, **limits):
        return (strategy, 1.0) if kind in ("outer", "mixed") else strategies.choose(kind, *args, **limits)

    monkeypatch.setattr(run, "choose", forced)
    for contraction in CONTRACTIONS[:3]:
        gram = compute_gram(model, inputs, params="all", contraction=contraction, precision="exact")
        assert max(relative_error(gram.values, contracted(G, G, contraction))) < 1e-9
    assert strategy in {row.strategy for row in gram.plan.parameters}


def test_tokens_that_many_samples_share_are_summed_once(monkeypatch):
    model = tiny_model("bert")
    inputs = tiny_inputs(model, LENGTHS, 12)
    for arguments in ({}, {"contraction": "full"}, {"contraction": "per-output"}, {"transform": "asymmetric-sign"}):
        arguments |= {"params": ["*embeddings.weight"], "precision": "exact"}
        monkeypatch.undo()
        mixed = compute_gram(model, inputs, **arguments)
        for threshold in (0, 10**6):  # none, or all, as features
            monkeypatch.setattr(lookup, "_COMMON", threshold)
            assert max(relative_error(compute_gram(model, inputs, **arguments).values, mixed.values)) < 1e-12


def test_a_memory_limit_keeps_no_activations(monkeypatch):
    model = tiny_model("bert")
    inputs = tiny_inputs(model, LENGTHS, 12)
    budgets = []
    right = computing.sum_tiled
    monkeypatch.setattr(computing, "sum_tiled", lambda *a, **k: budgets.append(k["keep_bytes"]) or right(*a, **k))
    free, bounded = (compute_gram(model, inputs, params="all", precision="exact", memory_gib=m) for m in (None, 1.0))
    assert budgets == [layout.KEEP_BYTES, 0]
    assert max(relative_error(bounded.values, free.values)) < 1e-12
