"""Where a run says its time went: measured parts that add up."""

from __future__ import annotations

import re
import time

import pytest

from ntkengine import store
from ntkengine.gram import check, computing, finer
from ntkengine.gram.engine import compute_gram
from ntkengine.report.timing import timing_table
from tests.brute import tiny_inputs, tiny_model
from tests.tiny import tiny_sentences

PAUSE_S = 0.3


@pytest.fixture
def slow(monkeypatch):
    """Return a call that makes a function take longer."""

    def delay(owner, name):
        quick = getattr(owner, name)

        def slowly(*args, **kwargs):
            time.sleep(PAUSE_S)
            return quick(*args, **kwargs)

        monkeypatch.setattr(owner, name, slowly)

    return delay


def computed(out, **more):
    model = tiny_model("bert", num_labels=2)
    return compute_gram(model, tiny_inputs(model, [5, 3, 4], 6), readout="margin", params="*.layer.*", out=out, **more)


def named(gram):
    table = timing_table(gram)
    return {row[0]: float(row[1].replace(",", "")) for row in table.rows}


@pytest.mark.parametrize(
    ("owner", "name", "part"),
    [
        (store, "write_gram", "writing"),
        (check.Check, "sweep", "checks and noise"),
        (finer, "estimate_noise", "checks and noise"),
        (computing, "planned", "probe and plan"),
    ],
)
def test_time_is_told_where_it_was_spent(tmp_path, slow, owner, name, part):
    slow(owner, name)
    told = named(computed(tmp_path / "k.h5"))
    assert told[part] >= 0.99 * PAUSE_S
    # None of the others has it too.
    assert sum(seconds for row, seconds in told.items() if row not in (part, "all")) < told["all"] - 0.98 * PAUSE_S


def test_held_out_heads_have_a_part(tmp_path):
    told = named(computed(tmp_path / "k.h5", extras=lambda: time.sleep(PAUSE_S)))
    assert told["held-out heads"] >= PAUSE_S * 0.99


def test_an_opened_gram_took_no_time(tmp_path):
    assert timing_table(computed(tmp_path / "k.h5")) is not None
    assert timing_table(computed(tmp_path / "k.h5")) is None
    assert timing_table(store.open_gram(tmp_path / "k.h5")) is None


def test_gram_ends_with_the_times(run, model_folder, tmp_path):
    data = tmp_path / "a.tsv"
    rows = [f"{text}\t{'ab'[i % 2]}\n" for i, text in enumerate(tiny_sentences(9, 0))]
    data.write_text("text\tlabel\n" + "".join(rows), encoding="utf-8")
    began = time.perf_counter()
    code, out, err = run("gram", "--model", model_folder, "--data", data, "--fit-head", "-o", tmp_path / "k.h5")
    spent = time.perf_counter() - began
    assert (code, err) == (0, "")
    lines = [re.split(r"\s{2,}", line.strip()) for line in out[out.index("\nTime") :].splitlines() if line.strip()]
    told = {line[0]: line[1:] for line in lines}
    assert told["part"] == ["time (s)", "share", "work", "rate"]
    for part in ("loading, tokens, head", "probe and plan", "passes", "contractions", "checks and noise", "writing"):
        assert part in told
    assert "GFLOP/s" in told["passes"][-1]
    assert "GFLOP/s" in told["contractions"][-1]
    assert "MB/s" in told["writing"][-1]
    assert float(told["all"][0]) <= spent
    parts = [row for name, row in told.items() if name not in ("Time", "part", "all") and len(row) > 1]
    assert sum(float(row[0]) for row in parts) == pytest.approx(float(told["all"][0]), rel=0.02)
    assert sum(float(row[1].rstrip("%")) for row in parts) == pytest.approx(100.0, abs=0.6)
