"""What `fit_head`, `fine_tune` or another part of the data has seen is known to a forecast without being told."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ntkengine as ntk
from ntkengine.errors import InputError
from ntkengine.gramfiles import forecast_file, report_files
from ntkengine.inputs.seen import marks_of
from tests.brute import tiny_inputs, tiny_model

N = 24
LENGTHS = np.random.default_rng(0).integers(3, 9, N).tolist()


def fitted():
    model = tiny_model("bert", num_labels=2)
    inputs = tiny_inputs(model, LENGTHS, 9)
    y = np.random.default_rng(1).choice([-1.0, 1.0], (N, 1))
    return model, inputs, y, ntk.fit_head(model, inputs, y * [-0.5, 0.5])


def gram_of(model, inputs, **options):
    return ntk.compute_gram(model, inputs, params="*.layer.*.weight", readout="margin", **options)


def test_risk_of_examples_that_the_head_has_seen_is_refused(tmp_path, caplog):
    model, inputs, y, head = fitted()
    gram_of(model, inputs, out=tmp_path / "k.h5")
    gram = ntk.open_gram(tmp_path / "k.h5")
    with pytest.raises(
        InputError, match="a head fitted on these .* not fitted on these labels, head_fitted_on_targets=False$"
    ):
        ntk.forecast(gram, y)
    held_out = ntk.cross_fit(model, inputs, head, readout="margin", params="*.layer.*.weight")
    assert (
        ntk.forecast(gram, y, cross_fit=held_out).loo
        == ntk.forecast(gram, y, cross_fit=held_out, head_fitted_on_targets=True).loo
    )
    assert ntk.forecast(gram, y, head_fitted_on_targets=False).loo[0] > 0.0
    assert ntk.forecast(gram.values, y).loo[0] > 0.0  # an array says nothing
    ntk.KernelRidge(ridge=1.0).fit(gram, y, offset=gram.outputs)
    assert not caplog.text
    ntk.KernelRidge(ridge="loo").fit(gram, y, offset=gram.outputs)
    assert "the ridge they choose, are too small" in caplog.text


def test_commands_tell_of_a_file_without_held_out_heads(tmp_path):
    model, inputs, y, _ = fitted()
    gram_of(model, inputs, out=tmp_path / "k.h5", targets=y)
    with pytest.raises(
        InputError, match=r"k.h5: its head was fitted on its examples, .* compute it with `ntkengine gram`"
    ):
        forecast_file(tmp_path / "k.h5")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    (section,) = report_files([tmp_path / "k.h5"])
    assert section.notes == ["Its head was fitted on its examples: without held-out heads there is no forecast."]


def test_examples_are_known_by_their_tokens():
    model, inputs, y, _ = fitted()
    some = {k: v[5:15, :9] for k, v in inputs.items()}
    assert gram_of(model, some).meta["head_fitted"]
    cut = {k: v[:, : max(LENGTHS[:3])][:3] for k, v in inputs.items()}
    assert gram_of(model, cut).meta["head_fitted"]
    others = tiny_inputs(model, LENGTHS, 9, seed=7)
    assert not gram_of(model, others).meta["head_fitted"]
    assert ntk.forecast(gram_of(model, others), y).loo[0] > 0.0
    bare = tiny_model("bert", num_labels=2)
    assert not gram_of(bare, inputs).meta["head_fitted"]


def loo(gram, y, **options):
    """Return the leave-one-out figure of a forecast that is not told of the head."""
    return ntk.forecast(gram, y, head_fitted_on_targets=False, **options).loo[0]


def test_a_model_that_was_trained_on_the_examples_is_refused():
    model = tiny_model("bert", num_labels=2)
    inputs = tiny_inputs(model, LENGTHS, 9)
    y = np.random.default_rng(1).choice([-1.0, 1.0], (N, 1))
    before = gram_of(model, inputs)
    assert ntk.forecast(before, y).loo[0] > 0.5  # of coin flips
    ntk.fine_tune(model, inputs, y, params="all", readout="margin", optimizer="adam", learning_rate=1e-2, epochs=20)
    after = gram_of(model, inputs)
    with pytest.raises(
        InputError, match=r"^gram: fine_tune trained its model on these .* head_fitted_on_targets=False$"
    ):
        ntk.forecast(after, y)
    assert loo(after, y) < 0.1
    others = gram_of(model, tiny_inputs(model, LENGTHS, 9, seed=7))
    assert not others.meta["trained_on"]
    ntk.forecast(others, y)


def test_eval_examples_that_were_seen_are_told(caplog):
    model, inputs, y, _ = fitted()
    others = tiny_inputs(model, LENGTHS, 9, seed=7)
    for kind, train, held in (("train's", others, others), ("the head's", others, inputs)):
        gram = gram_of(model, train, eval_inputs={k: v[:12] for k, v in held.items()})
        assert gram.meta["eval_seen"] == 12, kind
        caplog.clear()
        told = ntk.forecast(gram, y, eval_targets=y[:12]).assumptions
        note = "12 of 12 eval examples are train examples, or were seen in fitting: on them eval figures are no test."
        assert note in told
        assert note in caplog.text
        assert ntk.forecast(gram, y).assumptions.count(note) == 0
    assert gram_of(model, others, eval_inputs=tiny_inputs(model, LENGTHS, 9, seed=8)).meta["eval_seen"] == 0
    assert gram_of(model, others).meta["eval_seen"] is None


def test_examples_that_are_there_twice_are_told(caplog):
    model = tiny_model("bert", num_labels=2)
    inputs = {k: np.concatenate([v[:12], v[:12]]) for k, v in tiny_inputs(model, LENGTHS, 9).items()}
    gram = gram_of(model, inputs)
    assert gram.meta["repeated"] == 24
    y = np.random.default_rng(1).choice([-1.0, 1.0], (12, 1))
    told = ntk.forecast(gram, np.concatenate([y, y])).assumptions
    assert "24 of 24 train examples are there more than once: leave-one-out has seen them." in told
    assert "more than once" in caplog.text


@pytest.mark.parametrize("change", [{"seed": 2}, {"alpha": 64}])
def test_a_cross_fit_of_another_adapter_is_refused(change):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    grams = []
    for seed, alpha in ((1, 8), (change.get("seed", 1), change.get("alpha", 8))):
        lora = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["query", "value"])
        base = tiny_model("bert", num_labels=2)
        torch.manual_seed(seed)
        model = peft.get_peft_model(base, lora)
        inputs = tiny_inputs(model, LENGTHS, 9)
        y = np.random.default_rng(1).choice([-1.0, 1.0], (N, 1))
        head = ntk.fit_head(model, inputs, y * [-0.5, 0.5])
        gram = ntk.compute_gram(model, inputs, readout="margin")
        grams.append((gram, ntk.cross_fit(model, inputs, head, readout="margin")))
    (gram, own), (other, foreign) = grams
    np.testing.assert_allclose(gram.outputs, other.outputs, atol=1e-6)  # B = 0: f is the same
    ntk.forecast(gram, y, cross_fit=own)
    with pytest.raises(InputError, match=r"^cross_fit: expected the model that the Gram is of; .* another adapter"):
        ntk.forecast(gram, y, cross_fit=foreign)


@pytest.mark.parametrize("options", [{"contraction": "full"}, {"contraction": "per-output"}, {"precision": "fast"}])
def test_a_cross_fit_of_the_same_model_is_known_in_every_layout(options):
    model, inputs, y, head = fitted()
    call = {"params": "*.layer.*.weight", "readout": "logits", **options}
    gram = ntk.compute_gram(model, inputs, **call)
    held = ntk.cross_fit(model, inputs, head, **call)
    both = y * [-1.0, 1.0]
    assert ntk.forecast(gram, both, cross_fit=held).loo[0] > 0.0
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight *= 4.0
    moved = ntk.cross_fit(model, inputs, ntk.fit_head(model, inputs, y * [-0.5, 0.5]), **call)
    with pytest.raises(InputError, match="^cross_fit: expected"):
        ntk.forecast(gram, both, cross_fit=moved)


def test_what_a_file_keeps_of_held_out_heads_is_used_for_its_own_targets(tmp_path):
    model, inputs, y, head = fitted()
    held = ntk.cross_fit(model, inputs, head, readout="margin", params="*.layer.*.weight")
    extras = {"fold": held.fold, "fold_grams": held.grams, "fold_outputs": held.outputs}
    gram_of(model, inputs, out=tmp_path / "k.h5", targets=y, extras=extras)
    gram = ntk.open_gram(tmp_path / "k.h5")
    assert ntk.forecast(gram).loo == ntk.forecast(gram, y).loo == ntk.forecast(gram, y, cross_fit=held).loo
    with pytest.raises(InputError, match="^held_out_offset: expected outputs of heads"):
        ntk.forecast(gram, -y)
    with pytest.raises(InputError, match=r"^targets: expected \(N, C\), as the Gram holds none"):
        ntk.forecast(gram_of(model, inputs))


def test_what_a_model_was_trained_on_counts_while_its_weights_are_trained(tmp_path):
    model = tiny_model("bert", num_labels=2)
    inputs = tiny_inputs(model, LENGTHS, 9)
    y = np.random.default_rng(1).choice([-1.0, 1.0], (N, 1))
    options = {"params": "all", "readout": "margin", "optimizer": "adam", "learning_rate": 1e-2, "epochs": 2}
    start = {k: v.clone() for k, v in model.state_dict().items()}
    gram_of(model, inputs, out=tmp_path / "k.h5")
    ntk.fine_tune(model, inputs, y, **options)
    assert gram_of(model, inputs).meta["trained_on"]
    model.load_state_dict(start)
    assert not gram_of(model, inputs).meta["trained_on"]
    assert gram_of(model, inputs, out=tmp_path / "k.h5").path  # the same model: its file opens

    def stop(done, _all, _stage):
        if done > 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ntk.fine_tune(model, inputs, y, **options, progress=stop)
    assert gram_of(model, inputs).meta["trained_on"]


@pytest.mark.parametrize("merged", [True, False])
def test_a_trained_adapter_counts_where_it_is_merged(merged):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(tiny_model("bert", num_labels=2), peft.LoraConfig(r=2, target_modules=["query"]))
    inputs = tiny_inputs(model, LENGTHS, 9)
    y = np.random.default_rng(1).choice([-1.0, 1.0], (N, 1))
    ntk.fine_tune(model, inputs, y, readout="margin", optimizer="adam", learning_rate=1e-2, epochs=2)
    bare = model.merge_and_unload() if merged else model.unload()
    assert gram_of(bare, inputs).meta["trained_on"] is merged


def test_examples_differ_in_any_tensor():
    ids = torch.randint(3, 30, (1, 6)).expand(4, 6)
    mask = torch.ones_like(ids)
    images, none = torch.randn(4, 3, 8, 8), torch.zeros_like(ids)
    assert len(marks_of({"input_ids": ids, "attention_mask": mask})) == 1
    for more in (
        {"pixel_values": images},
        {"decoder_input_ids": torch.arange(24).reshape(4, 6)},
        {"pixel_values": images[:, 0]},
    ):
        assert len(marks_of({"input_ids": ids, "attention_mask": mask, **more})) == 4
    segments = torch.tril(torch.ones(4, 6, dtype=torch.long))
    assert len(marks_of({"input_ids": ids, "attention_mask": mask, "token_type_ids": segments})) == 4
    alone = marks_of({"input_ids": ids})
    assert marks_of({"input_ids": ids, "attention_mask": mask, "token_type_ids": none}) == alone
    wide = torch.nn.functional.pad(ids, (0, 3))
    assert marks_of({"input_ids": wide, "attention_mask": (wide != 0).long()}) == alone
