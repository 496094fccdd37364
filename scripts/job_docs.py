#!/usr/bin/env python3
"""Write `docs/job-file.md` from the docstrings of a job's tables: every key, its default, its flag, what it means.

With `--check` nothing is written, and the exit code is 1 when the page is not what would be written.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "job-file.md"
# Keys whose flag has another name.
FLAGS = {
    "model.path": "model",
    "data.train": "data",
    "data.eval": "evaluate",
    "data.text": "text_column",
    "data.text_pair": "pair_column",
    "data.label": "label_column",
    "head.fit": "fit_head",
    "head.ridge": "head_ridge",
    "forecast.ridge": "forecast_ridge",
}
HEAD = """# The keys of a job file

Written by `scripts/job_docs.py` from the docstrings; a test keeps it so. A job file is TOML, with `out = "k.h5"` at its
top and the tables below; `[model]` needs `path`, `[data]` needs `train`, all else has a default. Paths are taken from
the file's folder. Flags of `ntkengine gram`, `plan`, `select` and `finetune` override keys; a key that does not belong
is refused by name.
"""


def meanings(thing: Any, section: str) -> dict[str, str]:
    """Return what a docstring's section says, by name."""
    text = (inspect.getdoc(thing) or "").partition(f"{section}:\n")[2]
    found: dict[str, str] = {}
    for line in text.splitlines():
        if line and not line.startswith(" "):
            break
        entry = re.fullmatch(r"    (\w+): (.*)", line)
        if entry is not None:
            found[entry[1]] = entry[2]
        elif found and line.strip():
            found[next(reversed(found))] += " " + line.strip()
    return found


def flags() -> dict[str, str]:
    """Return the flag of each parameter of the commands that has one."""
    from ntkengine.finetunecommand import finetune
    from ntkengine.jobflags import collect

    found = {"forecast_ridge": "--ridge"}  # the one flag of `forecast` that overrides a key
    for call in (collect, finetune):
        for name, parameter in inspect.signature(call, eval_str=True).parameters.items():
            for option in getattr(parameter.annotation, "__metadata__", ()):
                # Typer takes a name in the default's place for one.
                given = [getattr(option, "default", None), *(getattr(option, "param_decls", None) or ())]
                spelt = [s.partition("/")[0] for s in given if isinstance(s, str) and s.startswith("--")]
                found.setdefault(name, spelt[0] if spelt else "--" + name.replace("_", "-"))
    return found


def page() -> str:
    """Return the whole page."""
    from ntkengine import compute_gram
    from ntkengine.jobparts import DataPart, FinetunePart, ForecastPart, GramPart, HeadPart, ModelPart
    from ntkengine.recipe import Recipe

    known = flags()
    lines = [HEAD]
    for part in (ModelPart, DataPart, HeadPart, GramPart, ForecastPart, FinetunePart):
        table = part.__name__.removesuffix("Part").lower()
        told = meanings(part, "Attributes")
        if part is GramPart:
            told = meanings(compute_gram, "Args") | told
        if part is FinetunePart:
            told = meanings(Recipe, "Attributes") | told
        lines += [f"\n## [{table}]\n", "| key | default | flag | meaning |", "|---|---|---|---|"]
        for item in fields(part):
            default = "needed" if item.default is MISSING else "" if item.default is None else f"`{toml(item.default)}`"
            flag = known.get(FLAGS.get(f"{table}.{item.name}", item.name), "")
            meaning = told[item.name].replace("|", "\\|")
            lines.append(f"| `{item.name}` | {default} | {flag and f'`{flag}`'} | {meaning} |")
    return "\n".join(lines) + "\n"


def toml(value: Any) -> str:
    """Return a default as TOML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(list(value)) if isinstance(value, tuple) else f"{value:g}"


def main() -> None:
    """Write the page, or compare it."""
    from api_docs import keep  # beside this file

    keep(PAGE, page)


if __name__ == "__main__":
    main()
