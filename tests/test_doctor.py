"""What `ntkengine doctor` finds, of the machine and of a model."""

from __future__ import annotations

import fcntl
import importlib
import json
from types import SimpleNamespace

import pytest
import torch

from ntkengine import doctor, doctormpi
from ntkengine.gram import backend


def test_doctor_tells_the_state_of_everything(run):
    code, out, err = run("doctor", "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["torch"]["found"] == torch.__version__
    assert told["torch"]["required"]
    for name in (
        "python",
        "torch",
        "threads",
        "CPU",
        "GPU",
        "triton",
        "jobs run on",
        "mpi4py",
        "HDF5",
        "memory",
        "disk",
    ):
        assert told[name]["state"] in ("ok", "missing", "problem"), name
        assert told[name]["note"], name
    assert {name for name, row in told.items() if row["required"]} >= {"python", "torch", "h5py", "HDF5"}
    assert told["file locks here"]["state"] == "ok"
    assert told["jobs run on"]["found"].startswith("GPU" if torch.cuda.is_available() else "CPU")
    for row in told.values():
        assert row["fix"] or row["state"] == "ok" or not torch.cuda.is_available(), row
    out = run("doctor")[1]
    for name, row in told.items():
        assert name in out
        assert not row["fix"] or f"{name}: try {row['fix']}" in out


def found(name):
    return next(item for item in doctor.examine() if item.name == name)


def without(monkeypatch, *names):
    monkeypatch.setattr(doctor, "_version", lambda name, known=doctor._version: "" if name in names else known(name))


def test_what_is_optional_is_missing_and_no_failure(run, monkeypatch):
    without(monkeypatch, "matplotlib")
    assert found("matplotlib") == doctor.Item(
        "matplotlib", "missing", "", "figures, report and demo", "pip install matplotlib"
    )
    assert run("doctor")[0] == 0


def test_what_is_required_and_missing_is_exit_1(run, monkeypatch):
    without(monkeypatch, "peft")
    code, out, err = run("doctor", "--json")
    assert (code, err) == (1, "")
    assert json.loads(out)["peft"] == {
        "state": "missing", "found": None, "note": "needed", "fix": "pip install peft", "required": True,
    }  # fmt: skip
    code, out, _ = run("doctor")
    assert code == 1
    assert "peft: try pip install peft" in out


def test_a_library_that_does_not_load_or_is_too_old_is_a_problem(run, monkeypatch):
    load = importlib.import_module

    def broken(name, *more):
        if name == "scipy":
            raise ImportError("libopenblas.so: cannot open\nmore")
        return load(name, *more)

    with monkeypatch.context() as patch:
        patch.setattr(doctor.importlib, "import_module", broken)
        row = found("scipy")
    assert (row.state, row.note) == ("problem", "cannot be imported: libopenblas.so: cannot open")
    monkeypatch.setattr(doctor, "_version", lambda name: "1.0")
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: ["h5py>=3.12"])
    row = found("h5py")
    assert (row.state, row.note, row.fix) == ("problem", "expected >=3.12", "pip install 'h5py>=3.12'")
    assert doctor.broken([row])


def test_more_threads_than_cores(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4096)
    assert (found("threads").state, found("threads").fix[:22]) == ("problem", "export OMP_NUM_THREADS")


def test_locks(monkeypatch, tmp_path):
    assert doctor._locks(tmp_path).state == "ok"
    assert list(tmp_path.iterdir()) == []
    assert doctor._locks(tmp_path / "none").state == "problem"

    def refuse(*_):
        raise OSError(38, "Function not implemented")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        row = doctor._locks(tmp_path)
    assert (row.state, row.fix) == ("problem", "export HDF5_USE_FILE_LOCKING=FALSE")
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    assert "taken twice" in doctor._locks(tmp_path).note


def test_little_room(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=5))
    assert doctor._disk(tmp_path).state == "problem"


@pytest.mark.parametrize(
    ("answers", "states", "says"),
    [
        ({"-c": (0, "MPICH\nMPICH Version:\t5.0"), "mpirun": (0, "HYDRA build details")}, "ok ok", "of MPICH"),
        ({"-c": (0, "Open MPI\nOpen MPI v5"), "mpirun": (0, "HYDRA build details")}, "ok problem", "would be alone"),
        ({"-c": (0, "MPICH\nMPICH Version"), "mpirun": (0, "mpirun (Open MPI) 5.0")}, "ok problem", "of Open MPI"),
        ({"-c": (1, "Traceback\nRuntimeError: cannot load MPI library")}, "problem", "cannot load MPI library"),
    ],
)
def test_mpi_and_its_launcher(monkeypatch, answers, states, says):
    monkeypatch.setattr(doctormpi.importlib.metadata, "version", lambda _: "4.1")
    monkeypatch.setattr(doctormpi.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(
        doctormpi, "_output", lambda command: answers["-c" if "-c" in command else command[0].split("/")[-1]]
    )
    rows = doctormpi.examine_mpi()
    assert [row[1] for row in rows] == states.split()
    assert says in rows[-1][3]
    assert all(row[4] for row in rows if row[1] != "ok")


def test_kernels_are_tried_not_only_looked_for(monkeypatch):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert backend.try_kernels(device) is None  # without a GPU in the interpreter
    monkeypatch.setattr(backend, "syrk", lambda *_, **__: None)
    assert "wrong product" in backend.try_kernels(device)

    def fail(*_, **__):
        raise FileNotFoundError("gcc")

    monkeypatch.setattr(backend, "syrk", fail)
    assert backend.try_kernels(device) == "kernels fail: FileNotFoundError: gcc"


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
