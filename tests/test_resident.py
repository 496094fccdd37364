"""Weights on their way: right, within their limit, read once for each direction."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ntkengine as ntk
from ntkengine.errors import InputError
from ntkengine.gram import computing, planning, room
from ntkengine.gram.fitting import GIB, bounds, fit
from ntkengine.gram.layout import Layout, Needs
from ntkengine.inputs import resident, streaming
from ntkengine.inputs.resident import RESIDENT, Resident
from ntkengine.inputs.weights import Entry, Held, entries
from tests.brute import relative_error, tiny_inputs, tiny_model

CPU = torch.device("cpu")
SIZE = 4 * 6 * 4  # bytes of each weight, in float32


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    return {f"w{i}": torch.randn(4, 6, generator=generator).bfloat16() for i in range(8)}


@pytest.fixture
def keys(weights, tmp_path):
    save_file(weights, tmp_path / "model.safetensors")
    found = entries(tmp_path.glob("*.safetensors"))
    return [(found[name], torch.float32, CPU) for name in weights]


@pytest.fixture
def reads(monkeypatch):
    """Weights read, whole or in rows, by name of the file's offset."""
    found = []
    fill = Entry._fill
    monkeypatch.setattr(Entry, "_fill", lambda self, *given: found.append(self.offset) or fill(self, *given))
    return found


@pytest.fixture
def ahead(monkeypatch):
    monkeypatch.setattr(resident, "brought_ahead", lambda _device: True)


def held(store):
    kept = [*store._settled.values(), *store._kept.values()]
    return sum(x.numel() * x.itemsize for x in kept) + SIZE * len(store._coming)


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("room", [2, 3, 4, 5])
def test_the_next_block_comes_while_one_works(weights, keys, reads, room):
    store, values = Resident(room * SIZE), list(weights.values())
    for first in range(0, 8, 2):
        now, then = keys[first : first + 2], keys[first + 2 : first + 4]
        store.expect(now, then)
        assert held(store) <= room * SIZE
        assert sum(key in store._coming for key in then) == min(len(then), room - 2)
        for _ in range(3):  # microbatches
            for key, value in zip(now, values[first : first + 2], strict=True):
                assert torch.equal(store.bring(*key), value.float())
                assert held(store) <= room * SIZE
    assert sorted(reads) == sorted(key[0].offset for key in keys)  # each once


@pytest.mark.usefixtures("ahead")
def test_what_is_no_longer_expected_does_not_stay(keys):
    store = Resident(4 * SIZE)
    store.expect(keys[:1], keys[1:3])
    store.expect(keys[4:5], keys[5:6])
    assert list(store._coming) == keys[5:6]
    store.clear()
    assert not held(store)


@pytest.mark.usefixtures("ahead")
def test_weights_on_their_device_are_not_brought_ahead_and_large_ones_do_not_stay(weights, keys):
    here = (Held(next(iter(weights.values()))), torch.float64, CPU)
    store = Resident(SIZE - 1)
    store.expect([], [here, keys[0]])
    assert not store._coming
    assert torch.equal(store.bring(*keys[0]), weights["w0"].float())
    assert not held(store)


