"""Arguments of another kind: each refused in one line that names it, none taken for something else."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator

import ntkengine as ntk
from ntkengine.arguments import flag, number, real_array, whole
from ntkengine.errors import InputError
from ntkengine.forecast.bounds import displacement_bound, linearisation_gap_bound, risk_bounds
from ntkengine.forecast.simulate import simulate
from ntkengine.forecast.subsets import rank_subsets
from ntkengine.ridge import (
    KernelLogistic,
    KernelRidge,
    RidgePath,
    cholesky_on_disk,
    cholesky_solve,
    choose,
    conjugate_gradients,
    draw_folds,
    nystrom,
    preconditioner,
    random_cholesky,
    ridge_grid,
)
from ntkengine.spectrum import (
    DeviceOperator,
    FactorOperator,
    ImplicitOperator,
    PanelOperator,
    condition_from_eigenvalues,
    condition_number,
    effective_dimension,
    spectral_density,
)

K = (lambda A: A @ A.T)(np.random.default_rng(0).standard_normal((12, 30)))
Y = np.random.default_rng(1).standard_normal(12)
OPERATOR = aslinearoperator(K)

NUMBER = ("a", None, float("nan"), [1.0], 1j, True, np.array([1.0, 2.0]), "1")
WHOLE = ("a", 2.5, 3.0, -1, float("nan"), True, [1], "3")
FLAG = ("a", float("nan"), 1, None)
WORD = ("other", 3, None, ["auto"], np.array([1, 2]))
GRAM = {
    "a word": "a",
    "words": K.astype(str),
    "words as objects": K.astype(str).astype(object),
    "complex": K + 1j * K,
    "complex objects": (K + 1j * K).astype(object),
    "masked": np.ma.masked_array(K, mask=np.eye(12, dtype=bool)),
    "ragged": [[1, 2], [3]],
    "nothing": None,
    "wide operator": aslinearoperator(np.ones((3, 4))),
    "complex operator": aslinearoperator(1j * K),
    "no rows": LinearOperator((0, 0), matvec=lambda x: x, dtype=float),
}
COLUMN = {
    "words": Y.astype(str),
    "complex": Y + 1j,
    "masked": np.ma.masked_array(Y, mask=Y > 0),
    "ragged": [[1], [2, 3]],
    "none": np.full(12, None),
}


def fit(kind, X=K, y=Y, sample_weight=None, offset=None, **more):
    return kind(**more).fit(X, y, sample_weight, offset)


def ridge_regression(**given):
    return fit(KernelRidge, **given)


def logistic(**given):
    return fit(KernelLogistic, **{"y": Y > 0, **given})


def simulation(**given):
    recipe = {"learning_rate": 0.01, "optimizer": "sgd"}
    return simulate(**{"grams": [K / 100], "targets": Y, "recipe": recipe, "offset": np.zeros((12, 1)), **given})


def ranked(**given):
    return rank_subsets(None, Y, factors=None, recipe={"learning_rate": 0.1}, **given)


SAMPLING = {"probes": WHOLE, "steps": WHOLE, "seed": WHOLE}
WRONG = [
    (ntk.eigsh, {"gram": K, "k": 2}, {"k": WHOLE, "which": WORD, "tol": NUMBER, "seed": WHOLE, "method": WORD}),
    (ntk.eigsh, {"gram": K, "k": 2}, {"max_products": ("a", 2.5), "block": ("a", 2.5), "certify": FLAG}),
    (spectral_density, {"gram": K}, {"points": WHOLE, "width": NUMBER[2:], **SAMPLING, "method": WORD}),
    (effective_dimension, {"gram": K, "ridge": 1.0}, {"ridge": NUMBER, **SAMPLING, "method": WORD}),
    (effective_dimension, {"gram": OPERATOR, "ridge": 1.0}, SAMPLING),
    (condition_from_eigenvalues, {"eigenvalues": [1.0], "noise": 0.0}, {"eigenvalues": ("a", [1j], []), "noise": "a"}),
    (DeviceOperator, {"gram": K}, {"device": ("other", 3.5), "noise": ("a",)}),
    (
        FactorOperator,
        {"features": K},
        {"features": ("a", GRAM["masked"], GRAM["words"]), "noise": NUMBER[:1] + NUMBER[2:]},
    ),
    (ImplicitOperator, {"product": len, "rows": 3}, {"product": (3,), "rows": WHOLE, "block": WHOLE, "noise": NUMBER}),
    (PanelOperator, {"gram": K}, {"gram": ("a", GRAM["masked"]), "budget_mib": NUMBER}),
    (cholesky_solve, {"gram": K, "residual": Y, "ridge": 1.0}, {"ridge": NUMBER, "block": WHOLE}),
    (cholesky_on_disk, {"gram": K, "residual": Y, "ridge": 1.0}, {"ridge": NUMBER, "budget_mib": NUMBER, "loo": FLAG}),
    (cholesky_on_disk, {"gram": K, "residual": Y, "ridge": 1.0}, {"gram": (GRAM["masked"], GRAM["complex"])}),
    (conjugate_gradients, {"gram": K, "right": Y, "ridge": 1.0}, {"ridge": NUMBER, "tol": NUMBER}),
    (conjugate_gradients, {"gram": K, "right": Y, "ridge": 1.0}, {"max_iterations": ("a", 2.5)}),
    (choose, {"curve": RidgePath(K, Y)}, {"curve": (3,), "criterion": WORD, "ridges": ("a", [1j])}),
    (draw_folds, {"folds": 3, "rows": 12}, {"rows": WHOLE[:-2], "block": WHOLE, "seed": WHOLE}),
    (nystrom, {"operator": OPERATOR, "rank": 3}, {"rank": WHOLE, "noise": NUMBER, "seed": WHOLE}),
    (preconditioner, {"gram": K, "ridge": 1.0, "rank": 3}, {"ridge": NUMBER, "rank": WHOLE, "seed": WHOLE}),
    (
        random_cholesky,
        {"columns": lambda at: K[:, at], "diagonal": K.diagonal(), "rank": 3},
        {"rank": WHOLE, "block": WHOLE, "tol": NUMBER, "noise": NUMBER, "seed": WHOLE},
    ),
    (ridge_grid, {"eigenvalues": [1.0, 2.0], "noise": 0.0}, {"noise": NUMBER, "n": WHOLE}),
    (
        ridge_regression,
        {},
        {"ridge": NUMBER, "solver": WORD, "relative": FLAG, "tol": NUMBER, "class_weight": WORD[:2]},
    ),
    (logistic, {}, {"ridge": NUMBER, "relative": FLAG, "tol": NUMBER, "max_iter": WHOLE, "class_weight": WORD[:2]}),
    (ridge_regression, {}, {name: COLUMN.values() for name in ("y", "sample_weight", "offset")}),
    (logistic, {}, {name: COLUMN.values() for name in ("sample_weight", "offset")}),
    (logistic, {}, {"y": (COLUMN["masked"], COLUMN["complex"], COLUMN["ragged"])}),
    (
        ntk.forecast,
        {"gram": K, "targets": Y},
        {"head_fitted_on_targets": FLAG[:3], "cross_fit": (3,), "times": ("a", [1j])},
    ),
    (ntk.forecast, {"gram": K, "targets": Y}, {"ridge": NUMBER, "targets": COLUMN.values(), "offset": COLUMN.values()}),
    (
        risk_bounds,
        {"ridge": 1.0, "residual_norm": 1.0, "lambda_min": 0.0, "lambda_max": 1.0},
        dict.fromkeys(("ridge", "residual_norm", "lambda_min", "lambda_max"), NUMBER),
    ),
    (
        displacement_bound,
        {"lipschitz": 1.0, "residual_norm": 1.0, "proximal": 0.0, "time": 1.0},
        dict.fromkeys(("lipschitz", "residual_norm", "proximal", "time", "scale"), NUMBER),
    ),
    (
        linearisation_gap_bound,
        {"lipschitz": 1.0, "gradient_lipschitz": 1.0, "radius": 1.0, "initial_loss": 1.0, "time": 1.0},
        dict.fromkeys(("lipschitz", "gradient_lipschitz", "radius", "initial_loss", "time"), NUMBER),
    ),
    (ranked, {}, {"rank": WHOLE, "repeats": WHOLE, "seed": WHOLE, "size": WHOLE, "alpha": (-3, 0.0, *NUMBER[2:])}),
    (simulation, {}, {"targets": COLUMN.values(), "offset": COLUMN.values(), "eval_offset": (np.zeros((3, 1)),)}),
]


@pytest.mark.parametrize(("function", "right", "wrong"), WRONG, ids=lambda f: getattr(f, "__name__", ""))
def test_one_line_names_the_argument(function, right, wrong):
    for name, values in wrong.items():
        for value in values:
            expected = "cv" if name == "folds" else name
            with pytest.raises(InputError) as caught:
                function(**{**right, name: value})
            message = str(caught.value)
            assert message.startswith((f"{expected}: expected", f"{expected}: ", f"{expected} ")), (
                name,
                value,
                message,
            )
            assert "\n" not in message
            assert len(message) < 300


@pytest.mark.parametrize("what", GRAM)
@pytest.mark.parametrize(
    "use",
    [
        lambda gram: ntk.eigsh(gram, 1),
        condition_number,
        spectral_density,
        lambda gram: effective_dimension(gram, 1.0),
        lambda gram: cholesky_solve(gram, Y, 1.0),
        lambda gram: conjugate_gradients(gram, Y, 1.0),
        lambda gram: ridge_regression(X=gram, ridge=1.0),
        lambda gram: logistic(X=gram),
        lambda gram: ntk.forecast(gram, Y),
        lambda gram: simulation(grams=[gram]),
    ],
    ids=["eigsh", "condition", "density", "dimension", "cholesky", "cg", "ridge", "logistic", "forecast", "simulate"],
)
def test_what_is_no_gram(use, what):
    with pytest.raises(InputError, match=r"^(gram|grams|X): ") as caught:
        use(GRAM[what])
    assert "\n" not in str(caught.value)


def test_what_cannot_be_simulated():
    skew, low = K / 100, np.diag(np.r_[-0.5, np.ones(11)])
    skew[3, 4] += 0.1
    for grams, match in (
        ([skew], "grams: expected symmetric"),
        ([low], "grams: expected a positive semi-definite sum"),
    ):
        with pytest.raises(InputError, match=match):
            simulation(grams=grams)
    wide = {"offset": np.zeros((6, 2)), "targets": Y.reshape(6, 2), "eval_offset": np.zeros((3, 2))}
    with pytest.raises(InputError, match=r"crosses: expected 12 columns, as in grams, got \[6\]"):
        simulation(crosses=[np.ones((3, 6))], **wide)
    for sizes in (3, None, ["a"], [float("nan")], [-1], [1, 2]):
        with pytest.raises(InputError, match="sizes: expected"):
            simulation(recipe={"learning_rate": 0.01}, sizes=sizes)


def test_numbers_of_numpy_are_numbers():
    assert whole("k", np.int64(3), 1, 3) == 3
    assert whole("k", np.array(3)) == 3
    assert number("x", np.float32(0.5), 0, below=1) == 0.5
    assert number("x", 2) == 2.0
    assert flag("f", np.bool_(True)) is True
    assert real_array("y", np.array([1, 2.5], dtype=object)).dtype == np.float64
    with pytest.raises(InputError, match="x: expected a finite number >= 0 and < 1, got 1"):
        number("x", 1, 0, below=1)
    with pytest.raises(InputError, match="x: expected a finite number, got 1000"):
        number("x", 10**400)


MODEL, X = torch.nn.Linear(3, 2), {"x": torch.ones(4, 3)}


@pytest.mark.parametrize(
    ("use", "name"),
    [
        *((use, name) for use in (ntk.compute_gram, ntk.plan_gram) for name in ("memory_gib", "seed", "per_module")),
        *((ntk.compute_gram, name) for name in ("check", "resume", "checkpoint_s")),
        *((use, n) for use in (ntk.tangent_features, ntk.tangent_factors) for n in ("memory_gib", "seed", "check")),
        (ntk.TangentProducts, "seed"),
    ],
)
@pytest.mark.parametrize("value", ["a", -1, float("nan"), [1]])
def test_settings_of_a_gram(use, name, value):
    with pytest.raises(InputError, match=f"^{name}: expected .*, got ") as caught:
        use(MODEL, X, params="all", **{name: value})
    assert "\n" not in str(caught.value)


def test_a_plan_takes_what_a_gram_takes():
    with pytest.raises(InputError, match="plan_gram: takes the arguments of compute_gram, got memry_gib"):
        ntk.plan_gram(MODEL, X, params="all", memry_gib=1)
    assert ntk.plan_gram(MODEL, X, params="all", checkpoint_s=1.0, out="k.h5").flops > 0
    for given, said in (
        ({"ranks": 0}, "ranks: expected an integer >= 1, got 0"),
        ({"ranks": 2, "gpus_per_node": True}, "gpus_per_node: expected an integer >= 1, got True"),
        ({"ranks": 2, "network": "fast"}, "network: expected bytes a second > 0, got 'fast'"),
        ({"ranks": 2, "network": math.nan}, "network: expected bytes a second > 0, got nan"),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            ntk.plan_gram(MODEL, X, params="all", **given)
