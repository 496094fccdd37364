"""Sketched Grams: right in the mean, as far off as they say, the same in every layout, and never silent."""

from __future__ import annotations

import copy
import json
import logging
import re

import numpy as np
import pytest
import torch
from transformers.pytorch_utils import Conv1D

from ntkengine import cli
from ntkengine.digits import above
from ntkengine.errors import CheckFailed, InputError
from ntkengine.gram import finer, planning
from ntkengine.gram.engine import compute_gram
from ntkengine.gram.foresight import plan_gram
from ntkengine.gram.transforms import Preconditioner
from ntkengine.report import tables
from ntkengine.report.planned import plan_table
from ntkengine.store import open_gram
from ntkengine.tangents import projection, sketch
from ntkengine.tangents.factors import Dense, Lookup, Outer
from ntkengine.tangents.projection import Projection
from ntkengine.tangents.sketch import Sketch, sketch_of
from tests.brute import contracted, gradients, relative_error, tiny_inputs, tiny_model, with_lora
from tests.test_layout import LAYOUTS, forced
from tests.tiny import save_tiny, tiny_sentences

LENGTHS = [3, 9, 12, 5, 7, 1, 8]
WEIGHTS = ["*layer.*weight", "!*Norm*"]  # of the tiny BERT: where its Gram is not one of exact small parameters
CPU = torch.float64, torch.device("cpu")


def drawn(found):
    return Projection(found, *CPU)


@pytest.mark.parametrize("blocks", [(1, (4, 3)), (3, (4, 2)), (2, (5, 4)), (1, (12, 2)), (1, (12, 9))])
def test_mean_and_variance_are_those_of_the_formula(blocks):
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(12, 9, generator=generator, dtype=torch.float64)
    G, H = G, G + torch.randn(12, 9, generator=generator, dtype=torch.float64)
    pair = Dense(torch.stack([G, H])[:, None])
    found = []
    for seed in range(2500):
        X = drawn(Sketch("w", 12, 9, *blocks, seed))([pair])[0].g.flatten(1)
        found.append(float(X[0] @ X[1]))
    V, W, inner = G @ H.T, G.T @ H, float((G * H).sum())
    size = float(G.norm() * H.norm()) ** 2
    VV, WW = float(V.norm()) ** 2, float(W.norm()) ** 2
    terms = [[inner**2, WW, float((W * W.T).sum())], [VV, size, VV], [float((V * V.T).sum()), WW, inner**2]]
    one = Sketch("w", 12, 9, *blocks, 0)
    variance = float((one.coefficients() * terms).sum()) - inner**2
    assert abs(np.mean(found) - inner) <= 4 * np.sqrt(max(variance, 1e-20) / 2500)
    assert np.var(found) == pytest.approx(variance, rel=0.15, abs=1e-18)
    assert variance <= one.variance * size + 1e-18


def test_the_error_falls_as_one_over_root_k():
    for shape in ((4096, 4096), (4096, 11008), (30522, 2048)):
        found = [sketch_of("w", shape, "outer", 32, 2, k, 0) for k in (256, 1024, 4096)]
        deviations = [np.sqrt(s.variance) for s in found]
        assert all(s.features <= k for s, k in zip(found, (256, 1024, 4096), strict=True))
        assert all(1.9 < a / b < 2.2 for a, b in zip(deviations, deviations[1:], strict=False))


@pytest.mark.parametrize("shape", [(384, 384), (2, 768), (768, 2), (5000, 1), (1, 5000), (30522, 64), (7, 31)])
@pytest.mark.parametrize("k", [1, 2, 10, 200, 1000])
def test_any_shape_and_size(shape, k):
    found = sketch_of("w", shape, "mixed", 0, 2, k, 0)
    if shape[0] * shape[1] <= k:
        assert found is None
        return
    assert 1 <= found.features <= k
    assert all(c <= f for c, f in zip(found.projected, found.folded, strict=True))
    assert 0 < found.variance < 9


def uses(R, I):  # noqa: E741
    generator = torch.Generator().manual_seed(1)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    ids = torch.randint(R, (3, 4), generator=generator)
    return [Outer(normal(3, 5, I), normal(3, 2, 5, R)), Lookup(ids, normal(3, 2, 4, I)), Dense(normal(3, 2, R, I))]


