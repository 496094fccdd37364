"""`ntkengine select`: candidates ranked from a job, with and without held-out text, and the best as a configuration."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import peft
import pytest

from ntkengine.errors import InputError
from ntkengine.jobfile import read_job
from ntkengine.jobflags import collect
from ntkengine.selectjob import run_select
from tests.test_finetunejob import JOB, folder, run  # noqa: F401  (fixtures)


@pytest.fixture
def job(folder, monkeypatch):  # noqa: F811
    monkeypatch.chdir(folder)
    (folder / "job.toml").write_text(JOB.format(fit="true", readout="margin"))
    return folder / "job.toml"


def test_types_are_ranked_and_the_best_is_written(job, run):  # noqa: F811
    code, out, _ = run("select", job, "--emit", job.parent / "peft.json", "--json", "--repeats", 2)
    assert code == 0
    told = json.loads(out)
    losses = [c["eval_loss"][0] for c in told["choices"]]
    assert losses == sorted(losses)
    assert {c["name"] for c in told["choices"]} >= {"attention.self.query", "intermediate.dense"}
    assert all(c["kernel"]["condition"] and c["chance"] > 0 for c in told["choices"])
    assert not any("classifier" in m or "pooler" in m for c in told["choices"] for m in c["modules"])
    written = json.loads((job.parent / "peft.json").read_text())
    assert written == told["peft"]
    config = peft.LoraConfig(**{k: v for k, v in written.items() if k != "peft_type"})
    assert config.r == 2
    assert set(config.target_modules) == set(told["choices"][0]["modules"])


def test_what_was_emitted_is_an_adapter_for_other_commands(job, run):  # noqa: F811
    emitted = job.parent / "peft.json"
    assert run("select", job, "--emit", emitted, "--repeats", 1, "--no-kernels")[0] == 0
    wanted = json.loads(emitted.read_text())
    assert collect(peft=str(emitted))[1]["model"]["peft"] == {"peft_type": "LORA", **wanted}
    assert run("finetune", job, "--peft", emitted, "--epochs", 1)[0] == 0
    for text, message in (("[1]", "expected an adapter's fields by name, got list"), ("{", "--peft: ")):
        emitted.write_text(text)
        code, _, err = run("finetune", job, "--peft", emitted)
        assert (code, message in err) == (2, True)
    assert run("plan", job, "--peft", "none.json")[0] == 2


def test_the_table_says_what_it_assumes(job, run):  # noqa: F811
    code, out, _ = run("select", job, "--subsets", "layers", "--no-kernels", "--repeats", 1)
    assert code == 0
    assert "layer 0" in out
    assert "Intervals add the draw of eval examples" in out


def test_without_held_out_text_folds_are_used(job):
    text = job.read_text().replace('eval = "dev.tsv"\n', "") + "seed = 3\n"
    job.write_text(text.replace("fit = true", "fit = true\nfolds = 3"))
    found = run_select(read_job(job), subsets="layers", repeats=1, kernels=False)
    assert len(found.choices) == 3
    assert any(line.startswith("Every example is scored out of its fold") for line in found.assumptions)
    still = read_job(job)
    still = replace(still, finetune=replace(still.finetune, learning_rate=1e-14))
    still = run_select(still, subsets="layers", repeats=1, kernels=False)
    end = still.choices[0].outcome
    assert found.start == still.start
    assert still.start.eval_loss == pytest.approx(end.eval_loss, rel=1e-6)
    assert still.start.train_loss == pytest.approx(end.train_loss, rel=1e-6)
    job.write_text(text.replace("fit = true", "fit = false"))
    with pytest.raises(InputError, match="data.eval: expected held-out examples"):
        run_select(read_job(job), subsets="layers", repeats=1, kernels=False)


def test_a_fold_with_all_examples_of_a_label_is_refused(job):
    job.write_text(job.read_text().replace('eval = "dev.tsv"\n', ""))
    rows = (job.parent / "train.tsv").read_text().splitlines()
    label = rows[1].rpartition("\t")[2]
    other = next(row.rpartition("\t")[2] for row in rows[1:] if not row.endswith(f"\t{label}"))
    rows = [rows[0], *(f"{row.rpartition(chr(9))[0]}\t{other if i == 3 else label}" for i, row in enumerate(rows[1:]))]
    (job.parent / "train.tsv").write_text("\n".join(rows) + "\n")
    with pytest.raises(InputError, match=r"data.train: expected two labels among the examples without fold \d of 5"):
        run_select(read_job(job), subsets="layers", repeats=1, kernels=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--subsets", "best"], "subsets: expected one of single"),
        (["--repeats", "0"], "repeats: expected an integer >= 1, got 0"),
        (["--size", "0"], "size: expected an integer >= 1, got 0"),
        (["--peft", "ia3"], "peft_type: expected LORA"),
        (["--readout", "loss"], "expected labelled examples and readout"),
        (["--out", "k.h5"], "name the file of the best configuration with --emit"),
        (["--emit", "nowhere/peft.json"], "folder nowhere does not exist"),
        (["--epochs", "0"], "epochs: expected an integer >= 1"),
        (["--emit", "model"], "model: is a folder, expected the name of a file"),
        (["--emit", "x.json", "--save", "x.json"], "save: expected another name than emit's, got x.json for both"),
        (["--memory-gib", "0.00001"], "memory_gib: expected room for the factors"),
        (["--params", "*LayerNorm*"], "gram.params: expected weights in numbered layers"),
        (["--rank", "0"], "model.peft.r: expected an integer >= 1, got 0"),
        (["--alpha", "-1"], "model.peft.lora_alpha: expected a number > 0, got -1"),
    ],
)
def test_bad_input_is_one_line(job, run, arguments, message):  # noqa: F811
    code, out, err = run("select", job, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--subsets", "best"], "subsets: expected one of single, layers, types, greedy, all, got 'best'"),
        (["--subsets", "all"], "subsets 'all': expected at most 1, these are"),
        (["--repeats", "0"], "repeats: expected an integer >= 1"),
        (["--size", "0"], "size: expected an integer >= 1"),
    ],
)
def test_what_is_searched_is_checked_before_the_sweep(job, run, arguments, message, monkeypatch):  # noqa: F811
    monkeypatch.setattr("ntkengine.gram.linear.tangent_factors", lambda *_, **__: pytest.fail("swept"))
    monkeypatch.setattr("ntkengine.forecast.candidates._LARGEST", 1)
    code, _, err = run("select", job, *arguments)
    assert (code, message in err) == (2, True), err


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("use_rslora = true", "model.peft.use_rslora: expected none"),
        ("rank_pattern = {query = 4}", "model.peft.rank_pattern: expected none"),
        ('r = "two"', "model.peft.r: expected an integer >= 1, got 'two'"),
        ('lora_alpha = "x"', "model.peft.lora_alpha: expected a number > 0, got 'x'"),
    ],
)
def test_adapters_that_are_not_rehearsed_are_refused(job, field, message):
    text = job.read_text()
    job.write_text(text.replace("r = 2", field if field.startswith("r =") else f"r = 2\n{field}"))
    with pytest.raises(InputError, match=message):
        run_select(read_job(job))


def test_only_what_the_job_selects_is_ranked(job):
    job.write_text(job.read_text().replace("[gram]", '[gram]\nparams = ["*query.weight", "classifier.weight"]'))
    found = run_select(read_job(job), subsets="types", repeats=1, kernels=False)
    assert [c.name for c in found.choices] == ["attention.self.query"]


def test_progress_tells_its_steps_and_the_table_what_an_infinite_bound_is(job):
    seen = []
    found = run_select(read_job(job), lambda *now: seen.append(now[2]), repeats=1)
    steps = [stage.partition(":")[0] for stage in seen if stage.startswith("step ")]
    assert list(dict.fromkeys(steps)) == ["step 1 of 3", "step 2 of 3", "step 3 of 3"]
    assert steps == sorted(steps)
    (first, *rest) = found.choices
    endless = replace(found, choices=[replace(first, weyl=(0.0, 1.0)), *rest])
    assert "∞" in endless.table()[1][-1]
    assert "a bound is ∞ where" in endless.table_note
    assert "∞" not in replace(found, choices=[replace(first, weyl=(0.5, 1.0))]).table_note


def test_a_job_without_training_is_refused(job):
    text = job.read_text()
    job.write_text(text[: text.index("[finetune]")])
    with pytest.raises(InputError, match="finetune: is missing"):
        run_select(read_job(job))


def test_a_ranking_is_part_of_a_report(job, run, tmp_path):  # noqa: F811
    saved, page = tmp_path / "ranking.json", tmp_path / "report.html"
    assert run("select", job, "--save", saved, "--repeats", 1, "--no-kernels")[0] == 0
    assert run("report", saved, "-o", page)[0] == 0
    text = page.read_text(encoding="utf-8")
    assert "Which modules to adapt" in text
    assert re.search(r"parameters\): eval loss [\d.]+ → [\d.]+ \(", text)
    assert "<td>before training</td><td>0</td>" in text
    assert "attention.self.query" in text
    broken = tmp_path / "broken.json"
    good = json.loads(saved.read_text())
    unnamed, crossed, endless = (json.loads(json.dumps(good)) for _ in range(3))
    older = {name: part for name, part in good.items() if name != "start"} | {"assumptions": []}
    broken.write_text(json.dumps(older))
    assert run("report", broken, "-o", page)[0] == 0
    assert "before training" not in page.read_text(encoding="utf-8").lower()
    del unnamed["choices"][0]["modules"]
    crossed["choices"][0]["eval_loss"] = [0.5, 0.9, 0.1]
    endless["choices"][0]["parameters"] = float("inf")
    for content in ("[]", "{", '{"choices": []}', "null", *map(json.dumps, (unnamed, crossed, endless))):
        broken.write_text(content)
        code, _, err = run("report", broken, "-o", page)
        assert code == 2
        assert "expected a ranking" in err
    assert run("report", tmp_path / "none.json", "-o", page)[0] == 2


def test_one_held_out_example_has_no_interval_and_its_ranking_is_still_json_and_reported(job, run, tmp_path):  # noqa: F811
    lines = (job.parent / "dev.tsv").read_text().splitlines()
    (job.parent / "dev.tsv").write_text("\n".join(lines[:2]) + "\n")
    saved, page = tmp_path / "ranking.json", tmp_path / "report.html"
    assert run("select", job, "--save", saved, "--no-kernels", "--repeats", 1)[0] == 0

    def refuse(word):
        raise AssertionError(word)

    told = json.loads(saved.read_text(), parse_constant=refuse)
    assert told["choices"][0]["eval_loss"][2] is None
    assert run("report", saved, "-o", page)[0] == 0
