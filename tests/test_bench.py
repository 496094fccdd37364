"""The benchmarks' harness: nothing wrong is timed, lines are whole, regressions are found, figures need only lines."""

from __future__ import annotations

import ast
import json
import subprocess
import time
from types import SimpleNamespace

import numpy as np
import pytest

from bench import compare, fresh, record, scaling, timing
from bench.__main__ import main
from bench.cases import CASES
from bench.fresh import ROOT


def line(seconds, name="landmarks", commit="abc1234", config="c0", device="cpu", **more):
    return {"name": name, "commit": commit, "config_hash": config, "device": device, "seconds": seconds, **more}


def written(path, *lines):
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    return str(path)


def test_every_case_has_a_main_that_takes_what_the_registry_says():
    for case in CASES.values():
        path = ROOT / "bench" / (case.module.replace(".", "/") + ".py")
        mains = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef) and n.name == "main"]
        assert len(mains) == 1, case.name
        assert len(mains[0].args.args) == bool(case.arguments), case.name


def test_list_names_every_case(capsys):
    assert main(["list"]) == 0
    assert [text.split()[0] for text in capsys.readouterr().out.splitlines()] == list(CASES)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["run", "landmarks", "nothing"], "no case 'nothing'"),
        (["run", "landmarks", "--", "7"], "takes no arguments, got 7"),
        (["run", "ranks", "spectrum", "--", "7"], "one case at a time"),
        (["run", "ranks", "--", "two"], "expected numbers of ranks, got two"),
        (["run", "spectrum", "--", "nothing"], "no section 'nothing'"),
        (["plot", "--", "7"], "belong to `run NAME`"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(given, said, capsys):
    assert main(given) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_case_whose_need_is_missing_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("bench.cases.find_spec", lambda _name: None)
    assert main(["run", "ranks"]) == 2
    assert "needs mpi, which is not here" in capsys.readouterr().err


def test_one_failing_case_does_not_lose_the_others(monkeypatch, capsys):
    started = []

    def run(command, check):
        started.append(command[-1])
        return SimpleNamespace(returncode=int(command[-1] == "landmarks"))

    monkeypatch.setattr(subprocess, "run", run)
    assert main(["run", "landmarks", "spectrum"]) == 1
    assert started == ["landmarks", "spectrum"]
    assert "failed: landmarks" in capsys.readouterr().err


def test_a_wrong_result_is_not_timed():
    calls = []

    def run():
        calls.append(1)
        return float("nan")

    with pytest.raises(timing.WrongError, match="nan, at most 1e-03"):
        timing.timed(run, judge=lambda found: timing.gate(found, 1e-3, "this"))
    assert len(calls) == 1
    with pytest.raises(ValueError, match="judge"):
        timing.timed(run, judge=print, warm=False)


def test_repeats_are_bounded_by_number_and_by_time():
    calls = []
    found = timing.timed(lambda: calls.append(1), repeats=4)
    assert (len(found.times), len(calls)) == (4, 5)
    slow = timing.timed(lambda: time.sleep(0.02), warm=False, repeats=50, most_s=0.05)
    assert 1 <= len(slow.times) <= 3
    assert slow.seconds >= 0.02


def test_percentiles_are_numpys():
    times = [3.0, 1.0, 2.0, 5.0, 9.0, 4.0]
    assert timing.percentiles(times) == pytest.approx(np.percentile(times, [20, 80]))
    values = timing.Timed(times).values("pass_s")
    assert values == {"pass_s": 3.5, "pass_s_p20": 2.0, "pass_s_p80": 5.0, "pass_s_runs": 6}
    assert timing.percentiles([2.0]) == (2.0, 2.0)


def test_in_turn_warms_up_and_alternates():
    order = []
    found = timing.in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3
    assert [len(x.times) for x in found.values()] == [2, 2]


def test_memory_counts_from_what_was_there():
    held = np.ones(1 << 23)  # 64 MiB that count for nothing
    with fresh.Memory() as memory:
        peak = np.ones(1 << 23)
        del peak
    assert 0.06 < memory.gib < 0.08
    assert held.sum() == 1 << 23


def test_a_fresh_process_answers_or_says_why_not():
    assert 0.001 < fresh.fresh("bench.fresh")["peak_gib"] < 1.0
    with pytest.raises(fresh.FailedError, match="No module named bench.nothing"):
        fresh.fresh("bench.nothing")
    with pytest.raises(fresh.FailedError, match="not done after 0.01 s"):
        fresh.fresh("bench.fresh", limit_s=0.01)


def test_only_rank_zero_records(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setenv("PMI_RANK", "1")
    told = record.record("this", {"N": 2}, {"seconds": 1.0})
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("PMI_RANK", "0")
    assert record.record("this", {"N": 2}, {"seconds": 1.0})["config_hash"] == told["config_hash"]
    record.record("this", {"N": 3}, {"seconds": 3.0})
    record.record("this", {"N": 2}, {"seconds": 2.0})
    assert [x["seconds"] for x in record.lines("this")] == [1.0, 3.0, 2.0]
    assert [x["seconds"] for x in record.latest("this")] == [2.0, 3.0]
    assert record.lines("that") == []


def test_lines_are_written_where_there_is_no_git(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert record.record("this", {"N": 2}, {"seconds": 1.0})["commit"] == ""
    assert len(record.lines("this")) == 1


@pytest.mark.parametrize(
    ("seconds", "spread", "status", "verdict"),
    [
        (1.3, (1.25, 1.35), 1, "regressed"),
        (1.3, (1.05, 1.35), 0, "same"),  # its interval begins within A's
        (1.14, (1.13, 1.15), 0, "same"),  # beyond A's, but by less than the tolerance
        (0.5, (0.4, 0.6), 0, "improved"),
    ],
)
def test_a_regression_is_one_beyond_the_noise(tmp_path, capsys, seconds, spread, status, verdict):
    a = written(tmp_path / "a.jsonl", line(1.0, seconds_p20=0.9, seconds_p80=1.1), {**line(9.0), "config_hash": "c1"})
    b = written(tmp_path / "b.jsonl", line(seconds, seconds_p20=spread[0], seconds_p80=spread[1]))
    assert main(["compare", a, b]) == status
    said = capsys.readouterr().out.splitlines()
    assert said[0].split()[:4] == [verdict, "landmarks", "c0", "seconds:"]
    assert len(said) == 2


def test_noise_spans_all_lines_of_a_side(tmp_path):
    a = written(tmp_path / "a.jsonl", line(1.0), line(1.4))
    b = written(tmp_path / "b.jsonl", line(1.45))
    assert main(["compare", a, b]) == 0
    assert main(["compare", a, b, "--tolerance", "0.01"]) == 1


def test_only_the_same_work_on_the_same_device_is_compared(tmp_path, capsys):
    a = written(tmp_path / "a.jsonl", line(1.0))
    b = written(tmp_path / "b.jsonl", line(9.0, device="another"), line(9.0, name="sketch"), line(9.0, config="c9"))
    assert main(["compare", a, b]) == 2
    assert "same name, configuration and device" in capsys.readouterr().err


def test_commits_are_compared_by_their_lines(tmp_path, monkeypatch, capsys):
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    changed = line(2.0, commit=head[:7] + "+")
    other = line(7.0, commit="0000000")
    written(tmp_path / "landmarks.jsonl", line(1.0, commit=head[:7]), changed, other)
    assert [x["seconds"] for x in compare.gather("HEAD")] == [1.0]
    assert [x["seconds"] for x in compare.gather(f"{head[:9]}+")] == [2.0]
    assert main(["compare", "HEAD", "HEAD+"]) == 1
    assert main(["compare", "HEAD", "nothing"]) == 2
    assert "nothing: expected a file of lines, a folder or a commit" in capsys.readouterr().err


def test_a_file_that_holds_something_else_is_refused(tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"name": "landmarks"}\n')
    assert main(["compare", str(bad), str(bad)]) == 2
    assert "bad.jsonl, line 1: expected a JSON object with" in capsys.readouterr().err


def test_the_scaling_figure_needs_only_lines(tmp_path, monkeypatch):
    for module in (record, scaling):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    assert not scaling.draw()
    shape = {"N": 8, "T": 4, "C": 1, "config": scaling.SMALL}
    both = {"seconds": 1.0, "planned_seconds": 2.0, "gib": 0.5, "planned_gib": 0.6, "parameters": 100}
    for study, varied in (("examples", "N"), ("tokens", "T"), ("parameters", "N"), ("outputs", "C")):
        for value in (2, 4):
            record.record("scaling", {"study": study, **shape, varied: value}, both)
    record.record("ranks", {**shape, "ranks": 2}, {"seconds": 1.0, "planned_seconds": 2.0})  # without memory
    assert scaling.draw()
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