@pytest.mark.parametrize("shape", [(40, 30), (6, 40), (40, 3), (40, 1), (1, 40)])
@pytest.mark.parametrize("k", [5, 30, 110])
def test_uses_of_all_kinds_are_projected_alike(monkeypatch, shape, k):
    monkeypatch.setattr(sketch, "FOLDED", 24)  # so that long sides are folded
    sketch._best.cache_clear()
    found = sketch_of("w", shape, "mixed", 0, 2, k, 0)
    if found is None:
        return
    R, I = shape  # noqa: E741
    project, given = drawn(found), uses(R, I)
    whole = torch.zeros(3, 2, R, I, dtype=torch.float64)
    for use in given:
        dense = torch.empty(3, 2, R, I, dtype=torch.float64)
        use.block(slice(0, R), slice(0, I), dense, add=False)
        whole += dense
        torch.testing.assert_close(project([use])[0].g, project([Dense(dense)])[0].g, rtol=1e-12, atol=1e-12)
    assert project([]) == []
    torch.testing.assert_close(project(given)[0].g, project([Dense(whole)])[0].g, rtol=1e-12, atol=1e-12)
    assert project(given)[0].g.shape == (3, 2, *found.shape)
    sketch._best.cache_clear()


def test_random_numbers_depend_on_seed_and_name_only():
    basis = [drawn(Sketch(name, 9, 8, 1, (3, 3), seed)).rows.basis for name, seed in (("a", 0), ("b", 0), ("a", 1))]
    assert not torch.allclose(basis[0], basis[1])
    assert not torch.allclose(basis[0], basis[2])
    assert torch.equal(basis[0], drawn(Sketch("a", 9, 8, 1, (3, 3), 0)).rows.basis)
    assert Sketch("a", 9, 8, 1, (3, 3), 0).entropy == 8342909361095637454  # in every process and on every machine


def tied():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_embd=16, n_layer=2, n_head=2, n_positions=32, pad_token_id=0)
    return GPT2LMHeadModel(config).eval()


def albert():
    from transformers import AlbertConfig, AlbertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "embedding_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = AlbertConfig(vocab_size=97, **sizes, intermediate_size=64, max_position_embeddings=64, pad_token_id=0)
    return AlbertForSequenceClassification(config).eval()


def words(out, one):
    last = one["attention_mask"].sum(1) - 1
    return out.logits[torch.arange(len(last)), last][:, [5, 9]]


