"""What fine-tuning will reach, from the tangent kernel at its start."""

import sys
from types import ModuleType
from typing import Any

from ntkengine.forecast.bounds import displacement_bound, linearisation_gap_bound, risk_bounds
from ntkengine.forecast.crossfit import CrossFit, cross_fit
from ntkengine.forecast.result import Forecast
from ntkengine.forecast.risk import forecast

__all__ = [
    "CrossFit",
    "Forecast",
    "cross_fit",
    "displacement_bound",
    "forecast",
    "linearisation_gap_bound",
    "risk_bounds",
]


class _Callable(ModuleType):
    """`ntkengine.forecast` is a function to users and this package to the import system; both must work."""

    def __call__(self, *args: Any, **kwargs: Any) -> Forecast:
        return forecast(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