@pytest.mark.usefixtures("ahead")
def test_a_file_that_ends_is_refused_where_its_weight_is_needed(keys, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    store = Resident()
    store.expect(keys[:1], keys[-1:])
    with pytest.raises(InputError, match="was changed after the model was loaded"):
        store.bring(*keys[-1])


@pytest.mark.parametrize(("room", "turn", "again"), [(6, 2, 4), (6, 1, 3), (3, 3, 8), (3, None, 8), (8, 2, 0)])
def test_passes_over_and_over_read_only_what_does_not_stay(weights, keys, reads, room, turn, again):
    store = Resident(room * SIZE, None if turn is None else turn * SIZE // 4)
    for count in (8, again, again):
        reads.clear()
        for key, value in zip(keys, weights.values(), strict=True):
            assert torch.equal(store.bring(*key), value.float())
            assert held(store) <= room * SIZE
        assert len(reads) == count
    for first in range(0, 8, turn or room):  # a block's are used several times, and do not make room for each other
        block = keys[first : first + (turn or room)]
        reads.clear()
        for _ in range(3):
            for key in block:
                store.bring(*key)
        assert len(reads) <= len(block)
    for dtype in (torch.float64, torch.float32):  # weights of another dtype take the place of those that stayed
        for _ in range(3):
            reads.clear()
            for key, value in zip(keys, weights.values(), strict=True):
                assert torch.equal(store.bring(key[0], dtype, CPU), value.to(dtype))
                assert held(store) <= room * SIZE
    assert len(reads) == again


def test_a_smaller_limit_lets_go_of_what_stayed(weights, keys, reads):
    store = Resident(7 * SIZE, 2 * SIZE // 4)
    for _ in range(2):
        for key in keys:
            store.bring(*key)
    store.resize(4 * SIZE, 2 * SIZE // 4)
    assert held(store) <= 4 * SIZE
    for count in (8, 6, 6):
        reads.clear()
        for key, value in zip(keys, weights.values(), strict=True):
            assert torch.equal(store.bring(*key), value.float())
            assert held(store) <= 4 * SIZE
        assert len(reads) <= count
    store.limit = 3 * SIZE  # unsaid: seen at the next weight that is read
    for key in keys:
        store.bring(*key)
    assert held(store) <= 3 * SIZE


def test_weights_of_a_file_that_was_written_again_are_never_taken_for_the_new_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "STREAMED", 256)
    inputs, first, second = None, tiny_model("llama", seed=0), tiny_model("llama", seed=1)
    first.save_pretrained(tmp_path)
    old = ntk.load_model(tmp_path, num_labels=3, stream=True)
    inputs = tiny_inputs(old, [12] * 4, 12)
    with torch.no_grad():
        old(**inputs)  # by hand, outside of a job: weights stay
    second.save_pretrained(tmp_path)
    new = ntk.load_model(tmp_path, num_labels=3, stream=True)
    with torch.no_grad():
        assert torch.equal(new(**inputs).logits, second(**inputs).logits)
    with pytest.raises(InputError, match="was changed after the model was loaded from it; load it again"):
        ntk.compute_gram(old, inputs, params="all")


@pytest.mark.usefixtures("ahead")
def test_what_stays_is_not_brought_ahead(keys, reads):
    store = Resident(6 * SIZE, 2 * SIZE // 4)
    for _ in range(3):
        for first in range(0, 8, 1):
            store.expect(keys[first : first + 1], keys[first + 1 : first + 2])
            store.bring(*keys[first])
            assert held(store) <= 6 * SIZE
    assert len(reads) <= 8 + 2 * 4


@pytest.mark.parametrize("bus", [False, True])
def test_a_sweep_back_reads_each_weight_once(tmp_path, monkeypatch, reads, bus):
    monkeypatch.setattr(streaming, "STREAMED", 256)
    monkeypatch.setattr(resident, "brought_ahead", lambda _device: bus)
    loaded = tiny_model("llama")
    loaded.save_pretrained(tmp_path)
    model = ntk.load_model(tmp_path, num_labels=3, stream=True)
    inputs = tiny_inputs(model, [12] * 8, 12)
    blocks = {e.offset for b in model.model.layers for p in b.parameters() if (e := streaming.entry_of(p)) is not None}
    largest = max(sum(p.numel() * 4 for p in block.parameters()) for block in model.model.layers)
    limit = (2 if bus else 1) * largest
    counts = {}

    def planned(*given, planned=planning.planned, **more):
        structure, plan, _, samples, sketches = planned(*given, **more)
        samples = type(samples)(samples.groups, microbatch=2)  # four microbatches
        reads.clear()
        RESIDENT.clear()
        RESIDENT.limit, RESIDENT.turn = limit, None
        return structure, plan, Layout(resident_bytes=limit), samples, sketches

    monkeypatch.setattr(computing, "planned", planned)
    gram = ntk.compute_gram(model, inputs, params="model.layers.*", check=False)
    counts = {offset: reads.count(offset) for offset in blocks}
    assert set(counts.values()) <= {4, 5}  # four passes forward, one back, of which the last block's came last
    assert max(relative_error(gram.values, ntk.compute_gram(loaded, inputs, params="model.layers.*").values)) < 1e-6


def test_streamed_weights_take_what_a_budget_leaves(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "STREAMED", 256)
    loaded = tiny_model("llama")
    loaded.save_pretrained(tmp_path)
    model = ntk.load_model(tmp_path, num_labels=3, stream=True)
    assert streaming.turn_entries(model, CPU) == max(streaming.streamed_entries(block) for block in model.model.layers)
    total, turn = 400_000_000, 10_000_000
    needs = Needs(10, 100, 800.0, 0.0, 400.0, [{"a": 1e4}], 1e4, 10.0, float(total), 4)
    found = []
    for budget in (1.5e8, 2e8, 3e8, 1e9):
        layout = fit(needs, budget / GIB, spill="disk", base=bounds(budget / GIB, 4, turn=4 * turn))
        assert needs.peak(layout) <= budget
        found.append(layout.resident_bytes)
    assert found == sorted(found)
    assert 4 * turn < found[0] < total == found[-1]
    gpu = replace(bounds(None, 4, turn=4 * turn), resident_bytes=4 * turn, keeps=False)
    room = (needs.peak(gpu) + 1e8 + 2**26) / 0.8
    assert fit(needs, None, spill="host", base=gpu).resident_bytes == total
    assert 4 * turn < fit(needs, None, spill="host", base=gpu, room=room).resident_bytes <= total
    assert fit(needs, None, spill="disk", base=replace(gpu, keeps=True), room=1e9).resident_bytes == 4 * turn


def test_a_job_that_would_not_fit_in_what_is_free_is_laid_out_to_fit(monkeypatch, caplog):
    model = tiny_model("bert")
    inputs = tiny_inputs(model, [12] * 40, 12)
    plain = ntk.compute_gram(model, inputs, params="all")
    wanted = plain.plan.peak_bytes
    assert plain.plan.layout["doubles"]
    for share, told in ((0.6, "laid out as with memory_gib="), (1e-6, "it may not end")):
        free = share * wanted
        monkeypatch.setattr(computing, "free_bytes", lambda *_, free=free: free)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            gram = ntk.compute_gram(model, inputs, params="all")
        assert told in caplog.text
        assert gram.plan.layout["doubles"] == (share < 0.1)
        assert (gram.plan.peak_bytes <= free) == (share > 0.1)
        assert max(relative_error(gram.values, plain.values)) < 1e-6
        np.testing.assert_allclose(gram.noise, plain.noise, rtol=2.0)


def test_free_memory_is_what_system_and_groups_leave(tmp_path, monkeypatch):
    here = torch.device("cpu")
    assert 0 < room.free_bytes(here) < 1e15
    for name in ("_MEMINFO", "_SELF", "_GROUPS"):
        monkeypatch.setattr(room, name, tmp_path / name)
    assert room.free_bytes(here) == float("inf")  # a system that tells nothing
    (tmp_path / "_MEMINFO").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\nHugePages_Total: 0\n")
    assert room.free_bytes(here) == 8000 * 1024
    (tmp_path / "_SELF").write_text("1:cpu:/x\n0::/job/step\n")
    job, step = tmp_path / "_GROUPS/job", tmp_path / "_GROUPS/job/step"
    step.mkdir(parents=True)
    for folder, limit, used in ((job, "5000000", "1000000"), (step, "max", "900000")):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text(used)
        (folder / "memory.stat").write_text("anon 7\ninactive_file 300000\nactive_file 100000\n")
    assert room.free_bytes(here) == 4_400_000
    (tmp_path / "_SELF").write_text("5:memory,other:/old\n0::/\n")
    old = tmp_path / "_GROUPS/memory/old"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("2000000")
    (old / "memory.usage_in_bytes").write_text("500000")
    (old / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 250000\n")
    assert room.free_bytes(here) == 1_750_000

    class Two:
        near = 2

    assert room.free_bytes(here, Two()) == 875_000
