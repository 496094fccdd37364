#!/usr/bin/env python3
"""Write `docs/json.md` from the docstrings of what commands print with `--json`: every key, and what it means.

With `--check` nothing is written, and the exit code is 1 when the page is not what would be written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "json.md"
HEAD = """# What `--json` prints

Written by `scripts/json_docs.py` from the docstrings; a test keeps it so. `--json` prints one line, an object, on
standard output and nothing else there; errors and progress go to standard error. Numbers that are not finite, such as
an unknown error, are `null`; an interval is a list of value, low, high. Units are those of the tables:
[faq.md](faq.md). `ntkengine select --save` writes what `select --json` prints, and `finetune --history` the lines of
`finetune`: first an object with `recipe`, `seconds`, `measuring_seconds` and `batch_losses`, then each of `history`.
"""
PATH = {"path": "the Gram file"}
ERROR = "what the noise may do to `{}`"


@dataclass(frozen=True)
class Shape:
    """The keys of an object.

    Attributes:
        rows: what each means.
        inner: which other heading has the keys of what stands below a key: of an object, or of each in a list.
        free: keys below which names are the user's, such as those of modules.
        every: the heading that has the keys of each value; the object's own keys are names.
    """

    rows: dict[str, str] = field(default_factory=dict)
    inner: dict[str, str] = field(default_factory=dict)
    free: frozenset[str] = frozenset()
    every: str = ""


def shapes() -> dict[str, Shape]:
    """Return the page's objects by heading: commands, and below each what stands in its object first."""
    from job_docs import meanings  # beside this file

    from ntkengine.doctor import Item
    from ntkengine.finetune.history import FineTuning, Measured
    from ntkengine.forecast import Forecast
    from ntkengine.forecast.outcome import Outcome
    from ntkengine.forecast.ranking import Choice, Ranking
    from ntkengine.forecast.simulate import Simulation
    from ntkengine.gram.layout import Layout
    from ntkengine.gram.plan import Plan, PlanRow
    from ntkengine.gram.scaling import Scaling
    from ntkengine.invariance import Invariance
    from ntkengine.recipe import Recipe
    from ntkengine.spectrum import ConditionNumber, Ritz

    def of(thing: Any) -> dict[str, str]:
        return meanings(thing, "Attributes")

    forecast = {}
    for item in fields(Forecast):
        forecast[item.name] = of(Forecast)[item.name]
        if "Estimate" in str(item.type):
            forecast[f"{item.name}_error"] = ERROR.format(item.name)
    ritz, plan, one, ranking, layout = of(Ritz), of(Plan), of(Choice), of(Ranking), of(Layout)
    plan["scaling"] = f"{plan['scaling'].partition(' (`')[0]}, `{{}}` without `--ranks`"
    for name in ("factor_bytes", "copies"):
        layout[name] = f"{layout[name].rstrip('.')}; `null`: no limit"
    path_of = ("ridge", "ridge_loo", "ridge_gcv", "ridges", "train_mse", "loo_mse", "loo_accuracy", "gcv", "eval_mse")
    kernel = {name: one[name] for name in ("condition", "trace", "alignment")}
    kernel["condition"] = f"as text, with its interval: {kernel['condition']}"
    kernel |= {"alignment_error": ERROR.format("alignment")}
    kernel |= {f"weyl_lambda_{end}": f"bound on λ_{end} from its modules alone" for end in ("min", "max")}
    sketch = {"sketch": "of a sketched Gram: its features and measured error, as in `meta`; absent of an exact one"}
    return {
        "gram, info": Shape(
            PATH
            | {
                "contraction": "how outputs enter the Gram",
                "transform": "of which optimiser the inner product is",
                "noise": "estimate of ‖K̃ − K‖₂; `null` where it was not measured",
                "shapes": "of each array in the file, or `null`: `values` is K, `cross` eval × train",
                "modules": "names of those whose own Grams are kept",
                "meta": "how it came about: [file-format.md](file-format.md#what-the-json-texts-say)",
            },
            free=frozenset(("shapes", "meta")),
        ),
        "info of a job that is not complete": Shape(
            PATH
            | {
                "complete": "`false`",
                "running": "whether a process is at work; `null`: on another machine",
                "damaged": "whether the file is complete but for damaged tiles",
                "checkpoint": "when the newest was written, in seconds since 1970, or `null`",
                "done": "flops done",
                "total": "flops in all; 1 or less while they are not known",
                "stage": "what it is at",
                "pid": "of the process",
                "host": "where it runs",
                "started": "when, in seconds since 1970",
                "at": "when it last told of itself",
            }
        ),
        "verify": Shape(
            PATH
            | {
                "sound": "whether nothing is wrong",
                "problems": "what is wrong, a sentence each; without `--repair`",
                "repaired": "damaged tiles mended, with `--repair`",
                "open": "damaged tiles that the next run of the same job computes, with `--repair`",
            }
        ),
        "plan": Shape(
            plan | {"flops": _line(Plan.flops), "seconds": _line(Plan.seconds)},
            {"parameters": "a parameter of a plan", "layout": "layout", "scaling": "scaling"},
        ),
        "a parameter of a plan": Shape(of(PlanRow)),
        "layout": Shape(layout),
        "scaling": Shape(of(Scaling)),
        "spectrum": Shape(
            PATH
            | {name: ritz[name] for name in ("values", "residuals", "bounds", "certified")}
            | {"condition": "the condition number"}
            | {"effective_rank": forecast["effective_rank"], "effective_rank_error": forecast["effective_rank_error"]}
            | sketch,
            {"condition": "condition"},
            frozenset(("sketch",)),
        ),
        "condition": Shape(of(ConditionNumber)),
        "ridge": Shape(
            PATH
            | {name: forecast[name] for name in (*path_of, "eval_accuracy")}
            | {
                "effective_dimension": "(R,) tr K(K + ridge·I)⁻¹, summed over systems",
                "effective_dimension_error": "(R,) " + ERROR.format("effective_dimension"),
            }
            | sketch,
            free=frozenset(("sketch",)),
        ),
        "compare": Shape(
            {
                "paths": "the two files, A and B",
                "same_examples": "whether they are known to be as many of the same; if not, all to `scale` is `null`",
                "relative_difference": "‖A − B‖_F / ‖A‖_F",
                "relative_difference_error": ERROR.format("relative_difference"),
                "spectral_difference": "‖A − B‖₂",
                "noise": "of both together, in the same norm",
                "within_noise": "whether the difference is no larger",
                "alignment": "⟨A, B⟩_F / ‖A‖_F‖B‖_F, 1 for kernels that differ in their scale alone",
                "alignment_error": ERROR.format("alignment"),
                "scale": "‖B‖_F / ‖A‖_F",
                "effective_rank": "of each",
                "effective_rank_error": "what the noise may do to each",
                "differing": "facts and settings that differ, as `info` prints them: A's and B's by name",
            },
            free=frozenset(("differing",)),
        ),
        "forecast": Shape(PATH | forecast, {"condition": "condition", "training": "training"}, frozenset(("modules",))),
        "training": Shape(
            of(Simulation) | {"outcome": _line(Simulation.outcome)}, {"recipe": "recipe", "outcome": "outcome"}
        ),
        "recipe": Shape(of(Recipe)),
        "select": Shape(
            {name: ranking[name] for name in ("choices", "recipe", "assumptions", "start")}
            | {"peft": "fields of the best one's `peft.LoraConfig`: `peft_type`, `r`, `lora_alpha`, `target_modules`"},
            {"choices": "a choice", "recipe": "recipe", "start": "outcome"},
        ),
        "a choice": Shape(
            {name: one[name] for name in ("name", "modules", "parameters")}
            | of(Outcome)
            | {"kernel": "figures of its kernel on the training examples; `null` with `--no-kernels`"},
            {"kernel": "kernel"},
        ),
        "kernel": Shape(kernel),
        "outcome": Shape(of(Outcome)),
        "finetune": Shape(of(FineTuning), {"recipe": "recipe", "history": "a measurement"}),
        "a measurement": Shape(of(Measured)),
        "doctor": Shape(every="what was looked at"),
        "what was looked at": Shape({k: v for k, v in of(Item).items() if k != "name"}),
        "doctor --model": Shape(
            {
                "invariance": "relative differences, for each way of running",
                "advice": "what to do about it, a sentence each",
            },
            {"invariance": "a way of running"},
        ),
        "a way of running": Shape(of(Invariance)),
    }


def page() -> str:
    """Return the whole page."""
    lines = [HEAD]
    known = shapes()
    inside = {name for shape in known.values() for name in (*shape.inner.values(), shape.every)}
    for heading, shape in known.items():
        lines.append(f"\n{'###' if heading in inside else '##'} {heading}\n")
        if shape.every:
            lines.append(f"By name, {_link(shape.every)}.")
            continue
        lines += ["| key | meaning |", "|---|---|"]
        for key, meaning in shape.rows.items():
            told = re.sub(r"\bNone\b", "`null`", meaning.rstrip(".")).replace("|", "\\|")
            if key in shape.inner:
                told = f"{re.sub(r' *[(]`[^)]*`[)]$', '', told)}: {_link(shape.inner[key])}"
            lines.append(f"| `{key}` | {told} |")
    return "\n".join(lines) + "\n"


def _link(heading: str) -> str:
    return f"[{heading}](#{heading.replace(' ', '-')})"


def _line(thing: property) -> str:
    text = str(thing.__doc__).partition("\n")[0]
    return text[0].lower() + text[1:]


def main() -> None:
    """Write the page, or compare it."""
    from api_docs import keep  # beside this file

    keep(PAGE, page)


if __name__ == "__main__":
    main()
