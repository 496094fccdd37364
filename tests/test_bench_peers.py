"""The peers: equal work, gates before timing, failures told and survived. Tiny sizes; optional packages stay out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench.fresh import FailedError
from bench.peers import PEERS, Peer, blocks, contender, engine, environments, run
from bench.peers.work import WORKS, build, outputs, selected, tiny
from bench.timing import WrongError


def job(tmp_path, module, work, reference, **options):
    config = tiny(WORKS[work]) | options
    target = str(tmp_path / f"{module}.npy")
    times = {"few": 3, "repeats": 1, "most_s": 1.0, "compiles": False}
    return {"module": module, "config": config, "target": target, "reference": reference, **times}


@pytest.fixture
def reference(tmp_path):
    def made(work):
        asked = job(tmp_path, "autograd", work, None)
        contender.main(asked)
        return str(Path(asked["target"]).rename(tmp_path / "reference.npy"))

    return made


@pytest.mark.parametrize(
    ("module", "work"), sorted({(p.module, work) for p in PEERS.values() if not p.package for work in p.works})
)
def test_peers_agree_with_float64_and_the_engine(tmp_path, reference, module, work):
    found = contender.main(job(tmp_path, module, work, reference(work), attention="eager"))
    assert found["seconds_runs"] == 1
    K, truth = np.load(tmp_path / f"{module}.npy"), np.load(tmp_path / "reference.npy")
    assert truth.dtype == np.float64
    assert np.linalg.norm(K[:3, :3] - truth) < 1e-5 * np.linalg.norm(truth)
    contender.main(job(tmp_path, "engine", work, str(tmp_path / "reference.npy")))
    told = run.differences(K.astype(np.float64), np.load(tmp_path / "engine.npy"))
    assert told["largest_difference"] < 1e-5
    assert told["relative_difference"] < 1e-5


@pytest.mark.parametrize("module", ["autograd", "torch_func"])
@pytest.mark.parametrize("sides", ["1", "2"])
def test_a_gram_in_blocks_is_that_of_all_at_once(tmp_path, reference, module, sides, monkeypatch):
    truth = reference("sentences")
    grams = []
    for held, streamed in ((128, 32), (8, 4), (6, 6), (2, 2)):  # of two outputs each; N = 10
        monkeypatch.setattr(blocks, "HELD", held)
        monkeypatch.setattr(blocks, "STREAMED", streamed)
        contender.main(job(tmp_path, module, "sentences", truth, attention="eager", sides=sides))
        grams.append(np.load(tmp_path / f"{module}.npy"))
    for other in grams[1:]:
        assert np.abs(other - grams[0]).max() < 1e-5 * grams[0].max()
        assert np.array_equal(other, other.T)


def test_blocks_take_as_few_gradients_as_memory_allows(monkeypatch):
    monkeypatch.setattr(blocks, "HELD", 8)
    monkeypatch.setattr(blocks, "STREAMED", 4)
    X = torch.arange(30.0).view(10, 3)
    for twice, expected in (
        (False, [(0, 4), (4, 8), (0, 2), (2, 4), (8, 10), (0, 2), (2, 4), (4, 6), (6, 8)]),
        (True, [(0, 4), (0, 2), (2, 4), (4, 8), *((k, k + 2) for k in range(0, 8, 2)), (8, 10)]),
    ):
        asked = []

        def gradients(part, asked=asked):
            asked.append((part.start, part.stop))
            return {"a": X[part, :1], "b": X[part, 1:]}

        assert torch.equal(blocks.blocked(10, 2, gradients, twice=twice), X @ X.T)
        assert asked[: len(expected)] == expected


@pytest.mark.parametrize("work", WORKS)
def test_every_work_selects_what_its_peers_compute(work):
    config = tiny(WORKS[work])
    model, inputs = build(config)
    chosen = selected(model, config)
    assert outputs(model, inputs).shape == (config["N"], config["C"])
    assert torch.equal(outputs(*build(config)), outputs(model, inputs))  # equal weights and inputs every time
    if work.endswith("-linear"):
        assert chosen
        assert not any("embeddings" in name or "LayerNorm" in name for name in chosen)
    elif work.endswith("-lora"):
        assert all("lora_" in name for name in chosen)
        assert all(p.abs().max() > 0 for p in chosen.values())
    else:
        assert len(chosen) == len(list(model.parameters()))


def test_a_wrong_gram_is_not_timed(tmp_path, reference, monkeypatch):
    calls = []

    def prepare(_model, config):
        return lambda inputs: calls.append(len(inputs["x"])) or np.eye(len(inputs["x"]))

    monkeypatch.setattr(engine, "prepare", prepare)
    with pytest.raises(WrongError, match="3 samples against float64"):
        contender.main(job(tmp_path, "engine", "mlp", reference("mlp")))
    assert calls == [3]


def figures(seconds, K):
    return {"seconds": seconds, "gib": 0.5, "error": 1e-7, "K": K}


def test_one_peer_that_fails_does_not_lose_the_others(monkeypatch, tmp_path, capsys):
    recorded = []
    monkeypatch.setattr(run, "record", lambda name, config, values: recorded.append((config["peer"], values)))
    K = np.array([[4.0, 1.0], [1.0, 1.0]])
    times = {"engine": 2.0, "engine-unchecked": 1.0, "torch-func": 10.0, "torch-func-once": 6.0}

    def one(_contest, name):
        if name == "autograd":
            raise FailedError("not done after 3 s")
        return figures(times[name], K + 0.01 * (name == "torch-func"))

    monkeypatch.setattr(run.Contest, "_run", one)
    assert run.main(["torch-func", "autograd", "torch-func-once"]) == 1
    table = capsys.readouterr().out.splitlines()
    for i, works in enumerate(("bert", "sentences")):
        assert f"| {works} | 10.00 s | 2.00 s | 5.0 | 10.0 |" in table[2 + i]
        assert f"| {works} | peer: not done after 3 s" in table[4 + i]
        assert f"| {works} | 6.00 s | 2.00 s | 3.0 |" in table[6 + i]
    assert [name for name, _ in recorded[::2]] == ["torch-func", "autograd", "torch-func-once"]
    assert recorded[0][1]["largest_difference"] == pytest.approx(0.01)  # of 1: the last diagonal entry
    assert recorded[2][1]["peer_failure"] == "not done after 3 s"
    with pytest.raises(SystemExit, match="2"):
        run.main(["nothing"])
    assert "no peer 'nothing'" in capsys.readouterr().err


def test_an_environment_is_made_once_and_anew_when_requirements_change(tmp_path, monkeypatch):
    peer = Peer("p", "", ("mlp",), "opacus", "no_such_package", "requirements-opacus.txt")
    started = []

    def spy(command):
        started.append(command)
        if "venv" in command:
            Path(command[-1]).mkdir(parents=True, exist_ok=True)
            (Path(command[-1]) / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages").mkdir(
                parents=True
            )

    monkeypatch.setattr(environments, "_run", spy)
    python = environments.interpreter(peer, tmp_path)
    assert python == tmp_path / "no_such_package" / "bin" / "python"
    assert [("venv" in c, "--no-deps" in c) for c in started] == [(True, False), (False, True)]
    (shared,) = tmp_path.rglob("main.pth")
    assert Path(shared.read_text().strip(), "torch").is_dir()
    environments.interpreter(peer, tmp_path)
    assert len(started) == 2
    (tmp_path / "no_such_package" / "installed.txt").write_text("another==1\n")
    monkeypatch.setattr(environments, "_run", started.append)
    environments.interpreter(peer, tmp_path)
    assert len(started) == 4


def test_a_peer_whose_package_is_here_needs_no_environment(tmp_path):
    assert environments.interpreter(Peer("p", "", ("mlp",), "x", "numpy", "none.txt"), tmp_path) == Path(sys.executable)
    assert not list(tmp_path.iterdir())


def test_pips_own_error_is_told(monkeypatch):
    said = SimpleNamespace(returncode=1, stdout="", stderr="Looking\nERROR: No matching distribution found for p==1\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: said)
    with pytest.raises(FailedError, match="not installed: ERROR: No matching distribution found for p==1"):
        environments._run(["pip"])


def test_every_peer_is_whole():
    folder = Path(run.__file__).parent
    for peer in PEERS.values():
        assert set(peer.works) <= set(WORKS)
        assert (folder / f"{peer.module}.py").exists()
        assert bool(peer.package) == bool(peer.requirements)
        assert not peer.requirements or (folder / peer.requirements).exists()
