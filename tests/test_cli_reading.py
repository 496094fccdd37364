"""Commands that read a Gram: what they show, and their JSON."""

from __future__ import annotations

import json
import re
import socket
import time
from dataclasses import replace

import numpy as np
import pytest

from ntkengine import comparecommand, gramfiles
from ntkengine.spectrum import (
    condition_from_eigenvalues,
    condition_number,
    effective_dimension,
    effective_rank,
    eigsh,
)
from ntkengine.store import Folder, open_gram, parts_of, read_job, write_gram
from tests.tiny import save_tiny, tiny_sentences


def test_info_shows_everything(run, gram_file):
    code, out, err = run("info", gram_file)
    assert (code, err) == (0, "")
    for text in ("7 × 7 (trace, sgd)", "margin", "7 train, 3 eval", "job: data.train", "train.tsv", "share"):
        assert text in out
    assert "\x1b" not in out
    told = json.loads(run("info", gram_file, "--json")[1])
    assert told["shapes"]["values"] == [7, 7]
    assert told["shapes"]["cross"] == [3, 7]
    assert told["noise"] == open_gram(gram_file).noise
    assert told["meta"]["settings"] == {"data": {"train": "train.tsv"}}


def test_spectrum_json_is_the_spectrum(run, gram_file):
    code, out, _ = run("spectrum", gram_file, "-k", 3, "--json")
    told = json.loads(out)
    gram = open_gram(gram_file)
    ritz = eigsh(gram, k=3)
    assert code == 0
    np.testing.assert_allclose(told["values"], ritz.values, rtol=1e-12)
    assert told["condition"]["lower"] == condition_number(gram).lower
    assert told["certified"] is ritz.certified
    assert (told["effective_rank"], told["effective_rank_error"]) == (rank := effective_rank(gram), rank.error)
    assert len(run("spectrum", gram_file)[1].splitlines()) > 9
    assert "; these are all 7 eigenvalues" in run("spectrum", gram_file, "-k", 9999)[1]
    assert "these are all" not in run("spectrum", gram_file, "-k", 7)[1]
    assert run("spectrum", gram_file, "-k", 0)[0] == 2
    for which, places in (("LA", "123"), ("SA", "567"), ("BE", "127")):
        rows = run("spectrum", gram_file, "-k", 3, "--which", which)[1].splitlines()
        assert "".join(row.split()[0] for row in rows if row.strip()[:1].isdigit()) == places


def test_ridge_and_forecast_json(run, gram_file):
    found = gramfiles.forecast_file(gram_file)
    told = json.loads(run("ridge", gram_file, "--json")[1])
    np.testing.assert_allclose(told["loo_mse"], found.loo_mse, rtol=1e-12)
    assert told["ridge"] == found.ridge
    dimensions = [effective_dimension(open_gram(gram_file), r) for r in told["ridges"]]
    np.testing.assert_allclose(told["effective_dimension"], dimensions, rtol=1e-9)
    np.testing.assert_allclose(told["effective_dimension_error"], [d.error for d in dimensions], rtol=1e-3)
    forecast_of_gcv = gramfiles.forecast_file(gram_file, "gcv")
    told = json.loads(run("forecast", gram_file, "--json", "--ridge", "gcv")[1])
    assert told["ridge"] == found.ridge_gcv
    assert told["assumptions"] == found.assumptions
    for name in ("trace", "effective_rank", "effective_dimension"):
        assert told[f"{name}_error"] == getattr(forecast_of_gcv, name).error > 0
    code, out, _ = run("forecast", gram_file)
    assert code == 0
    assert f"- {found.assumptions[0]}" in out
    assert "chosen" in run("ridge", gram_file)[1]
    given = json.loads(run("ridge", gram_file, "--ridge", found.ridges[3], "--json")[1])
    assert given["ridge"] == pytest.approx(found.ridges[3])
    assert run("ridge", gram_file, "--ridge", "-1")[0] == 2


def test_forecast_takes_the_ridge_of_the_job_file(run, gram_file, tmp_path):
    job = tmp_path / "job.toml"
    tables = '[model]\npath = "m"\n[data]\ntrain = "a.tsv"\n[forecast]\nridge = "gcv"\n'
    job.write_text(f'out = "{gram_file}"\n' + tables)
    assert json.loads(run("forecast", job, "--json")[1])["ridge"] == gramfiles.forecast_file(gram_file, "gcv").ridge
    job.write_text(tables)
    code, _, err = run("forecast", job)
    assert (code, "out: is missing" in err) == (2, True)


