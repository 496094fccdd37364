"""Jobs that end early: how they end, and what it means that another goes on to the same."""

from __future__ import annotations

import numpy as np

LENGTHS = [11, 3, 5, 7, 2, 9, 5, 4, 8]


class Killed(BaseException):
    """What a killed process would not live to see."""


def same(got, wanted):
    """Require two Grams to be equal in every number, module and row of the plan."""
    np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted))
    for name in ("cross", "outputs", "eval_outputs"):
        if getattr(wanted, name) is not None:
            np.testing.assert_array_equal(np.asarray(getattr(got, name)), np.asarray(getattr(wanted, name)))
    assert list(got.modules) == list(wanted.modules)
    for name in wanted.modules:
        np.testing.assert_array_equal(np.asarray(got.modules[name]), np.asarray(wanted.modules[name]))
    assert got.meta["module_trace"] == wanted.meta["module_trace"]
    assert [(r.parameter, r.strategy, r.flops) for r in got.plan.parameters] == [
        (r.parameter, r.strategy, r.flops) for r in wanted.plan.parameters
    ]
