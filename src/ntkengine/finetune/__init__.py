"""What fine-tuning did reach: regularised training, the linearised model, and how far the two come apart."""

from ntkengine.finetune.history import FineTuning, Measured
from ntkengine.finetune.linearize import Linearized, linearize
from ntkengine.finetune.train import fine_tune

__all__ = ["FineTuning", "Linearized", "Measured", "fine_tune", "linearize"]