MODELS = {
    "bert": (lambda: tiny_model("bert"), "logits"),
    "gpt2: transposed": (lambda: tiny_model("gpt2"), "logits"),
    "tied embeddings": (tied, words),
    "a layer used three times": (lambda: albert(), "logits"),
    "LoRA": (lambda: with_lora(tiny_model("bert"), ["query", "value"], away_from_start=True), "logits"),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_gram_is_that_of_projected_gradients(monkeypatch, name):
    build, readout = MODELS[name]
    model = build()
    inputs, held = tiny_inputs(model, LENGTHS, 12), tiny_inputs(model, [4, 12, 6], 12, seed=1)
    chosen = {}
    right = planning.choose_sketches
    monkeypatch.setattr(planning, "choose_sketches", lambda *a: chosen.update(right(*a)) or chosen)
    k = 30 if name == "LoRA" else 200
    params = "trainable" if name == "LoRA" else "all"
    gram = compute_gram(
        model, inputs, eval_inputs=held, params=params, readout=readout, precision="exact", per_module=True, sketch=k
    )
    shapes = {row.parameter: (row.rows, row.columns) for row in gram.plan.parameters}
    both = {key: torch.cat([inputs[key], held[key]]) for key in inputs}
    G = gradients(model, both, shapes.keys(), readout if callable(readout) else None)
    features, at = [], 0
    for parameter, p in model.named_parameters():
        if parameter not in shapes:
            continue
        g = torch.from_numpy(G[:, :, at : at + p.numel()])
        at += p.numel()
        if parameter in chosen:
            R, I = shapes[parameter]  # noqa: E741
            owner = model.get_submodule(parameter.rpartition(".")[0])
            g = g.unflatten(2, (I, R)).transpose(2, 3) if isinstance(owner, Conv1D) else g.unflatten(2, (R, I))
            project = drawn(chosen[parameter])
            g = project.columns(g) if chosen[parameter].lookup else project([Dense(g)])[0].g
        features.append(g.flatten(2).numpy())
    Z = np.concatenate(features, 2)
    n = len(LENGTHS)
    assert len(chosen) >= 6
    assert max(relative_error(gram.values, contracted(Z[:n], Z[:n], "trace"))) < 1e-9
    assert max(relative_error(gram.cross, contracted(Z[n:], Z[:n], "trace"))) < 1e-9
    assert np.abs(sum(gram.modules.values()) - gram.values).max() < 1e-12 * np.abs(gram.values).max()
    assert np.linalg.eigvalsh(gram.values)[0] > -1e-12 * np.trace(gram.values)
    assert np.array_equal(gram.values, np.asarray(gram.values).T)
    if name == "tied embeddings":
        row = next(row for row in gram.plan.parameters if row.parameter == "transformer.wte.weight")
        assert row.path.startswith("lookup+outer, sketched ")
    for contraction in ("full", "per-output"):
        given = {"params": params, "readout": readout, "precision": "exact", "sketch": k, "contraction": contraction}
        again = compute_gram(model, inputs, **given)
        assert max(relative_error(again.values, contracted(Z[:n], Z[:n], contraction))) < 1e-9


@pytest.mark.parametrize("name", ["disk", "split", "tiles"])
def test_every_layout_gives_the_same_sketch(monkeypatch, name):
    model = tiny_model("bert")
    inputs, held = tiny_inputs(model, LENGTHS, 12), tiny_inputs(model, [4, 12, 6], 12, seed=1)
    given = {"params": "all", "precision": "exact", "eval_inputs": held, "sketch": 100}
    plain = compute_gram(model, inputs, **given)
    forced(monkeypatch, LAYOUTS[name])
    laid = compute_gram(model, inputs, **given)
    assert plain.meta["sketch"]["parameters"] > 10
    assert max(relative_error(laid.values, plain.values)) < 1e-12
    assert max(relative_error(laid.cross, plain.cross)) < 1e-12
    assert laid.meta["sketch"]["predicted"] == pytest.approx(plain.meta["sketch"]["predicted"])


def test_large_enough_it_is_exact(caplog):
    model = tiny_model("bert")
    inputs = tiny_inputs(model, LENGTHS, 12)
    exact = compute_gram(model, inputs, params="all", precision="exact")
    whole = compute_gram(model, inputs, params="all", precision="exact", sketch=97 * 32)
    assert whole.meta["sketch"]["parameters"] == 0
    assert np.array_equal(whole.values, exact.values)
    assert not [r for r in caplog.records if "approximate" in r.message]


@pytest.fixture(scope="module")
def seeds():
    model = tiny_model("bert")
    inputs = tiny_inputs(model, [2 + i % 9 for i in range(32)], 12)
    exact = np.asarray(compute_gram(model, inputs, params=WEIGHTS, precision="exact").values)
    given = {"params": WEIGHTS, "precision": "exact"}
    return exact, {k: [compute_gram(model, inputs, **given, sketch=k, seed=s) for s in range(6)] for k in (64, 256)}


def test_unbiased_and_as_accurate_as_predicted(seeds):
    exact, found = seeds
    size = np.linalg.norm(exact)
    for grams in found.values():
        errors = np.stack([np.asarray(gram.values) - exact for gram in grams])
        rms = np.sqrt((errors**2).sum((1, 2)).mean())
        assert np.linalg.norm(errors.mean(0)) < 3 * rms / np.sqrt(len(grams))
        predicted = np.mean([gram.meta["sketch"]["predicted"] for gram in grams])
        assert predicted / 4 < rms / size < 1.5 * predicted
        measured = np.sqrt(np.mean([gram.meta["sketch"]["relative_error"] ** 2 for gram in grams]))
        assert measured == pytest.approx(rms / size, rel=0.2)


def test_noise_is_above_the_true_error_by_a_factor_of_some_units(seeds):
    exact, found = seeds
    for grams in found.values():
        ratios = [gram.noise / np.linalg.norm(np.asarray(gram.values) - exact, 2) for gram in grams]
        assert all(1 < ratio < 7 for ratio in ratios)


@pytest.mark.parametrize("precision", ["high", "fast"])
def test_other_precisions_draw_the_same_numbers(precision, caplog):
    model = tiny_model("llama")
    inputs = tiny_inputs(model, LENGTHS, 12)
    with caplog.at_level(logging.WARNING):
        found = compute_gram(model, inputs, params="all", precision=precision, sketch=200)
    assert "sketch=200: this Gram is approximate: of " in caplog.text
    assert caplog.text.count("approximate") == 1
    exact = compute_gram(model, inputs, params="all", precision="exact", sketch=200)
    assert max(relative_error(found.values, exact.values)) < {"high": 1e-5, "fast": 5e-2}[precision]
    two = compute_gram(model, inputs, tiny_inputs(model, [4, 12], 12, seed=1), params="all", sketch=200)
    assert two.shape == (7, 2)
    assert two.meta["sketch"]["predicted"] is None
    assert np.isfinite(two.noise)


def test_the_smallest_sketch_is_not_refused():
    model = tiny_model("bert")
    inputs = tiny_inputs(model, LENGTHS, 12)
    for seed in range(2):
        gram = compute_gram(model, inputs, params=WEIGHTS, sketch=1, seed=seed)
        assert gram.meta["sketch"]["relative_error"] > 0.1


def test_a_model_that_does_not_run_in_float64_is_measured_all_the_same(monkeypatch):
    model = tiny_model("bert")
    inputs = tiny_inputs(model, LENGTHS, 12)
    right = finer.estimate_noise

    def single(running, *args, **kwargs):
        if running.model is not model:
            raise RuntimeError("no float64 here")
        return right(running, *args, **kwargs)

    monkeypatch.setattr(finer, "estimate_noise", single)
    gram = compute_gram(model, inputs, params=WEIGHTS, sketch=64)
    assert gram.noise > 0
    assert gram.meta["sketch"]["relative_error"] > 1e-3
    assert "sketched to 64 features" in repr(gram)


def test_a_wrong_sketch_is_stopped(monkeypatch):
    model = tiny_model("bert")
    right = projection._side
    monkeypatch.setattr(projection, "_side", lambda a, b, c, s, *rest: right(a, b, c, 1.5 * s, *rest))
    with pytest.raises(CheckFailed, match="the Gram matrix: differs from plain autograd"):
        compute_gram(model, tiny_inputs(model, LENGTHS, 12), params=WEIGHTS, sketch=1000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sketch": 0}, "sketch: expected a whole number of features, at least 1, got 0"),
        ({"sketch": 2.5}, "at least 1, got 2.5"),
        ({"sketch": True}, "at least 1, got True"),
        ({"sketch": 9, "transform": "sign"}, "expected transform 'sgd', got 'sign', which needs the gradient's own"),
        ({"sketch": 9, "transform": "asymmetric-sign"}, "got 'asymmetric-sign'"),
        ({"sketch": 9, "transform": Preconditioner({})}, "got 'preconditioner'"),
        ({"sketch": 9, "check": False}, "expected check=True, got False: without the check the error"),
    ],
)
def test_what_a_sketch_refuses(arguments, message):
    model = tiny_model("bert")
    with pytest.raises(InputError, match=message):
        compute_gram(model, tiny_inputs(model, LENGTHS, 12), params="all", **arguments)


