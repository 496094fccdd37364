"""Jobs that end well on odd but legal settings, and commands that keep what is not theirs."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest

import ntkengine as ntk
from ntkengine import jobs, store
from ntkengine.cluster.launch import _chain
from ntkengine.errors import InputError, Stopped
from ntkengine.gram import computing
from ntkengine.gram.identity import writable
from ntkengine.inputs.examples import read_examples
from ntkengine.jobfile import read_job
from ntkengine.textfile import check_folder
from tests.test_jobs import write_rows
from tests.test_keptheads import JOB
from tests.tiny import save_tiny, tiny_sentences


@pytest.fixture
def folder(tmp_path):
    save_tiny(tmp_path / "model", kind="bert")
    write_rows(tmp_path / "train.tsv", 14, 0)
    (tmp_path / "job.toml").write_text(JOB)
    return tmp_path


def test_results_replace_results_of_their_kind_alone(tmp_path, gram_file, run):
    page, other = tmp_path / "r.html", tmp_path / "other.h5"
    other.write_bytes(gram_file.read_bytes())
    for _ in range(2):
        assert run("report", gram_file, "--out", page)[0] == 0
    for out in (other, tmp_path / "ranking.json"):
        out.touch()
        before = out.read_bytes()
        code, _, err = run("report", gram_file, "--out", out)
        assert (code, out.read_bytes()) == (2, before)
        assert "is there already, and nothing this command wrote; name another file" in err
    kinds = {
        '"peft_type"': '{\n  "peft_type": "LORA"\n}',
        '"choices"': '{\n  "choices": []}',
        '{"recipe"': '{"recipe": {}}',
    }
    for mark, text in kinds.items():
        path = tmp_path / "result"
        for there in kinds.values():
            path.write_text(there)
            if there == text:
                check_folder(path, mark)
            else:
                with pytest.raises(InputError, match="nothing this command wrote"):
                    check_folder(path, mark)


def test_commands_do_not_write_over_their_own_job(folder, run):
    job = folder / "job.toml"
    with job.open("a") as file:
        file.write('[finetune]\noptimizer = "adam"\nlearning_rate = 0.001\n')
    before = job.read_bytes()
    for command in (("select", job, "--emit", job), ("select", job, "--save", folder / "train.tsv"),
                    ("finetune", job, "--history", job)):  # fmt: skip
        code, _, err = run(*command)
        assert (code, job.read_bytes()) == (2, before)
        assert "nothing this command wrote" in err


def test_a_kernel_of_nothing_is_a_kernel(folder):
    job = read_job(folder / "job.toml", {"gram": {"params": "*lora_A*"}})  # at LoRA's start B is 0
    gram = jobs.run_gram(job)
    assert not np.asarray(gram).any()
    assert gram.noise == 0.0
    assert np.isfinite(gram.plan.seconds)
    assert np.isfinite(jobs.run_plan(job).seconds)


def test_kernels_of_each_output_by_module_are_forecast(folder, run):
    job = read_job(folder / "job.toml", {"gram": {"contraction": "per-output", "per_module": True}})
    gram = jobs.run_gram(job)
    for command in ("ridge", "forecast"):
        assert run(command, job.out)[0] == 0
    shares = ntk.forecast(gram.values, gram.targets, offset=gram.outputs)
    assert shares.modules == {}
    code, out, _ = run("forecast", job.out, "--json")
    found = json.loads(out)["modules"]
    traces = {name: float(sum(np.trace(K) for K in np.asarray(m))) for name, m in gram.modules.items()}
    assert code == 0
    assert found == pytest.approx({name: t / sum(traces.values()) for name, t in traces.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gram": {"seed": 2**64}}, "seed: expected an integer from 0 to 9223372036854775807"),
        ({"head": {"seed": -1}}, "head.seed: expected an integer from 0 to"),
        ({"model": {"seed": 2**64}}, "model.seed: expected an integer from 0 to"),
        ({"forecast": {"ridge": "x"}}, "forecast.ridge: expected 'loo', 'gcv' or a number > 0, got 'x'"),
        ({"forecast": {"ridge": -1.0}}, "forecast.ridge: expected 'loo', 'gcv' or a number > 0"),
        ({"model": {"peft": {"lora_alpha": float("nan")}}}, "peft.lora_alpha: expected a finite number, got nan"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_computed(folder, change, message):
    with pytest.raises(InputError, match=message):
        jobs.run_gram(read_job(folder / "job.toml", change))
    assert not list(folder.glob("*.h5"))


def test_names_that_leave_no_room_for_those_of_parts_are_refused(tmp_path):
    with pytest.raises(InputError, match="out: expected a file name of at most 220 bytes, got 223"):
        writable(tmp_path / ("ü" * 110 + ".h5"))
    assert writable(tmp_path / ("ü" * 108 + ".h5"))


def test_other_data_are_told_as_such_and_not_as_another_model(folder):
    job = read_job(folder / "job.toml")
    jobs.run_gram(job)
    text = (folder / "train.tsv").read_text()
    (folder / "train.tsv").write_text(text.replace("bad\n", "good\n", 1))
    with pytest.raises(InputError, match="holds another job: data is"):
        jobs.run_gram(job)
    write_rows(folder / "train.tsv", 14, 1)
    with pytest.raises(InputError, match="holds another job: data is"):
        jobs.run_gram(job)


@pytest.mark.parametrize("check", [False, True])
def test_a_gram_of_unknown_noise_is_sound_and_merges(tmp_path, folder, monkeypatch, check):
    monkeypatch.setattr(computing, "double_of", lambda *_, **__: None)  # as of weights that cannot be made float64
    job = read_job(folder / "job.toml", {"gram": {"check": check}, "head": {"fit": False}})
    jobs.run_gram(job)
    assert ntk.verify_gram(job.out) == []
    store.merge_gram(job.out, tmp_path / "copy.h5")
    with h5py.File(job.out, "r+") as file:
        file.attrs["noise"] = np.inf
    assert "the noise is not a finite number" in ntk.verify_gram(job.out)[0]


def test_a_run_that_fills_damaged_tiles_says_so(folder, run):
    job = read_job(folder / "job.toml", {"head": {"fit": False}})
    assert run("gram", folder / "job.toml", "--no-fit-head")[0] == 0
    with h5py.File(job.out, "r+") as file:
        file["gram"][3, 3] += 1.0
    assert store.repair_gram(job.out) == (0, 1)
    code, out, _ = run("gram", folder / "job.toml", "--no-fit-head")
    assert code == 0
    assert "had damaged tiles, which were computed again" in out
    assert "was complete already: nothing was computed" in run("gram", folder / "job.toml", "--no-fit-head")[1]


def test_a_stop_that_two_jobs_told_on_is_still_the_agreed_one():
    agreed = Stopped(15)
    outer = Stopped(15, "the same command goes on from here")
    outer.__cause__ = Stopped(15, "the same command goes on from here")
    outer.__cause__.__cause__ = agreed
    assert any(e is agreed for e in _chain(outer))
    assert not any(e is agreed for e in _chain(ValueError()))


@pytest.mark.parametrize("odd", ["nan", "NaN", "-inf", "Infinity"])
def test_a_label_that_is_no_number_among_numbers_is_refused(odd):
    texts = tiny_sentences(6)
    rows = [{"text": t, "label": x} for t, x in zip(texts, ["0", "1", odd, "1", "0", "1"], strict=True)]
    with pytest.raises(InputError, match=rf"column 'label' has '{odd}' among numbers, expected a class"):
        read_examples(rows)
    words = [{"text": t, "label": x} for t, x in zip(texts, ["a", "nan", "a", "b", "a", "b"], strict=True)]
    assert read_examples(words).label_names == ["a", "b", "nan"]
    with pytest.raises(InputError, match="has inf among numbers"):
        read_examples([{"text": t, "label": x} for t, x in zip(texts, [0, 1, float("inf"), 1, 0, 1], strict=True)])
