"""A head that `fit_head` fitted on the Gram's examples is known to a forecast without being told."""

from __future__ import annotations

import numpy as np
import pytest

import ntkengine as ntk
from ntkengine.errors import InputError
from ntkengine.gramfiles import forecast_file, report_files
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