def test_the_plan_shows_it():
    model = tiny_model("bert")
    inputs = tiny_inputs(model, LENGTHS * 20, 12)
    exact, plan = plan_gram(model, inputs, params="all"), plan_gram(model, inputs, params="all", sketch=64)
    row, was = (next(r for r in p.parameters if r.parameter.endswith("0.output.dense.weight")) for p in (plan, exact))
    assert row.path == "outer, sketched 8×8"
    assert (row.strategy, row.features, was.features) == ("explicit", 64, None)
    assert row.bytes == 4 * 140 * 3 * 64
    assert row.flops < 0.2 * was.flops
    words = next(r for r in plan.parameters if "word_embeddings" in r.parameter)
    assert (words.path, words.strategy) == ("lookup, sketched to 8 columns", "lookup")
    assert plan.projection_flops > 0
    assert exact.projection_flops == 0
    assert plan.flops < exact.flops
    assert type(plan).from_dict(json.loads(json.dumps(plan.to_dict()))).to_dict() == plan.to_dict()
    shown = plan_table(plan)
    assert any("sketched 8×8" in cell for line in shown.rows for cell in line)
    assert "approximate: " in shown.note
    assert "approximate" not in plan_table(exact).note


def test_the_file_keeps_it_and_is_another_job(tmp_path):
    model = tiny_model("bert")
    inputs = tiny_inputs(model, LENGTHS, 12)
    path = tmp_path / "k.h5"
    gram = compute_gram(model, inputs, params="all", sketch=64, out=path)
    again = open_gram(path)
    told = again.meta["sketch"]
    assert {k: told[k] for k in ("features", "seed")} == {"features": 64, "seed": 0}
    assert told["parameters"] > 10
    assert again.noise == gram.noise > 0
    line = dict(tables.gram_table(again).rows)["approximation"]
    shown = re.match(r"sketched, k=64, relative error ([\d.e-]+), ", line)[1]
    assert told["relative_error"] <= float(shown) <= 1.1 * told["relative_error"]  # rounded up
    assert "approximation" not in dict(tables.gram_table(copy.copy(gram_without(again))).rows)
    assert compute_gram(model, inputs, params="all", sketch=64, out=path).meta["sketch"] == told
    for other in (None, 65):
        with pytest.raises(InputError, match=f"holds another job: sketch is 64 there, {other} here"):
            compute_gram(model, inputs, params="all", sketch=other, out=path)


