"""The LoRA set-ups that forecasts are compared on: layers × module types × ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TYPES = {
    "qv": ("query", "value"),
    "q": ("query",),
    "v": ("value",),
    "k": ("key",),
    "mid": ("intermediate.dense",),
    "all": ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"),
}
SETS = ((0,), (1,), (2,), (3,), (4,), (5,), (0, 1, 2), (3, 4, 5), (0, 1, 2, 3, 4, 5))


@dataclass(frozen=True)
class Setup:
    """One choice of what to adapt; α = 2r."""

    layers: tuple[int, ...]
    kind: str
    rank: int

    @property
    def name(self) -> str:
        """Short and unique."""
        return f"{''.join(map(str, self.layers))}-{self.kind}-r{self.rank}"

    def peft(self) -> dict[str, Any]:
        """Return the fields of its `peft.LoraConfig`."""
        return {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": 2 * self.rank,
            "target_modules": list(TYPES[self.kind]),
            "layers_to_transform": list(self.layers),
            "layers_pattern": "layer",
        }


def calibration() -> list[Setup]:
    """Return the 45 set-ups of the calibration."""
    grid = [Setup(s, kind, rank) for kind, rank in (("qv", 8), ("k", 8), ("mid", 8), ("qv", 2)) for s in SETS]
    return grid + [Setup(s, kind, rank) for kind, rank in (("mid", 2), ("qv", 32), ("all", 8)) for s in SETS[6:]]
