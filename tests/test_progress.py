"""Progress as a terminal and as a log see it."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import time

import numpy as np
import pytest

import ntkengine as ntk
from ntkengine.report import progress

JOB = """
import sys, time
from ntkengine.console import showing_progress
from ntkengine.report import progress
if len(sys.argv) > 1:
    progress.show_progress.__wrapped__.__defaults__ = (None, float(sys.argv[1]), "GFLOP")
with showing_progress() as tell:
    for i in range(13):
        if tell is not None:
            tell(i * 1e9, 12e9, f"layer {i}")
        time.sleep(0.1)
print("result")
"""


def start(*arguments, error, **environment):
    known = {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "OMPI", "NO_COLOR"))}
    command = [sys.executable, "-c", JOB, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=error, env=known | environment)


def on_terminal(**environment):
    """Return what a job writes to a terminal, and its standard output."""
    ours, theirs = pty.openpty()
    job = start(error=theirs, **environment)
    os.close(theirs)
    seen = b""
    while True:
        try:
            more = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not more:
            break
        seen += more
    os.close(ours)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 0
    return seen.decode(), out.decode()


def in_pipe(every_s, **environment):
    out, seen = start(str(every_s), error=subprocess.PIPE, **environment).communicate(timeout=60)
    return seen.decode(), out.decode()


def test_a_terminal_gets_a_bar_with_rate_and_time_left():
    seen, out = on_terminal(TERM="xterm-256color", COLUMNS="100")
    assert out == "result\n"
    assert "\x1b[" in seen
    assert re.search(r"layer \d+", seen)
    assert re.search(r"\d GFLOP/s \d s left", seen)
    assert re.search(r"\d+%", seen)


def test_no_color_leaves_the_bar_and_takes_the_colours():
    seen, _ = on_terminal(TERM="xterm-256color", NO_COLOR="1", COLUMNS="100")
    assert "GFLOP/s" in seen
    assert not re.search(r"\x1b\[[\d;]*m", seen)


def test_a_dumb_terminal_gets_lines():
    seen, _ = on_terminal(TERM="dumb")
    assert "\x1b" not in seen


def test_a_pipe_gets_a_plain_line_now_and_then_and_one_at_the_end():
    seen, out = in_pipe(0.35)
    assert out == "result\n"
    assert "\r" not in seen
    assert "\x1b" not in seen
    *lines, last = seen.splitlines()
    assert 1 <= len(lines) <= 4
    assert all(re.fullmatch(r" *\d+%  layer \d+  [\d.]+ GFLOP/s, \d s left", line) for line in lines), lines
    assert re.fullmatch(r"done after \d s", last)


def test_a_short_job_is_silent_in_a_pipe():
    assert in_pipe(60.0) == ("", "result\n")


def test_only_the_first_rank_speaks():
    assert in_pipe(0.2, PMI_RANK="1", PMI_SIZE="2")[0] == ""
    assert in_pipe(0.2, PMI_RANK="0", PMI_SIZE="2")[0] != ""


def test_lines_are_seldom_whatever_is_reported(monkeypatch):
    clock = iter(np.arange(0.0, 1000.0, 6.0))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(clock)))
    stream = io.StringIO()
    with ntk.show_progress(stream, every_s=10.0) as report:
        report(0.0, 1.0, "reading")
        report(0.0, 1.0, "loading the model")
        for i in range(8):
            report(i * 1e10, 8e10, f"layer {i}")
    *lines, last = stream.getvalue().splitlines()
    # The clock ticks 6 s a look: at least 10 s between lines, and no rate before anything is done.
    assert lines[0] == "loading the model"
    assert 4 <= len(lines) <= 9
    sized = [line for line in lines if line != "loading the model"]
    assert all(re.fullmatch(r" *\d+%  layer \d  [\d.]+ GFLOP/s, [\d min]+ s left", line) for line in sized[1:]), lines
    assert re.fullmatch(r"done after \d min \d\d s", last)


def test_a_job_that_is_refused_says_only_why(monkeypatch):
    clock = iter(np.arange(0.0, 1000.0, 6.0))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(clock)))
    stream = io.StringIO()

    def refused():
        with progress.show_progress(stream, every_s=20.0) as report:
            report(0.0, 1.0, "reading")
            for _ in range(9):  # time passes
                next(clock)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        refused()
    assert stream.getvalue() == ""


def test_what_is_counted_is_named():
    stream = io.StringIO()
    with progress.show_progress(stream, every_s=0.0, unit="step") as report:
        report(0.0, 30.0, "training")
        progress.time.sleep(0.06)
        report(3.0, 30.0, "training")
    assert re.search(r" 10%  training  \d+ step/s, \d s left", stream.getvalue())
    # A new run of numbers starts anew: a resumed job is not credited with what it found done.
    rate = progress._Rate("GFLOP")
    assert rate(9e9, 10e9) == ("", "")


@pytest.mark.parametrize(("seconds", "shown"), [(0.2, "0 s"), (59.4, "59 s"), (61, "1 min 01 s"), (7500, "2 h 05 min")])
def test_durations(seconds, shown):
    assert progress.duration(seconds) == shown


def test_no_time_is_told_before_a_few_per_cent():
    stream = io.StringIO()
    with ntk.show_progress(stream, every_s=0.0) as report:
        for done in (0.0, 1e9, 5e9):
            time.sleep(0.06)
            report(done, 100e9, "passes")
    lines = stream.getvalue().splitlines()
    assert "GFLOP/s" in lines[1]
    assert "left" not in lines[1]
    assert lines[2].endswith("s left")