def gram_without(gram):
    found = copy.copy(gram)
    found.meta = {**gram.meta, "sketch": None}
    return found


def test_from_the_command_line(tmp_path, capsys):
    save_tiny(tmp_path / "model", kind="bert", head=False)
    rows = [f"{text}\t{'ab'[i % 2]}" for i, text in enumerate(tiny_sentences(12, 0))]
    (tmp_path / "train.tsv").write_text("text\tlabel\n" + "\n".join(rows) + "\n")
    job = tmp_path / "job.toml"
    job.write_text(
        'out = "k.h5"\n[model]\npath = "model"\n[data]\ntrain = "train.tsv"\n[head]\nfolds = 2\n'
        '[gram]\nparams = "all"\nreadout = "margin"\nsketch = 256\n'
    )

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        return stop.value.code, *capsys.readouterr()

    assert run("gram", job)[0] == 0
    path = tmp_path / "k.h5"
    told = json.loads(run("info", path, "--json")[1])["meta"]
    assert told["settings"]["gram"]["sketch"] == told["sketch"]["features"] == 256
    line = f"sketched, k=256, relative error {above(told['sketch']['relative_error'], 2)}"
    for command in ("info", "spectrum", "ridge", "forecast"):
        assert line in run(command, path)[1].replace("\n", " "), command
    for command in ("spectrum", "ridge"):
        assert json.loads(run(command, path, "--json")[1])["sketch"] == told["sketch"]
    assert run("report", path, "-o", tmp_path / "r.html")[0] == 0
    page = (tmp_path / "r.html").read_text()
    assert page.count(line) >= 2
    assert '<p class="lead">Exact' not in page
    code, _, err = run("gram", job, "--sketch", 512)
    assert (code, "gram.sketch is '256' there, '512' here" in err) == (2, True)
    code, _, err = run("gram", job, "--sketch", 0, "--out", tmp_path / "other.h5")
    assert (code, "sketch: expected a whole number of features" in err) == (2, True)
    code, out, _ = run("plan", job, "--out", tmp_path / "other.h5")
    assert (code, "sketched" in out) == (0, True)
