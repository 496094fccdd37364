"""The ranking of subsets of modules, as users hold it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ntkengine.arguments import whole
from ntkengine.digits import above
from ntkengine.display import html_facts
from ntkengine.forecast.outcome import Outcome
from ntkengine.forecast.result import plain
from ntkengine.recipe import Recipe
from ntkengine.report.tables import BEFORE, RANKED, span
from ntkengine.spectrum import ConditionNumber, Estimate

_SHOWN = 10  # subsets a notebook shows


@dataclass(frozen=True)
class Choice:
    """One subset.

    Attributes:
        name: of the subset.
        modules: what it adapts.
        parameters: trained.
        outcome: its forecast.
        condition: of its kernel on the training examples, expected over the start of A; one start's is usually
            larger, as λ_max is convex and λ_min concave in the kernel. None without a per-module Gram.
        trace: of it, or None.
        alignment: centred kernel-target alignment, with what the noise may do to it, or None.
        weyl: bounds from its modules alone (Σ λ_min(K_l) ≤ λ_min, λ_max ≤ Σ λ_max(K_l)), or None.
    """

    name: str
    modules: tuple[str, ...]
    parameters: int
    outcome: Outcome
    condition: ConditionNumber | None = None
    trace: float | None = None
    alignment: Estimate | None = None
    weyl: tuple[float, float] | None = None


@dataclass(frozen=True)
class Ranking:
    """Subsets by forecast eval loss, the lowest first.

    Attributes:
        choices: the subsets.
        rank: r.
        alpha: α.
        recipe: the training they are forecast for.
        assumptions: what the figures rest on.
        start: the same figures of the model before training, to compare with.
    """

    choices: list[Choice]
    rank: int
    alpha: float
    recipe: Recipe
    assumptions: list[str]
    start: Outcome | None = None

    def peft(self, which: int = 0) -> dict[str, Any]:
        """Return the fields of the `peft.LoraConfig` of a choice.

        Args:
            which: its place; 0 is the best.

        Raises:
            InputError: no such place.
        """
        which = whole("which", which, 0, len(self.choices) - 1)
        return {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": list(self.choices[which].modules),
        }

    def __repr__(self) -> str:
        head = f"Ranking of {len(self.choices)} subsets, {self.note}"
        told = [
            f"  {i + 1}. {c.name}: eval loss {span(c.outcome.eval_loss) or 'unknown'}, {c.parameters:,} parameters"
            for i, c in enumerate(self.choices[:_SHOWN])
        ]
        rest = len(self.choices) - len(told)
        return "\n".join([head, *told, *([f"  and {rest} more"] if rest > 0 else [])])

    def _repr_html_(self) -> str:
        columns, *rows = self.table()
        note = self.table_note
        note += f"; the best {_SHOWN} of {len(self.choices)}" if len(self.choices) > _SHOWN else ""
        shown = rows[:_SHOWN] + rows[max(_SHOWN, len(self.choices)) :]
        return html_facts("Modules by forecast eval loss", shown, columns, note)

    @property
    def note(self) -> str:
        """What is trained, and how, in a line."""
        r = self.recipe
        return f"LoRA of rank {self.rank}, {r.optimizer}, learning rate {r.learning_rate:g}, epochs {r.epochs}"

    @property
    def table_note(self) -> str:
        """The note, and why a bound is ∞ where one is."""
        open_ = any(c.weyl is not None and c.weyl[0] <= 0 for c in self.choices)
        why = "; a bound is ∞ where the spectra of the modules alone leave λ_min bounded by 0 only"
        return self.note + (why if open_ else "")

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-able values; infinity, of an interval from one example, is None."""
        choices = []
        for c in self.choices:
            kernel = None if c.condition is None else {"condition": str(c.condition), "trace": c.trace}
            if kernel is not None:
                kernel |= {"alignment": c.alignment, "weyl_lambda_min": None, "weyl_lambda_max": None}
                kernel |= {} if c.alignment is None else {"alignment_error": c.alignment.error}
                if c.weyl is not None:
                    kernel |= {"weyl_lambda_min": c.weyl[0], "weyl_lambda_max": c.weyl[1]}
            one = {"name": c.name, "modules": list(c.modules), "parameters": c.parameters}
            choices.append({**one, **asdict(c.outcome), "kernel": kernel})
        found = {"choices": choices, "peft": self.peft(), "recipe": self.recipe, "assumptions": self.assumptions}
        found["start"] = self.start
        return {name: plain(value) for name, value in found.items()}

    def table(self) -> list[tuple[str, ...]]:
        """Return rows for printing, the first naming the columns, the last of the model before training."""
        rows: list[tuple[str, ...]] = [RANKED]
        for c in self.choices:
            o = c.outcome
            bound = "" if c.weyl is None else "∞" if c.weyl[0] <= 0 else f"≤ {above(c.weyl[1] / c.weyl[0], 3)}"
            rows.append(
                (
                    c.name,
                    f"{c.parameters:,}",
                    span(o.eval_loss),
                    span(o.eval_accuracy),
                    f"{o.train_loss:.4g}",
                    "" if c.condition is None else c.condition.short,
                    bound,
                )
            )
        if self.start is not None:
            o = self.start
            rows.append((BEFORE, "0", span(o.eval_loss), span(o.eval_accuracy), f"{o.train_loss:.4g}", "", ""))
        return rows
