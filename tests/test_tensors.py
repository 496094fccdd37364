"""Tensors in place of arrays: as kernels, targets, offsets and folds."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import ntkengine as ntk
from ntkengine.forecast.outcome import Outcome
from ntkengine.forecast.ranking import Choice, Ranking

RNG = np.random.default_rng(0)
ROOT = RNG.standard_normal((20, 40))
K, Y = ROOT @ ROOT.T, np.sign(RNG.standard_normal((20, 1)))
F0 = 0.1 * RNG.standard_normal((20, 1))
CALLS = {
    "ridge": lambda K, y, f: ntk.KernelRidge(0.1).fit(K, y, offset=f).dual_coef_,
    "loo": lambda K, y, f: ntk.KernelRidge("loo").fit(K, y, offset=f).ridge_,
    "cg": lambda K, y, f: ntk.KernelRidge(0.1, solver="cg").fit(K, y, offset=f).dual_coef_,
    "out of core": lambda K, y, f: ntk.KernelRidge(0.1, solver="out-of-core").fit(K, y, offset=f).dual_coef_,
    "logistic": lambda K, y, f: ntk.KernelLogistic(ridge=1.0).fit(K, np.asarray(Y)[:, 0] > 0).loss_,
    "eigsh": lambda K, y, f: ntk.eigsh(K, k=3).values,
    "condition": lambda K, y, f: ntk.condition_number(K).lower,
    "rank": lambda K, y, f: float(ntk.effective_rank(K)),
    "dimension": lambda K, y, f: float(ntk.effective_dimension(K, 0.5)),
    "density": lambda K, y, f: ntk.spectral_density(K).density,
    "forecast": lambda K, y, f: ntk.forecast(K, y, offset=f).loo,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_tensor_is_the_array_it_holds(name):
    call = CALLS[name]
    wanted = call(K, Y, F0)
    for grad in (False, True):
        given = (torch.tensor(x, requires_grad=grad) for x in (K, Y, F0))
        np.testing.assert_array_equal(call(*given), wanted)


def test_bfloat16_is_read_too():
    y, f0 = (torch.tensor(x).bfloat16() for x in (Y, F0))
    wanted = ntk.forecast(K, Y, offset=f0.double().numpy()).loo
    assert ntk.forecast(K, y, offset=f0).loo == wanted


def test_folds_in_any_container():
    folds = np.arange(20) % 4
    wanted = ntk.KernelRidge("cv", cv=folds).fit(K, Y).ridge_
    pd = pytest.importorskip("pandas", reason="pandas is not installed")
    words = [f"fold {i}" for i in folds]
    for given in (list(folds), tuple(words), np.array(words), pd.Series(folds), torch.tensor(folds)):
        assert ntk.KernelRidge("cv", cv=given).fit(K, Y).ridge_ == wanted


def test_a_ranking_is_json_whatever_is_not_finite():
    unknown = Outcome(0.5, (0.5, 0.0, float("inf")), None, float("inf"), 0.0, 0.1)
    choice = Choice("a", ("a",), 8, unknown)
    told = Ranking([choice], 2, 4.0, ntk.Recipe(learning_rate=1.0), []).to_dict()
    assert json.loads(json.dumps(told, allow_nan=False))["choices"][0]["eval_loss"] == [0.5, 0.0, None]
