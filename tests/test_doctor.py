"""What `ntkengine doctor` finds, of the machine and of a model."""

from __future__ import annotations

import json

import torch


def test_doctor(run):
    code, out, err = run("doctor", "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["torch"]["found"] == torch.__version__
    assert all(told[name]["note"] for name in ("python", "memory", "cores", "matplotlib", "mpi4py"))
    missing = [row for row in told.values() if row["note"].startswith("missing; would")]
    assert all("pip install" in row["note"] and row["found"] is None for row in missing)
    assert "Doctor" in run("doctor")[1]


def test_doctor_measures_batch_invariance(run, model_folder):
    code, out, err = run("doctor", "--model", model_folder, "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    exact, *others = told["invariance"]
    assert exact["precision"] == "float64"
    assert max(exact["batch"], exact["right"]) < 1e-12
    assert exact["left"] > 1e-3  # BERT counts positions from the first column
    assert "pad on the right" in told["advice"][0]
    for row in others:
        assert 0 < row["rounding"] < {"float32": 1e-4, "bfloat16": 0.5}[row["precision"]]
        assert row["batch"] < 20 * row["rounding"]
    assert {row["attention"] for row in others} == {"sdpa", "math"}
    code, out, err = run("doctor", "--model", model_folder)
    assert (code, err) == (0, "")
    assert "bfloat16" in out
    assert "pad on the right" in out
    code, out, err = run("doctor", "--model", "/none")
    assert (code, out) == (2, "")
    assert err.startswith("error: /none: no such model directory")
