"""Tables, figures, the page and progress: the numbers of the objects, escaped, self-contained, legible."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

from ntkengine.errors import InputError
from ntkengine.finetune.history import Measured
from ntkengine.forecast import forecast
from ntkengine.report import Section, Table, findings, plots, tables, text, training, write_report
from ntkengine.report.planned import plan_table
from ntkengine.spectrum import condition_number, eigsh
from tests.madegram import made_gram


@pytest.fixture(scope="module")
def gram():
    return made_gram()


@pytest.fixture(scope="module")
def found(gram):
    return forecast(gram, gram.targets)


def cells(table):
    return {row[0]: row[1:] for row in table.rows}


def test_gram_table_says_noise_size_time_and_job(gram):
    gram.meta["settings"] = {"model": {"path": "m", "peft": {"r": 8, "target_modules": ["q", "v"]}}, "x": None}
    rows = cells(tables.gram_table(gram))
    assert rows["shape"] == ("37 × 37 (trace, sgd)",)
    assert rows["examples"] == ("37 train, 21 eval",)
    assert rows["error (spectral norm)"] == ("± 1e-05 gradient²",)
    assert rows["wall time"] == ("1.2 s",)
    assert rows["job: model.peft.target_modules"] == ("q, v",)
    assert "job: x" not in rows
    assert not any(label.startswith("job") for label in cells(tables.gram_table(gram, job=False)))
    unchecked = tables.gram_table(SimpleNamespace(**{**vars(gram), "noise": float("nan")}))
    assert "not estimated" in cells(unchecked)["error (spectral norm)"][0]


def test_spectrum_table_is_descending_with_bounds(gram):
    ritz = eigsh(gram, k=5)
    shown = findings.spectrum_table(ritz, condition_number(gram))
    values = [float(row[1]) for row in shown.rows]
    off = np.abs(values - np.linalg.eigvalsh(gram.values)[::-1][:5])
    assert (off <= [float(row[2]) for row in shown.rows]).all()
    assert off.max() < 1e-6
    assert all(float(row[2]) >= 1e-5 for row in shown.rows)
    assert "numbers not certified" not in shown.note  # LAPACK's
    ritz = eigsh(gram, k=5, method="lanczos")
    assert not ritz.certified
    assert "; numbers not certified: an eigenvalue may have been missed" in findings.spectrum_table(ritz, "").note
    assert "certified" not in findings.spectrum_table(eigsh(gram, k=5, method="lanczos", certify=True), "").note
    assert str(condition_number(gram)) in shown.note


def test_ridge_table_keeps_and_marks_the_chosen_ridge(gram, found):
    shown = findings.ridge_table(found)
    chosen = [row for row in shown.rows if "chosen" in row[-1]]
    assert len(chosen) == 1
    assert float(chosen[0][0]) == pytest.approx(found.ridge, rel=1e-3)
    assert float(chosen[0][shown.columns.index("LOO mse")]) == pytest.approx(found.loo[0], abs=1e-4)
    dimension, error = map(float, chosen[0][1].split(" ± "))
    assert abs(dimension - found.effective_dimension) + found.effective_dimension.error <= error < 0.01
    assert len(shown.rows) <= findings.RIDGE_ROWS + 3
    assert float(shown.rows[0][0]) < float(shown.rows[-1][0])


def test_small_targets_leave_no_column_of_zeros(gram):
    shown = findings.ridge_table(forecast(gram.values, 1e-4 * gram.targets))
    for name in ("train mse", "LOO mse", "GCV mse"):
        column = [float(row[shown.columns.index(name)]) for row in shown.rows]
        assert 0.0 < max(column) < 1e-6
    last = float(shown.rows[-1][shown.columns.index("LOO mse")])
    assert last == pytest.approx(1e-8 * float(findings.ridge_table(forecast(gram.values, gram.targets)).rows[-1][3]))


def test_module_and_comparison_tables(found):
    shown = findings.module_table({"a": 0.25, "b": 0.75}, 8.0)
    assert shown.rows == [("b", "6", "75.00%"), ("a", "2", "25.00%")]
    assert findings.module_table({"a": 0.2, "b": 0.5, "c": 0.3}, 1.0, top=1).rows[1] == ("2 others", "0.5", "50.00%")
    both = findings.comparison_table({"one.h5": found, "two.h5": found})
    assert both.columns == ("", "one.h5", "two.h5")
    assert all(row[1] == row[2] for row in both.rows)
    shares = [row[0] for row in both.rows if row[0].startswith("share of")]
    assert shares == ["share of the largest class"]


def test_plan_table_folds_layers():
    def row(name, strategy="tile"):
        return SimpleNamespace(
            parameter=name, path="outer", strategy=strategy, rows=4, columns=3, flops=1e9, seconds=0.5, bytes=2.0**20
        )

    plan = SimpleNamespace(
        parameters=[row("e.0.q.weight"), row("e.1.q.weight"), row("e.2.q.weight", "ghost"), row("head.weight")],
        samples=5, tokens=50, outputs=2, microbatches=1, pass_flops=2e9, flops=6e9, peak_bytes=2.0**21, seconds=3.0,
        rate=2e9, probe_seconds=0.5, pass_seconds=1.0, layout={"hidden": "disk", "factor_bytes": 2.0**20, "tile": 3},
        sweeps=3, scaling=None, held_out_grams=5, held_out_seconds=4.0, check_seconds=0.25, contract_seconds=1.25,
        unused=["pooler.bias"], negligible=["key.bias"], frozen=["e.weight", "f.weight"],
    )  # fmt: skip
    shown = plan_table(plan)
    assert [r[:2] + r[4:7] for r in shown.rows] == [
        ("e.*.q.weight", "2", "tile", "2.00", "1.00"),
        ("e.*.q.weight", "1", "ghost", "1.00", "0.50"),
        ("head.weight", "1", "tile", "1.00", "0.50"),
    ]
    assert "pooler.bias" in shown.note
    assert "key.bias" in shown.note
    assert (
        "hidden states wait on the disk; at most 1 MiB of factors at once; tiles of 3 examples, 3 sweeps" in shown.note
    )
    assert "2 parameters not selected (e.weight, …)" in shown.note
    assert "about 3.0 s: probe 0.5, passes 1.0, checks 0.2, contractions 1.2 at 2 GFLOP/s" in shown.note
    assert "then about 4.0 s for 5 more Grams of the train examples, under held-out heads" in shown.note


def test_print_table_is_plain_and_whole_without_a_terminal():
    stream = io.StringIO()
    wide = "x" * 90
    text.print_table(
        Table("T [b]", ("name", "value"), [(wide, "1.5"), ("[red]b", "2")], "n"), text.make_console(stream)
    )
    shown = stream.getvalue()
    assert "\x1b" not in shown
    assert wide in shown
    assert "[red]b" in shown
    assert shown.startswith("T [b]\n")
    assert not [line for line in shown.splitlines() if line != line.rstrip()]


def on_terminal(table, width):
    stream = io.StringIO()
    text.print_table(table, text._Console(file=stream, width=width, force_terminal=False, highlight=False))
    return [line.rstrip() for line in stream.getvalue().splitlines() if line.strip()]


def test_a_narrow_terminal_puts_intervals_below_values_before_it_gives_up_columns():
    span = "0.4043 (0.315 to 0.4936)"
    table = Table("T", ("modules", "eval loss", "accuracy"), [("attention.output.dense", span, span)])
    wide, stacked, turned = (on_terminal(table, width) for width in (90, 64, 40))
    assert f"{span}   {span}" in wide[-1]
    assert stacked[-2].split() == ["attention.output.dense", "0.4043", "0.4043"]
    assert stacked[-1].count("(0.315 to 0.4936)") == 2
    assert [line.split()[0] for line in turned[1:]] == ["modules", "eval", "accuracy"]


def test_long_labels_leave_room_for_figures():
    value = "0.4354 (0.387 to 0.4838) at time 541"
    rows = [("least eval loss", value), ("share of trace, " + "module." * 9, "44.5%")]
    shown = on_terminal(Table("T", (), rows), 80)
    assert sum(value in line for line in shown) == 1
    assert max(map(len, shown)) <= 80


def test_dotted_names_are_shortened_to_where_they_differ():
    names = ["a.b.layer.4.value", "a.b.layer.5.value"]
    assert tables.shortened(names) == ["….layer.4.value", "….layer.5.value"]
    assert tables.shortened(["a.b.c", "a.b.c"]) == ["….b.c", "….b.c"]
    for whole in (["a.b", "b.c"], ["a.b", "a.c"], ["a", "a.b"], ["a.b.c"] * 0, ["a"]):
        assert tables.shortened(whole) == whole


def test_words_are_told_as_words(gram):
    gram.meta |= {"readout": "LabelWords(tokens=(1, 2))"}
    gram.meta["settings"] = {"gram": {"readout": "margin", "words": [" bad", " good"]}}
    assert cells(tables.gram_table(gram))["readout"] == ("margin of ' bad', ' good'",)


def test_figures_show_what_the_forecast_holds(found):
    figures = found.figures()
    assert list(figures) == ["spectrum", "risk", "curve", "modules"]
    lines = {line.get_label(): line for line in figures["risk"].axes[0].lines}
    np.testing.assert_array_equal(lines["leave-one-out"].get_ydata(), found.loo_mse)
    np.testing.assert_array_equal(lines["eval"].get_ydata(), found.eval_mse)
    np.testing.assert_array_equal(lines["GCV"].get_xdata(), found.ridges)
    curve = {line.get_label(): line for line in figures["curve"].axes[0].lines}
    np.testing.assert_array_equal(curve["train"].get_ydata(), found.curve_train_loss)
    bars = figures["modules"].axes[0].patches
    assert sum(bar.get_width() for bar in bars) == pytest.approx(100.0)
    assert sum(bar.get_width() for bar in figures["modules"].axes[1].patches) == pytest.approx(100.0)
    labels = [label.get_text() for label in figures["modules"].axes[0].get_yticklabels()]
    assert labels == [*(f"layer {i}" for i in range(10)), "embeddings", "head"]
    for figure in figures.values():
        assert figure.axes[-1].get_xlabel()


def test_the_risk_figure_shows_the_whole_interval(found):
    value, _, high = found.loo
    for top in (high, 20.0 * value, np.inf):
        axes = plots.risk_figure(replace(found, loo=(value, 0.0, top))).axes[0]
        assert axes.get_ylim()[1] > (top if np.isfinite(top) else value)
        assert np.isfinite(axes.get_ylim()).all()


def test_a_loss_that_was_not_finite_leaves_the_others_in_the_figure(tmp_path):
    names = set(training.COLUMNS) - {"step", "train_loss", "eval_loss"}
    losses = ((0, 0.7, 0.5), (5, 2.0, None), (9, None, 0.25))
    recipe = {"optimizer": "sgd", "learning_rate": 1.0, "epochs": 2}
    rows = [dict.fromkeys(names) | {"step": s, "train_loss": a, "eval_loss": b} for s, a, b in losses]
    path = tmp_path / "h.jsonl"
    lines = [{"recipe": recipe, "seconds": 1.0, "measuring_seconds": 1.0}, *rows]
    path.write_text("\n".join(map(json.dumps, lines)))
    section = training.training_section(path)
    drawn = {
        line.get_label(): line.get_xydata().tolist() for line in next(iter(section.figures.values())).axes[0].lines
    }
    assert drawn == {"train": [[0, 0.7], [5, 2.0]], "eval": [[0, 0.5], [9, 0.25]]}
    assert any("without a finite loss" in note for note in section.notes)
    path.write_text("\n".join(map(json.dumps, lines[:2])))
    assert not any("without a finite loss" in note for note in training.training_section(path).notes)


def test_the_columns_of_a_fine_tuning_are_those_of_its_measurements(tmp_path):
    assert set(training.COLUMNS) <= set(Measured.__dataclass_fields__)
    recipe = {"optimizer": "sgd", "learning_rate": 1.0, "epochs": 2}
    step = dict.fromkeys(training.COLUMNS) | {"step": 123456, "epoch": 1.5, "train_loss": 0.25}
    run = {"recipe": recipe, "history": [step], "seconds": 1.0, "measuring_seconds": 2.0}
    shown = training.training_table(run)
    assert shown.columns == ("step", "epoch", "train loss")
    assert shown.rows == [("123456", "1.5", "0.25")]
    path = tmp_path / "h.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in (run, step)))
    assert list(training.training_section(path).tables) == [shown]


def test_spectrum_figure_with_an_unresolved_tail():
    values = np.array([10.0, 1.0, 1e-3, 1e-9, -1e-9])
    axes = plots.spectrum_figure(values, 1e-6, "> 1e7 (unresolved)").axes[0]
    assert [line.get_label() for line in axes.lines][:2] == ["3 resolved", "2 unresolved"]


def test_without_matplotlib_the_message_says_what_to_install(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install matplotlib"):
        found.figures()


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.sources, self.data, self.open = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in {"src", "href"}]
        if tag not in {"meta", "img"} and not tag.startswith("!"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.data.append(data)


def test_report_is_one_escaped_page_with_its_pictures(found, tmp_path):
    nasty = "<script>alert('&')</script>"
    section = Section(
        nasty, [Table(nasty, (nasty, "b"), [(nasty, "1")], nasty), findings.module_table(found.modules, 1.0)],
        found.figures(), [nasty],
    )  # fmt: skip
    path = write_report(tmp_path / "r.html", [section], nasty)
    html = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(html)
    assert page.open == []
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "".join(page.data).count(nasty) == 8
    assert len(page.sources) == 4
    assert not re.search(r"https?:|url\(|@import", html)
    for source in page.sources:
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    assert "prefers-color-scheme: dark" in html
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_report_that_fails_keeps_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "r.html"
    path.write_text("<!doctype html>old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_report(path, [Section("a")])
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
    assert path.read_text() == "<!doctype html>old"
    with pytest.raises(InputError, match="folder .*none does not exist"):
        write_report(tmp_path / "none" / "r.html", [])
    with pytest.raises(InputError, match="is a folder"):
        write_report(tmp_path, [])


class Terminal(io.StringIO):
    def isatty(self):
        return True


WIDE = Table(
    "Wide",
    ("module", "parameters", "eval loss (90 %)", "accuracy (90 %)", "train loss", "condition number"),
    [("encoder.layer.11.attention.self.query", "12,345,678", "0.4812 (0.4411 to 0.5213)", "0.8125 (0.77 to 0.85)",
      "0.1234", "1.2345678e+06 (resolved)"), ("short", "1", "2", "3", "4", "5")],
    "a note",
)  # fmt: skip


def shown(table, stream, columns, monkeypatch, **environment):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    text.print_table(table, text.make_console(stream))
    return stream.getvalue()


def test_a_narrow_terminal_never_breaks_a_number(monkeypatch):
    seen = shown(WIDE, Terminal(), 80, monkeypatch, NO_COLOR="1")
    assert max(map(len, seen.splitlines())) <= 80
    for row in WIDE.rows:
        for cell in row:
            assert cell in seen
    for heading in WIDE.columns:
        assert seen.count(heading) == 2  # row by row
    middling = Table("T", WIDE.columns[:3], [row[:3] for row in WIDE.rows])
    seen = shown(middling, Terminal(), 60, monkeypatch, NO_COLOR="1")
    assert max(map(len, seen.splitlines())) <= 60
    assert seen.count("parameters") == 1  # side by side: only the name is folded
    assert "encoder.layer.11.attention.self.query" not in seen
    for cell in ("12,345,678", "0.4812 (0.4411 to 0.5213)"):
        assert cell in seen


def test_a_pipe_gets_whole_lines(monkeypatch):
    long = Table("T", ("name", "value"), [("x" * 500, "1.5"), ("y", "22.5")], "n " * 300)
    seen = shown(long, io.StringIO(), 80, monkeypatch, FORCE_COLOR="1")
    assert "\x1b" not in seen
    assert "x" * 500 in seen
    assert ("n " * 300).strip() in seen
    one, two = (line.rstrip() for line in seen.splitlines() if line.startswith((" x", " y")))
    assert len(one) == len(two)  # numbers end in one column


def test_colours_are_for_terminals_that_want_them(monkeypatch):
    assert "\x1b[" in shown(WIDE, Terminal(), 200, monkeypatch)
    assert "\x1b" not in shown(WIDE, Terminal(), 200, monkeypatch, NO_COLOR="1")
    assert "\x1b" not in shown(WIDE, io.StringIO(), 200, monkeypatch)
