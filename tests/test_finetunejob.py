"""`ntkengine finetune`: a job file's [finetune], what flags lay over it, and what is written."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import logging

import ntkengine as ntk
from ntkengine import cli, saving
from ntkengine.errors import InputError
from ntkengine.finetunejob import run_finetune
from ntkengine.inputs import heads, streaming
from ntkengine.jobfile import make_job, read_job
from tests.tiny import save_tiny, tiny_sentences

JOB = """
[model]
path = "model"
[model.peft]
peft_type = "LORA"
r = 2
target_modules = ["query", "value"]
[data]
train = "train.tsv"
eval = "dev.tsv"
text = "sentence"
[head]
fit = {fit}
[gram]
readout = "{readout}"
[finetune]
learning_rate = 1e-2
epochs = 3
batch_size = 4
betas = [0.8, 0.9]
linear = true
"""


@pytest.fixture
def folder(tmp_path):
    save_tiny(tmp_path / "model", kind="bert")
    for name, n, seed in (("train.tsv", 14, 0), ("dev.tsv", 6, 1)):
        rows = [f"{text}\t{('bad', 'good')[i % 2]}" for i, text in enumerate(tiny_sentences(n, seed))]
        (tmp_path / name).write_text("sentence\tlabel\n" + "\n".join(rows) + "\n", encoding="utf-8")
    (tmp_path / "job.toml").write_text(JOB.format(fit="false", readout="margin"))
    return tmp_path


@pytest.fixture
def run(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return stop.value.code, shown.out, shown.err

    return call


def test_job_is_the_call(folder):
    job = read_job(folder / "job.toml")
    found = run_finetune(job)
    model = ntk.load_model(folder / "model", peft=job.model.peft)
    parts = [ntk.read_examples(folder / n, text="sentence") for n in ("train.tsv", "dev.tsv")]
    inputs, eval_inputs = (ntk.tokenize(p, model) for p in parts)
    y, eval_y = (ntk.encode_targets(p.labels, "margin", 2) for p in parts)
    wanted = ntk.fine_tune(
        model, inputs, y, job.finetune.recipe(), readout="margin", eval_inputs=eval_inputs, eval_targets=eval_y,
        linear=True,
    )  # fmt: skip
    assert found.history == wanted.history
    assert np.array_equal(found.outputs, wanted.outputs)
    assert (found.recipe.betas, found.recipe.epochs, len(found.history)) == ((0.8, 0.9), 3, 4)


def test_command_prints_and_writes_the_history(folder, run):
    code, out, err = run(
        "finetune", folder / "job.toml", "--epochs", 2, "--optimizer", "sgd", "--proximal", 0.5, "--learning-rate",
        "0.02", "--history", folder / "h.jsonl",
    )  # fmt: skip
    assert (code, "error" in err) == (0, False)
    lines = [json.loads(line) for line in (folder / "h.jsonl").read_text().splitlines()]
    recipe = lines[0]["recipe"]
    assert [recipe[k] for k in ("epochs", "optimizer", "proximal", "learning_rate", "batch_size")] == [
        2, "sgd", 0.5, 0.02, 4,
    ]  # fmt: skip
    assert [line["step"] for line in lines[1:]] == [0, 4, 8]
    assert len(lines[0]["batch_losses"]) == 8
    for word in ("Fine-tuning", "train loss", "eval loss", "KL", f"{lines[-1]['gap']:.4g}"):
        assert word in out
    code, out, err = run("finetune", folder / "job.toml", "--no-linear", "--json")
    assert code == 0
    told = json.loads(out)
    assert told["history"][-1]["linear_train_loss"] is None
    assert told["recipe"]["epochs"] == 3


def check_saved_adapter(folder, told, base):
    """Check that an adapter in `tuned` is over that model, and gives the outputs told."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    assert json.loads((folder / "tuned/adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base), folder / "tuned").eval()
    loaded = ntk.load_model(folder / "model")
    inputs = ntk.tokenize(ntk.read_examples(folder / "train.tsv", text="sentence"), loaded)
    with torch.no_grad():
        f = model(**inputs).logits.double().numpy()
    assert np.allclose(f, json.loads(told)["outputs"], atol=1e-5)


