"""What fine-tuning will reach, from the tangent kernel at its start."""

from ntkengine.forecast.bounds import displacement_bound, linearisation_gap_bound, risk_bounds
from ntkengine.forecast.result import Forecast
from ntkengine.forecast.risk import forecast

__all__ = ["Forecast", "displacement_bound", "forecast", "linearisation_gap_bound", "risk_bounds"]
