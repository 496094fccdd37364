"""Job files: every key checked; a job from files to a Gram file; what is read off it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ntk_kernels import runtime

from ntkengine import gramfiles, jobs, store
from ntkengine.errors import InputError
from ntkengine.forecast import CrossFit, forecast
from ntkengine.forecast import cross_fit as make_cross_fit
from ntkengine.gram import heldout
from ntkengine.gram.engine import compute_gram
from ntkengine.inputs.examples import read_examples, tokenize
from ntkengine.inputs.heads import fit_head
from ntkengine.inputs.models import load_model
from ntkengine.inputs.readout import encode_targets
from ntkengine.jobfile import make_job, merged, read_job
from ntkengine.report.planned import plan_table
from ntkengine.spectrum import condition_number
from ntkengine.store import open_gram
from tests.brute import tiny_inputs, tiny_model
from tests.tiny import save_tiny, tiny_sentences

JOB = """
out = "k.h5"
[model]
path = "model"
num_labels = 2
[model.peft]
peft_type = "LORA"
r = 2
target_modules = ["query", "value"]
[data]
train = "train.tsv"
eval = "dev.tsv"
text = "sentence"
label = "label"
[head]
fit = true
[gram]
readout = "margin"
per_module = true
memory_gib = 8
[forecast]
ridge = "gcv"
"""


def write_rows(path, n, seed, labels=("bad", "good")):
    rows = [f"{text}\t{labels[i % len(labels)]}" for i, text in enumerate(tiny_sentences(n, seed))]
    path.write_text("sentence\tlabel\n" + "\n".join(rows) + "\n", encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    save_tiny(tmp_path / "model", kind="bert")
    write_rows(tmp_path / "train.tsv", 14, 0)
    write_rows(tmp_path / "dev.tsv", 6, 1)
    (tmp_path / "job.toml").write_text(JOB)
    return tmp_path


def test_job_file_and_what_overrides_it(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    path = tmp_path / "job.toml"
    path.write_text(JOB)
    job = read_job(path, {"model": {"peft": {"r": 4}, "dtype": None}, "data": {"limit": 3}, "head": {"fit": False}})
    assert job.out == tmp_path / "k.h5"
    assert job.model.path == str(tmp_path / "model")
    assert job.model.peft == {"peft_type": "LORA", "r": 4, "target_modules": ["query", "value"]}
    assert job.model.dtype == "float32"
    assert (job.data.train, job.data.eval) == (tmp_path / "train.tsv", tmp_path / "dev.tsv")
    assert (job.data.limit, job.head.fit, job.gram.per_module, job.forecast.ridge) == (3, False, True, "gcv")
    assert job.gram.memory_gib == 8.0
    told = job.settings()
    assert not {"memory_gib", "resume", "checkpoint_s", "backend"} & told["gram"].keys()
    assert "forecast" not in told
    # The same job started from elsewhere is the same job.
    monkeypatch.chdir(tmp_path)
    assert read_job("job.toml").settings() == read_job(path).settings()


def test_a_hub_id_is_left_alone(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text('[model]\npath = "org/name"\n[data]\ntrain = "a.tsv"\n')
    assert read_job(path).model.path == "org/name"


def test_merged_ignores_none_and_keeps_what_it_covers():
    below = {"a": {"x": 1, "y": 2}, "b": 3}
    assert merged(below, {"a": {"x": None, "y": 5}, "b": None, "c": {"z": None}}) == {"a": {"x": 1, "y": 5}, "b": 3}
    assert below == {"a": {"x": 1, "y": 2}, "b": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[modle]\n", r"unknown key 'modle'; did you mean 'model'\?"),
        ("[gram]\nper_modules = true\n", r"gram: unknown key 'per_modules'; did you mean 'per_module'\?"),
        ("[data]\nzzz = 1\n", r"data: unknown key 'zzz'; expected one of train, eval, text"),
        ("[model]\npath = 3\n", "model: path: expected text, got 3"),
        ("[gram]\nper_module = 1\n", "gram: per_module: expected true or false, got 1"),
        ("[data]\ntrain = 'a'\nlimit = true\n", "data: limit: expected a whole number, got True"),
        ("[data]\ntrain = 'a'\nlimit = 2.5\n", "data: limit: expected a whole number, got 2.5"),
        ("[gram]\nparams = []\n", r"gram: params: expected text or a list of texts, got \[\]"),
        ("[gram]\nmemory_gib = 'x'\n", "gram: memory_gib: expected a number, got 'x'"),
        ("gram = 1\n", "gram: expected a table, got 1"),
        ("[model]\ndtype = 'float32'\n", "model: path: is missing"),
        ("[model]\npath = 'm'\n", "data: train: is missing"),
        ("[model\n", "not a readable TOML file"),
    ],
)
def test_job_files_that_are_refused(tmp_path, text, message):
    path = tmp_path / "job.toml"
    # What is missing is only told once everything that is there is right.
    needed = {"model": "[model]\npath = 'm'\n", "data": "[data]\ntrain = 'a.tsv'\n"}
    rest = "" if "missing" in message else "".join(t for name, t in needed.items() if f"[{name}]" not in text)
    path.write_text(text + rest)
    with pytest.raises(InputError, match=message) as caught:
        read_job(path)
    assert str(path) in str(caught.value)


def test_missing_job_file(tmp_path):
    with pytest.raises(InputError, match=r"none.toml: no such file"):
        read_job(tmp_path / "none.toml")


def test_a_job_from_files_to_a_file(folder, monkeypatch):
    told = []
    gram = jobs.run_gram(read_job(folder / "job.toml"), lambda done, total, stage: told.append((done, total, stage)))
    assert gram.path == folder / "k.h5"
    assert gram.shape == (14, 14)
    assert gram.cross.shape == (6, 14)
    np.testing.assert_array_equal(gram.targets[:, 0], [-1.0, 1.0] * 7)
    np.testing.assert_array_equal(gram.eval_targets[:, 0], [-1.0, 1.0] * 3)
    settings = gram.meta["settings"]
    assert settings["head"]["fitted"] is True
    assert settings["classes"] == ["bad", "good"]
    fold = gram.extras["fold"]
    held = gram.extras["fold_outputs"][fold, np.arange(14)]
    assert gram.extras["fold_grams"].shape == (5, 14, 14)
    assert held.shape == (14, 1)
    # A head fitted on a label is nearer to it than one that never saw it; targets of the margin are ±1.
    assert np.mean((gram.outputs - gram.targets) ** 2) < np.mean((held - gram.targets) ** 2)
    assert gram.meta["example_id"][0].startswith("train.tsv:")
    assert {stage for _, total, stage in told if total <= 1} >= {"reading examples", "loading the model"}
    assert told[-1][0] == told[-1][1] > 1
    shares = [done / total for done, total, _ in told if total > 1]
    assert shares == sorted(shares)  # the Gram and those under held-out heads are one piece of work
    assert shares[-1] == 1
    whole = next(total for _, total, _ in told if total > 1)  # as if each of five heads took a Gram
    first = next((done, total) for done, total, stage in told if stage == "held-out heads")
    assert whole / 6 <= first[0] < first[1] == told[-1][1] < whole  # in flops that are really made

    found = gramfiles.forecast_file(folder / "k.h5")
    cross_fit = CrossFit(fold, gram.extras["fold_grams"], gram.extras["fold_outputs"])
    direct = forecast(gram, gram.targets, cross_fit=cross_fit)
    assert found.loo == direct.loo
    assert found.start["held_out_mse"] == pytest.approx(np.mean((held - gram.targets) ** 2))
    np.testing.assert_array_equal(found.eval_mse, direct.eval_mse)

    # The same from Python: kernels and heads that did not see the example.
    train = read_examples(folder / "train.tsv", text="sentence", label="label")
    model = load_model(folder / "model", num_labels=2, peft=read_job(folder / "job.toml").model.peft)
    inputs = tokenize(train, model)
    head = fit_head(model, inputs, encode_targets(train.labels, "logits", 2) / 2)
    same = make_cross_fit(model, inputs, head, readout="margin")
    np.testing.assert_array_equal(same.fold, fold)
    np.testing.assert_allclose(same.grams, gram.extras["fold_grams"], rtol=1e-6)
    np.testing.assert_allclose(same.outputs, gram.extras["fold_outputs"], rtol=1e-6)

    written = (folder / "k.h5").read_bytes()
    again = jobs.run_gram(read_job(folder / "job.toml"))
    np.testing.assert_array_equal(np.asarray(again), np.asarray(gram))
    assert (folder / "k.h5").read_bytes() == written

    # Another job is told before a model is loaded.
    monkeypatch.setattr("ntkengine.inputs.models.load_model", None)
    for change, message in [
        ({"gram": {"precision": "exact"}}, "gram.precision is 'high' there, 'exact' here"),
        ({"model": {"peft": {"r": 3}}}, "model.peft.r is '2' there, '3' here"),
        ({"data": {"limit": 12}}, "data.limit is not set there, '12' here"),
    ]:
        with pytest.raises(InputError, match=message):
            jobs.run_gram(read_job(folder / "job.toml", change))
    assert (folder / "k.h5").read_bytes() == written


def test_without_class_targets_there_are_no_held_out_grams_and_no_forecast(folder, run):
    job = read_job(folder / "job.toml", {"gram": {"readout": "loss"}})
    assert jobs.run_plan(job).held_out_grams == 0
    gram = jobs.run_gram(job)
    assert (set(gram.extras), gram.targets) == ({"head_weights"}, None)
    assert gram.meta["settings"]["head"]["fitted"] is True
    message = "k.h5: is of readout 'loss', which has no class targets to forecast; compute it with readout 'logits' or"
    for command in ("forecast", "ridge"):
        code, _, err = run(command, folder / "k.h5")
        assert (code, message in err) == (2, True), err


def test_a_job_that_ended_among_its_held_out_heads_goes_on_there(folder, monkeypatch):
    monkeypatch.setattr(heldout, "_has_room", lambda *_: False)  # one after the other

    class Killed(BaseException):
        pass

    wanted = jobs.run_gram(read_job(folder / "job.toml", {"out": folder / "whole.h5"}))
    write, folds = store.write_gram, []

    def third(path, *rest):
        folds.append(path.name)
        if len(folds) == 3:
            raise Killed
        write(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_gram", third)
        with pytest.raises(Killed):
            jobs.run_gram(read_job(folder / "job.toml"))
    assert folds == ["held-out-0.h5", "held-out-1.h5", "held-out-2.h5"]
    with pytest.raises(InputError, match=r"parts holds an unfinished run of another job: gram.precision is 'high'"):
        jobs.run_gram(read_job(folder / "job.toml", {"gram": {"precision": "exact"}}))
    folds.append("")
    monkeypatch.setattr(store, "write_gram", third)
    got = jobs.run_gram(read_job(folder / "job.toml"))
    assert folds[4:] == ["held-out-2.h5", "held-out-3.h5", "held-out-4.h5", "k.h5"]
    np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted))
    for name, array in wanted.extras.items():
        np.testing.assert_array_equal(got.extras[name], array)
    assert got.meta["resumed"] == len(got.plan.parameters)
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_a_job_that_ended_after_its_held_out_heads_does_not_do_them_again(folder, monkeypatch):
    wanted = jobs.run_gram(read_job(folder / "job.toml", {"out": folder / "whole.h5"}))
    write, names = store.write_gram, []

    def full(path, *rest):
        names.append(path.name)
        if len(names) == 2:
            raise OSError("no space left")
        write(path, *rest)

    monkeypatch.setattr(store, "write_gram", full)
    with pytest.raises(OSError, match="no space left"):
        jobs.run_gram(read_job(folder / "job.toml"))
    got = jobs.run_gram(read_job(folder / "job.toml"))
    assert names == ["held-out.h5", "k.h5", "k.h5"]
    for name, array in wanted.extras.items():
        np.testing.assert_array_equal(got.extras[name], array)


def test_plan_is_of_the_same_job_and_writes_nothing(folder):
    stages = []
    plan = jobs.run_plan(read_job(folder / "job.toml"), lambda _done, _total, stage: stages.append(stage))
    assert stages == ["reading examples", "loading the model", "tokenizing", "probing and timing a few examples"]
    assert plan.samples == 20
    assert (plan.outputs, plan.held_out_grams) == (1, 5)
    assert plan.held_out_seconds > 0
    assert " s for 5 more Grams of the train examples, under held-out heads" in plan_table(plan).note
    assert all("lora_" in row.parameter for row in plan.parameters)
    assert not (folder / "k.h5").exists()


def test_logits_head_and_three_classes(folder):
    write_rows(folder / "three.tsv", 15, 2, ("a", "b", "c"))
    save_tiny(folder / "three", num_labels=3)
    base = {"out": folder / "three.h5", "model": {"path": str(folder / "three")}, "head": {"fit": True}}
    job = make_job(base | {"data": {"train": folder / "three.tsv", "text": "sentence"}})
    gram = jobs.run_gram(job)
    assert gram.outputs.shape == gram.targets.shape == gram.extras["fold_outputs"].shape[1:] == (15, 3)
    assert set(np.unique(gram.targets)) == {-1.0, 1.0}
    assert gramfiles.forecast_file(gram).outputs == 3


def test_what_is_refused_leaves_no_file(folder, monkeypatch):
    changes = [
        ({"model": {"num_labels": 1}}, "num_labels: expected at least 2"),
        ({"gram": {"readout": "nothing"}}, "readout: expected one of"),
        ({"gram": {"params": "*.none"}}, "matches no parameter"),
        ({"gram": {"contraction": "none"}}, "contraction: expected one of"),
        ({"gram": {"transform": "none"}}, "transform: expected one of"),
        ({"data": {"label": ""}, "head": {"fit": True}}, "head.fit: expected labels"),
        ({"out": folder / "none" / "k.h5"}, "folder .*none does not exist"),
        ({"model": {"num_labels": 3}}, "readout 'margin': expected 2 classes, got 3"),
    ]
    before = sorted(p.name for p in folder.iterdir())
    for change, message in changes:
        with pytest.raises(InputError, match=message):
            jobs.run_gram(read_job(folder / "job.toml", change))
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="use backend='torch'"):
        jobs.run_gram(read_job(folder / "job.toml", {"gram": {"backend": "triton"}}))
    assert sorted(p.name for p in folder.iterdir()) == before


def test_unlabelled_data_gives_a_gram_without_forecast(folder):
    gram = jobs.run_gram(read_job(folder / "job.toml", {"data": {"label": ""}, "head": {"fit": False}}))
    assert gram.targets is None
    assert not gram.extras
    with pytest.raises(InputError, match="holds no targets"):
        gramfiles.forecast_file(gram)
    (section,) = gramfiles.report_files([folder / "k.h5"])
    assert list(section.figures) == ["spectrum"]
    assert section.verdict == [f"No targets: spectrum only; condition number {condition_number(gram)}."]


@pytest.fixture
def small():
    model = tiny_model("bert", num_labels=2)
    y = np.array([[1.0, -1.0], [-1.0, 1.0]])[[0, 1, 0, 1, 1]]
    return model, tiny_inputs(model, [5, 3, 4, 6, 2], 6), {"targets": y, "params": "*.layer.2.*"}


def test_a_fitted_head_without_held_out_heads_is_a_leak(small, tmp_path):
    model, inputs, arguments = small
    job = {"head": {"fitted": True}}
    gram = compute_gram(model, inputs, **arguments, job=job)
    with pytest.raises(InputError, match="head fitted on these targets"):
        gramfiles.forecast_file(gram)
    K = np.asarray(gram)
    held = {"fold": np.array([0, 1, 0, 1, 1]), "fold_grams": np.stack([K, K]), "fold_outputs": np.zeros((2, 5, 2))}
    compute_gram(model, inputs, **arguments, job=job, extras=held, out=tmp_path / "k.h5")
    found = gramfiles.forecast_file(tmp_path / "k.h5", ridge="gcv")
    assert found.start["held_out_mse"] == 1.0
    assert found.ridge == found.ridge_gcv


def test_the_sum_of_outputs_cannot_be_forecast(small):
    model, inputs, arguments = small
    gram = compute_gram(model, inputs, **arguments, contraction="sum-of-outputs")
    with pytest.raises(InputError, match="'sum-of-outputs' is the kernel of the sum of 2 outputs"):
        gramfiles.forecast_file(gram)


def test_report_sets_files_side_by_side(small, tmp_path):
    model, inputs, arguments = small
    for name in ("a.h5", "b.h5"):
        compute_gram(model, inputs, **arguments, out=tmp_path / name)
    side, first, second = gramfiles.report_files([tmp_path / "a.h5", tmp_path / "b.h5"])
    assert side.title == "Side by side"
    assert side.tables[0].columns == ("", str(tmp_path / "a.h5"), str(tmp_path / "b.h5"))
    assert first.figures.keys() == second.figures.keys() == {"spectrum", "risk", "curve", "modules"}
    found = gramfiles.forecast_file(open_gram(tmp_path / "a.h5"))
    assert list(first.notes) == found.assumptions


def test_a_forecast_of_a_job_whose_files_were_changed_since_says_so(folder, run, caplog):
    path = folder / "job.toml"
    jobs.run_gram(read_job(path))
    code, first, _ = run("forecast", path)
    assert code == 0
    data = folder / "train.tsv"
    lines = data.read_text().splitlines()
    data.write_text("\n".join([lines[0], *(line.replace("good", "fine") for line in lines[1:]), ""]) + "\n")
    caplog.clear()
    assert run("forecast", path)[:2] == (0, first)
    assert "data.train: what is there is not byte for byte what " in caplog.text
    caplog.clear()
    assert run("forecast", folder / "k.h5")[0] == 0
    assert "byte" not in caplog.text
    data.write_text("\n".join(lines) + "\n")
    weights = next((folder / "model").glob("*.safetensors"))
    was = weights.read_bytes()
    weights.write_bytes(was[:-4] + bytes(4))
    run("forecast", path)
    assert "model.path: what is there is not byte for byte" in caplog.text
    weights.write_bytes(was)
    caplog.clear()
    assert run("forecast", path)[1] == first
    assert "byte" not in caplog.text
    assert set(open_gram(folder / "k.h5").meta["settings"]["sources"]) >= {"data.train", "model.path"}