def test_report_is_written(run, gram_file, tmp_path):
    code, out, err = run("report", gram_file, "-o", tmp_path / "r.html")
    assert (code, out.strip(), err) == (0, str(tmp_path / "r.html"), "")
    assert "data:image/png;base64," in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_a_report_has_the_traces_that_info_has(run, tmp_path):
    save_tiny(tmp_path / "model", num_labels=3)
    rows = [f"{text}\t{'abc'[i % 3]}" for i, text in enumerate(tiny_sentences(12))]
    (tmp_path / "train.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    made = ["--model", tmp_path / "model", "--data", tmp_path / "train.tsv", "--num-labels", 3, "--no-fit-head"]
    assert run("gram", *made, "--params", "all", "--out", tmp_path / "k.h5")[0] == 0
    (section,) = gramfiles.report_files([tmp_path / "k.h5"])
    shown = next(table for table in section.tables if table.title == "Trace by module").rows
    traces = open_gram(tmp_path / "k.h5").meta["module_trace"]
    assert len(shown) == len(traces)
    assert sum(float(row[1]) for row in shown) == pytest.approx(sum(traces.values()), rel=1e-3)


@pytest.fixture
def changed(gram_file, tmp_path):
    """Return what writes another file of the Gram with some of it changed."""

    def write(job=None, **fields):
        path = tmp_path / "other.h5"
        path.unlink(missing_ok=True)
        write_gram(path, replace(open_gram(gram_file), **fields), job=read_job(gram_file) | (job or {}), ids={})
        return path

    return write


def test_a_training_that_the_gram_cannot_tell_is_left_out_and_said(run, changed, tmp_path):
    path, job = changed(modules={}, cross_modules={}), tmp_path / "job.toml"
    recipe = "[finetune]\nlearning_rate = 1e-3\noptimizer = "
    tables = f'out = "{path}"\n[model]\npath = "m"\n[data]\ntrain = "a.tsv"\n{recipe}'
    job.write_text(f'{tables}"adam"')
    code, out, err = run("forecast", job)
    assert (code, err) == (0, "")
    assert "forecast does not simulate the training of [finetune]: Adam scales" in out
    told = json.loads(run("forecast", job, "--json")[1])
    assert told.pop("assumptions")[-1].endswith("takes per_module = true in [gram]")
    plain = json.loads(run("forecast", path, "--json")[1])
    assert told == {name: value for name, value in plain.items() if name != "assumptions"}
    job.write_text(f'{tables}"sgd"')
    assert "does not simulate" not in run("forecast", job)[1]


def test_compare_holds_a_difference_against_the_noise(run, gram_file, changed):
    gram = open_gram(gram_file)
    K = np.asarray(gram)
    step = np.zeros_like(K)
    step[1, 1] = 3.0 * gram.noise
    for factor, told in ((0.0, True), (0.5, True), (1.0, False)):
        other = changed(values=K + factor * step)
        code, out, err = run("compare", gram_file, other, "--json")
        assert (code, err) == (0, "")
        found = json.loads(out)
        assert (found["same_examples"], found["within_noise"]) == (True, told)
        assert found["noise"] == pytest.approx(2.0 * gram.noise)
        assert found["spectral_difference"] == pytest.approx(factor * step[1, 1], abs=1e-12 * K.max())
        assert found["relative_difference"] == pytest.approx(found["spectral_difference"] / np.linalg.norm(K))
        assert found["effective_rank"] == [effective_rank(open_gram(path)) for path in (gram_file, other)]
    code, out, _ = run("compare", gram_file, other)
    assert code == 0
    for text in ("beyond the noise of both", "Side by side", "leave-one-out mse"):
        assert text in out


def test_compare_knows_scaled_kernels_and_other_settings(run, gram_file, changed):
    gram = open_gram(gram_file)
    other = changed(values=2.0 * np.asarray(gram), transform="sign")
    found = json.loads(run("compare", gram_file, other, "--json")[1])
    assert found["scale"] == pytest.approx(2.0)
    assert found["alignment"] == pytest.approx(1.0)
    assert 0.0 < found["alignment_error"] < 1e-4
    assert found["relative_difference"] == pytest.approx(1.0)
    assert found["differing"]["shape"] == ["7 × 7 (trace, sgd)", "7 × 7 (trace, sign)"]
    assert "precision" not in found["differing"]


def test_compare_without_the_same_examples_or_forecasts(run, gram_file, changed):
    data = {"data": ["other", *read_job(gram_file)["data"][1:]]}
    path = changed(targets=None, eval_targets=None, job=data)
    code, out, err = run("compare", gram_file, path)
    assert (code, err) == (0, "")
    assert "not known to be the same" in out
    assert "alignment" not in out
    assert "holds no targets" in out
    found = json.loads(run("compare", gram_file, path, "--json")[1])
    assert (found["same_examples"], found["alignment"]) == (False, None)


def test_compare_of_other_sizes_leaves_entries_out(run, gram_file, changed):
    few = {"values": np.eye(6), "outputs": np.zeros((6, 1)), "targets": np.array([[1.0], [-1.0]] * 3)}
    fewer = {"cross": None, "modules": {}, "cross_modules": {}, "eval_outputs": None, "eval_targets": None}
    other = changed(**few, **fewer, extras={})
    code, out, err = run("compare", gram_file, other)
    assert (code, err) == (0, "")
    for text in ("not known to be the same: entries are not compared", "Side by side", "6 × 6"):
        assert text in out
    found = json.loads(run("compare", gram_file, other, "--json")[1])
    assert (found["same_examples"], found["scale"]) == (False, None)


def test_compare_tells_only_what_differs_in_value_and_briefly(run, gram_file, changed):
    names = [f"bert.encoder.layer.{i}.attention.output.dense" for i in range(6)]
    meta = open_gram(gram_file).meta

    def of(alpha, modules, readout="margin"):
        settings = {"model": {"alpha": alpha, "modules": modules}}
        return changed(meta=meta | {"settings": settings, "readout": readout})

    first = of(16, names[:3]).rename(gram_file.parent / "first.h5")
    code, out, _ = run("compare", first, of(16.0, names))
    assert code == 0
    assert "model.alpha" not in out
    assert "6 modules: ….layer.0.attention.output.dense, …" in out
    assert "of different readouts" not in out
    same = run("compare", first, of(16, names[:3]))[1]
    assert "; no facts or settings differ" in same
    assert "Facts and settings that differ" not in same
    assert (
        "- of different readouts, losses, ridges and noise cannot" in run("compare", first, of(16, names, "logits"))[1]
    )


def test_compare_says_what_noise_and_readouts_hide():
    found = {"same_examples": True, "within_noise": False, "noise": 1.0, "relative_difference": 0.1, "scale": 1.0}
    found |= {"relative_difference_error": 0.1, "spectral_difference": 2.0, "alignment": 1.0, "alignment_error": 1.6}
    assert dict(comparecommand._told(found))["alignment ⟨A, B⟩ / ‖A‖‖B‖"].startswith("not resolved")
    conditions = [condition_from_eigenvalues(np.array([1.0, low]), 1e-6, 0.0) for low in (1e-7, 0.5)]
    told = comparecommand._conditions(conditions)
    assert told == ("condition number", "> 909000 (unresolved)", str(conditions[1]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"noise": float("nan")}, "its noise is not known"),
        ({"values": np.zeros((7, 7))}, "not all zeros"),
        ({"values": np.ones((7, 6)), "cross": None, "targets": None}, r"of shape \(n, n\) to compare, got \(7, 6\)"),
    ],
)
def test_compare_refuses_what_cannot_be_compared(run, gram_file, changed, fields, message):
    other = changed(
        **{"modules": {}, "cross_modules": {}, "eval_outputs": None, "eval_targets": None, "cross": None} | fields
    )
    code, out, err = run("compare", gram_file, other)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(f"other.h5: .*{message}", err), err


