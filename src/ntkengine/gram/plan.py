"""What a job will do before it does it: per parameter the path, the strategy, flops and bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ntkengine.display import html_facts


@dataclass
class PlanRow:
    """One parameter.

    Attributes:
        module: the module it is reported under.
        parameter: its name.
        segment: where its last use is.
        path: how its per-sample gradient is taken: outer, lookup, diagonal (norms and biases), explicit-leaf (its
            module's own VJP) or explicit-block (plain autograd of the segment, one sample at a time); `+` joins those
            of a parameter with uses of several kinds; then how it is sketched, if it is.
        strategy: how factors become Gram entries.
        rows: R of its gradient's matrix.
        columns: I.
        tokens: token axis of its factors.
        flops: of the contraction.
        bytes: of its factors over all samples.
        seconds: of the contraction: estimated by `plan_gram`, measured after the run.
        features: numbers kept of a sketched gradient (of a lookup, for each token); None: it is exact.
    """

    module: str
    parameter: str
    segment: str
    path: str
    strategy: str
    rows: int
    columns: int
    tokens: int
    flops: float
    bytes: float
    seconds: float | None = None
    features: int | None = None


@dataclass
class Plan:
    """A job's plan, like a database's EXPLAIN.

    Attributes:
        parameters: a row for every selected parameter that f depends on.
        unused: selected parameters that f does not depend on: their gradient is zero.
        negligible: those whose gradient is zero but for rounding, on the probed samples; they have no sign.
        frozen: the model's parameters that are not selected.
        samples: samples in all groups.
        tokens: tokens in all samples, padding cut.
        outputs: C.
        microbatches: number of microbatches.
        blocks: blocks in the stack; 0 when the model is one segment.
        pass_flops: forward, recomputed forward and C activation-only backwards.
        hidden_bytes: hidden states and cotangents held between the directions.
        factor_bytes: the largest segment's factors.
        gram_bytes: the accumulators.
        rate: measured flop/s of the contractions.
        peak_bytes: estimate of the memory needed above the loaded model.
        sweeps: passes over samples: 1, or one for each pair of tiles.
        layout: where hidden states wait, and what is held at once (`gram.layout.Layout`).
        probe_seconds: time the probe took.
        pass_seconds: estimate of the passes' time, from one microbatch.
        check_seconds: estimate of the time of the checks, and of the noise.
        projection_flops: of a sketch's projections.
        ranks: processes that share the job; memory is then that of each.
        scaling: what it takes on as many ranks as were asked for (`gram.scaling.Scaling`).
        held_out_grams: Grams of the train examples, under heads fitted without a fold of them, that a job computes
            besides; no other figure but the next counts them.
        held_out_seconds: estimate of their time.
    """

    parameters: list[PlanRow]
    unused: list[str]
    negligible: list[str]
    frozen: list[str]
    samples: int
    tokens: int
    outputs: int
    microbatches: int
    blocks: int
    pass_flops: float
    hidden_bytes: float
    factor_bytes: float
    gram_bytes: float
    rate: float
    peak_bytes: float = float("nan")
    sweeps: int = 1
    layout: dict[str, Any] = field(default_factory=dict)
    probe_seconds: float = 0.0
    pass_seconds: float = 0.0
    check_seconds: float = 0.0
    projection_flops: float = 0.0
    ranks: int = 1
    scaling: dict[str, Any] = field(default_factory=dict)
    held_out_grams: int = 0
    held_out_seconds: float = 0.0

    @property
    def flops(self) -> float:
        """All floating-point operations: passes, projections and contractions."""
        return self.pass_flops + self.projection_flops + sum(row.flops for row in self.parameters)

    @property
    def seconds(self) -> float:
        """Estimate of the run's time: probe, passes, checks, and all else at the contractions' measured rate."""
        return self.probe_seconds + self.pass_seconds + self.contract_seconds + self.check_seconds

    @property
    def contract_seconds(self) -> float:
        """Contractions and projections at the contractions' measured rate."""
        return (self.flops - self.pass_flops) / self.rate if self.rate else 0.0  # no work, no rate

    def facts(self) -> list[tuple[str, str]]:
        """Return (label, value) rows of what matters most."""
        known = np.isfinite(self.peak_bytes)
        rows = [
            ("examples", f"{self.samples:,}"),
            ("tokens", f"{self.tokens:,}"),
            ("outputs", str(self.outputs)),
            ("parameter tensors", f"{len(self.parameters):,}"),
            ("strategies", ", ".join(sorted({row.strategy for row in self.parameters}))),
            ("work", f"{self.flops / 1e9:,.1f} GFLOP, passes {self.pass_flops / 1e9:,.1f}"),
            ("time", f"about {self.seconds:.1f} s"),
            ("peak memory", f"{self.peak_bytes / 2**20:,.0f} MiB above the model" if known else ""),
            ("ranks", str(self.ranks) if self.ranks > 1 else ""),
        ]
        return [(label, value) for label, value in rows if value]

    def __repr__(self) -> str:
        return "Plan(" + "; ".join(f"{label} {value}" for label, value in self.facts()) + ")"

    def _repr_html_(self) -> str:
        return html_facts("Plan", self.facts())

    def table(self) -> list[dict[str, Any]]:
        """Return one mapping for each parameter."""
        return [asdict(row) for row in self.parameters]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        found = asdict(self)
        return found | {"flops": self.flops, "seconds": self.seconds}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Plan:
        """Return the plan `to_dict` described."""
        given = {"negligible": [], "frozen": [], **found}  # older files lack these
        given = {k: v for k, v in given.items() if k not in {"flops", "seconds"}}
        return cls(**{**given, "parameters": [PlanRow(**row) for row in found["parameters"]]})