@pytest.mark.parametrize("fit", ["false", "true"])
def test_saved_adapter_gives_the_outputs_training_ended_with(folder, run, fit):
    (folder / "job.toml").write_text(JOB.format(fit=fit, readout="logits"))
    was = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        code, out, err = run("finetune", folder / "job.toml", "--save", folder / "tuned", "--json")
        assert logging.is_progress_bar_enabled()
    finally:
        if not was:
            logging.disable_progress_bar()
    assert (code, "shards" in err) == (0, False)
    check_saved_adapter(folder, out, folder / "tuned/base" if fit == "true" else folder / "model")
    assert sorted(p.name for p in folder.iterdir()) == ["dev.tsv", "job.toml", "model", "train.tsv", "tuned"]


@pytest.mark.parametrize("flags", [["--params", "trainable,*classifier*"], ["--params", "all"], ["--peft", "lora"]])
def test_what_was_trained_or_drawn_beside_an_adapter_is_saved_too(folder, run, flags):
    (folder / "job.toml").write_text(JOB.format(fit="false", readout="logits"))
    if flags[0] == "--peft":  # a head of its own seed, that nobody fits
        save_tiny(folder / "model", kind="bert", head=False)
    code, out, err = run("finetune", folder / "job.toml", "--save", folder / "tuned", "--json", *flags)
    assert code == 0, err
    check_saved_adapter(folder, out, folder / "tuned/base")


@pytest.mark.parametrize("flags", [[], ["--params", "all"], ["--head"]])
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora", "eva", "orthogonal"])
def test_an_adapter_whose_start_changes_the_weights_below_is_saved_with_these(folder, run, start, flags):
    job = JOB.format(fit="true" if flags else "false", readout="logits")
    (folder / "job.toml").write_text(job.replace("r = 2", f'r = 2\ninit_lora_weights = "{start}"'))
    if flags == ["--head"]:
        save_tiny(folder / "model", kind="bert", head=False)
    flags = ["--learning-rate", "3e-2", *(flag for flag in flags if flag != "--head")]
    code, out, err = run("finetune", folder / "job.toml", "--save", folder / "tuned", "--json", *flags)
    assert code == 0, err
    check_saved_adapter(folder, out, folder / "tuned/base")


@pytest.mark.parametrize("kind", ["LORA", "PROMPT_TUNING"])
@pytest.mark.parametrize("head", [True, False])
def test_saved_folder_opens_as_what_was_trained(folder, run, head, kind):
    job = JOB.format(fit=str(not head).lower(), readout="logits").replace("linear = true", "")
    if kind != "LORA":
        fields = 'task_type = "SEQ_CLS"\nnum_virtual_tokens = 3'
        job = job.replace('r = 2\ntarget_modules = ["query", "value"]', fields).replace("LORA", kind)
    (folder / "job.toml").write_text(job)
    save_tiny(folder / "model", kind="bert", head=head)
    code, out, err = run("finetune", folder / "job.toml", "--save", folder / "tuned", "--json")
    assert code == 0, err
    first = ntk.load_model(folder / "model", peft=read_job(folder / "job.toml").model.peft)
    (folder / "tuned").rename(folder / "moved")
    model = ntk.load_model(folder / "moved")
    trainable = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (first, model)]
    assert trainable[0] == trainable[1]
    assert not model.training
    assert not model.ntk_head_new
    assert model.ntk_source == str(folder / "moved")
    inputs = ntk.tokenize(ntk.read_examples(folder / "train.tsv", text="sentence"), model)
    with torch.no_grad():
        assert np.allclose(model(**inputs).logits.double(), json.loads(out)["outputs"], atol=1e-5)
    with pytest.raises(InputError, match="moved holds an adapter already"):
        ntk.load_model(folder / "moved", peft={"peft_type": "LORA"})
    job = (folder / "job.toml").read_text().replace('"model"', '"moved"')  # and is a job's model
    (folder / "more.toml").write_text(job[: job.index("[model.peft]")] + job[job.index("[data]") :])
    code, out, err = run("finetune", folder / "more.toml", "--save", folder / "twice", "--json", "--no-linear")
    assert code == 0, err
    with torch.no_grad():
        again = ntk.load_model(folder / "twice")(**inputs).logits.double()
    assert np.allclose(again, json.loads(out)["outputs"], atol=1e-5)