def test_a_file_is_not_compared_with_itself(run, gram_file):
    code, _, err = run("compare", gram_file, gram_file.parent / "." / gram_file.name)
    assert (code, err.count("\n")) == (2, 1)
    assert "the same one twice" in err


def test_info_of_a_running_job(run, tmp_path):
    path = tmp_path / "k.h5"
    with Folder(path) as folder:
        folder.tell({"done": 25.0, "total": 100.0, "stage": "layer.3", "started": time.time() - 60})
        code, out, err = run("info", path)
        assert (code, err) == (0, "")
        for text in ("Not complete", "running", "layer.3", "25%", "60 s ago"):
            assert text in out
        told = json.loads(run("info", path, "--json")[1])
        code, out, err = run("verify", path)
        assert err == f"error: {path}: not complete (25%, running); `ntkengine info {path}` says more\n"
    assert (told["complete"], told["running"], told["done"], told["checkpoint"]) == (False, True, 25.0, None)
    job = tmp_path / "job.toml"
    job.write_text(f'out = "{path}"\n[model]\npath = "m"\n[data]\ntrain = "a.tsv"\n')
    assert "no such file; `ntkengine gram" in run("forecast", job)[2]
    parts_of(path).mkdir()
    told = {"pid": 2**31 - 2, "host": socket.gethostname(), "done": 26.0, "total": 100.0}
    (parts_of(path) / "progress.json").write_text(json.dumps(told))
    for what in (path, job):
        code, out, err = run("forecast", what)
        assert (code, out) == (2, "")
        goes_on = f"the same job goes on; `ntkengine info {path}` says more"
        assert err == f"error: {path}: not complete (26%, stopped); {goes_on}\n"