def test_adapters_that_cannot_be_opened_are_refused(folder, run):
    assert run("finetune", folder / "job.toml", "--save", folder / "tuned", "--no-linear")[0] == 0
    tuned = folder / "tuned"
    weights, config = (tuned / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    whole, said = load_file(weights), json.loads(config.read_text())
    assert ntk.load_model(tuned) is not None
    some = dict(list(whole.items())[1:])
    for change, message in (
        (lambda: save_file(some, weights), f"lacks {next(iter(whole))}"),
        (lambda: save_file({k: v[:1] for k, v in whole.items()}, weights), "cannot be put on the model below"),
        (lambda: save_file({k: v * float("nan") for k, v in whole.items()}, weights), "weights are not finite"),
        (weights.unlink, "an adapter without its weights; expected adapter_model.safetensors"),
    ):
        change()
        with pytest.raises(InputError, match=message) as caught:
            ntk.load_model(tuned)
        assert "\n" not in str(caught.value)
    save_file(whole, weights)
    for name, message in ((None, "expected base_model_name_or_path"), (str(folder / "gone"), "gone: no such model")):
        config.write_text(json.dumps(said | {"base_model_name_or_path": name}))
        with pytest.raises(InputError, match=message):
            ntk.load_model(tuned)
    config.write_text("[")
    with pytest.raises(InputError, match="expected base_model_name_or_path"):
        ntk.load_model(tuned)


def test_a_folder_that_is_another_model_is_not_handed_out(folder, run, monkeypatch):
    text = JOB.format(fit="false", readout="logits").replace("r = 2", 'r = 2\ninit_lora_weights = "pissa"')
    (folder / "job.toml").write_text(text)
    monkeypatch.setattr(saving, "_PLAIN", (True, False, "pissa"))  # the start is run again, on weights it has changed
    flags = ["--save", folder / "tuned", "--params", "all", "--learning-rate", "1e-2"]
    code, _, err = run("finetune", folder / "job.toml", *flags)
    assert (code, "gives another output of example" in err) == (1, True), err
    assert not [p for p in folder.iterdir() if "tuned" in p.name]


def test_weights_that_are_not_finite_are_not_written(folder):
    model = ntk.load_model(folder / "model")
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[90] = float("inf")
    with pytest.raises(ntk.CheckFailed, match="tuned: is not written: .*word_embeddings.weight would not be finite"):
        saving.save_model(model, folder / "tuned", False, lambda _: None)
    assert not [p for p in folder.iterdir() if "tuned" in p.name]


@pytest.mark.parametrize(
    ("flags", "head", "message"),
    [
        (["--params", "all"], True, "stays in its file, and cannot be trained; load it without stream"),
        (["--save", "tuned"], False, "stays in its file, and would not be saved; load it without stream"),
        (["--save", "tuned", "--no-linear"], True, None),
    ],
)
def test_what_is_left_in_files_is_neither_trained_nor_saved(folder, run, monkeypatch, flags, head, message):
    monkeypatch.setattr(streaming, "STREAMED", 256)
    monkeypatch.chdir(folder)
    save_tiny(folder / "model", kind="bert", head=head)
    monkeypatch.setattr(heads, "fit_head", None)  # nothing long is begun
    text = JOB.format(fit="true" if message else "false", readout="logits")
    (folder / "job.toml").write_text(text.replace('path = "model"', 'path = "model"\nstream = true'))
    code, out, err = run("finetune", "job.toml", "--json", *flags)
    if message:
        assert (code, message in err) == (2, True), err
        assert not (folder / "tuned").exists()
    else:
        assert code == 0, err
        check_saved_adapter(folder, out, "model")


def test_saved_model_is_whole(folder, run):
    flags = ["--model", folder / "model", "--data", folder / "train.tsv", "--text-column", "sentence", "--loss",
             "cross-entropy", "--learning-rate", "1e-2", "--save", folder / "tuned", "--json"]  # fmt: skip
    code, out, _ = run("finetune", *flags)
    assert code == 0
    model = ntk.load_model(folder / "tuned")
    inputs = ntk.tokenize(ntk.read_examples(folder / "train.tsv", text="sentence"), model)
    with torch.no_grad():
        assert np.allclose(model(**inputs).logits.double(), json.loads(out)["outputs"], atol=1e-5)
    code, out, err = run("finetune", *flags)
    assert (code, out) == (2, "")
    assert "tuned: is there already" in err


def test_diverging_training_writes_nothing(folder, run):
    where = folder / "h.jsonl", folder / "tuned"
    code, _, err = run("finetune", folder / "job.toml", "--learning-rate", "1e30", "--optimizer", "sgd",
                       "--history", where[0], "--save", where[1])  # fmt: skip
    assert code == 1
    assert "a lower learning rate may help" in err
    assert not any(p.exists() for p in where)


def test_results_that_cannot_be_written_are_refused_before_training(folder, run, monkeypatch):
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    for flags, message in (
        (["--history", "model"], "model: is a folder, expected the name of a file"),
        (["--history", "t", "--save", "t"], "save: expected another name than history's, got t for both"),
        (["--history", "h.jsonl", "--save", "/proc/tuned"], "/proc/tuned: folder /proc takes no file"),
    ):
        code, out, err = run("finetune", "job.toml", *flags)
        assert (code, out) == (2, "")
        assert message in err
        assert sorted(folder.iterdir()) == before


def test_bad_tables_are_named(folder):
    base = {"model": {"path": "m"}, "data": {"train": "t.tsv"}}
    for table, message in (
        ({"rate": 1.0}, "finetune: unknown key 'rate'"),
        ({}, "finetune: learning_rate: is missing"),
        ({"learning_rate": 1.0, "betas": [0.9]}, "finetune: betas"),
        ({"learning_rate": 10**400}, "finetune: learning_rate: expected a number"),
        ({"learning_rate": 1.0, "epochs": 1.5}, "finetune: epochs: expected a whole number, got 1.5"),
        ({"learning_rate": 1.0, "optimizer": "lion"}, "finetune: optimizer: expected one of adam, sgd"),
        (3, "finetune: expected a table"),
    ):
        with pytest.raises(InputError, match=message):
            make_job(base | {"finetune": table})
    with pytest.raises(InputError, match="finetune: is missing"):
        run_finetune(make_job(base))
    unlabelled = {"train": folder / "train.tsv", "text": "sentence", "label": ""}
    job = {"model": {"path": str(folder / "model")}, "data": unlabelled, "finetune": {"learning_rate": 1.0}}
    with pytest.raises(InputError, match="expected labelled examples"):
        run_finetune(make_job(job))


def test_a_history_is_part_of_a_report(folder, run):
    saved, page = folder / "h.jsonl", folder / "report.html"
    assert run("finetune", folder / "job.toml", "--epochs", 2, "--history", saved)[0] == 0
    last = json.loads(saved.read_text().splitlines()[-1])
    assert run("report", saved, "-o", page)[0] == 0
    text = page.read_text(encoding="utf-8")
    assert all(
        f"<td>{last[name]:.4g}</td>" in text for name in ("train_loss", "eval_loss", "displacement", "relative_gap")
    )
    assert 'alt="measured losses by step"' in text
    whole = saved.read_text()
    for broken in ("", whole.splitlines()[0], "[]\n", whole.replace('"train_loss": ', '"loss": '), "\x00"):
        (folder / "broken.jsonl").write_text(broken)
        code, _, err = run("report", folder / "broken.jsonl", "-o", page)
        assert (code, "written by `ntkengine finetune --history`" in err) == (2, True), broken
        assert page.read_text(encoding="utf-8") == text


def test_a_full_disk_is_told_in_a_line(folder, run, monkeypatch):
    def full(*_args, **_more):
        raise SafetensorError("Error while serializing: I/O error: File too large (os error 27)")

    monkeypatch.setattr("peft.peft_model.safe_save_file", full)
    code, _, err = run("finetune", folder / "job.toml", "--save", folder / "tuned")
    assert code == 1
    assert err.splitlines()[-1].startswith(f"error: {folder / 'tuned'}: is not written: ")
    assert sorted(p.name for p in folder.glob("*tuned*")) == []
