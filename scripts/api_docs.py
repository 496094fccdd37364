#!/usr/bin/env python3
"""Write `docs/api.md` from the docstrings: every name of `ntkengine.__all__`, and the classes that come back from it.

With `--check` nothing is written, and the exit code is 1 when the page is not what would be written.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"
TOPICS = {
    "Models, texts, outputs": ("inputs.examples", "inputs.models", "inputs.readout", "inputs.heads", "inputs.language"),
    "Gram matrices": ("gram.engine", "gram.foresight", "gram.result", "gram.plan", "gram.transforms", "store"),
    "Without a Gram": ("gram.features", "gram.jacobian", "gram.linear"),
    "Spectrum": ("spectrum",),
    "Kernel regression": ("ridge",),
    "Forecast": ("forecast", "forecast.lora", "forecast.simulate", "forecast.subsets"),
    "Fine-tuning": ("recipe", "finetune", "finetune.bounds", "finetune.callback"),
    "Progress and errors": ("report.progress", "errors"),
}
HEAD = """# API reference

Written by `scripts/api_docs.py` from the docstrings; a test keeps it so. All names are `ntkengine.<name>`, but for what
is marked *returned*, which need not be imported. Units and normalisations: [faq.md](faq.md).
"""


class Reference:
    """The objects of the page, topic by topic.

    Args:
        package: `ntkengine`.
    """

    def __init__(self, package: Any) -> None:
        self._package = package
        self._homes = package._HOME
        self.topics: dict[str, dict[str, Any]] = {
            topic: {name: self._object(name) for home in homes for name in self._homes[home]}
            for topic, homes in TOPICS.items()
        }
        listed = {name for things in self.topics.values() for name in things}
        if listed != set(package.__all__):
            msg = f"api_docs: not in a topic, or not public: {', '.join(sorted(listed ^ set(package.__all__)))}"
            raise SystemExit(msg)
        self.returned = self._add_returned(listed)

    def _object(self, name: str) -> Any:
        thing = getattr(self._package, name)
        return getattr(thing, name) if inspect.ismodule(thing) else thing  # `forecast` is a room and a function

    def _add_returned(self, listed: set[str]) -> set[str]:
        """Add classes that functions return, or that are fields of what is listed, where they are met first."""
        added = set()
        for things in self.topics.values():
            queue = list(things.values())
            for thing in queue:  # which grows meanwhile
                for word in re.findall(r"\w+", " ".join(_mentioned(thing))):
                    kind = getattr(inspect.getmodule(thing), word, None)
                    ours = inspect.isclass(kind) and kind.__module__.startswith("ntkengine")
                    if ours and word not in listed | added:
                        added.add(word)
                        things[word] = kind
                        queue.append(kind)
        return added

    def page(self) -> str:
        """Return the whole page."""
        results = set(self.returned)
        for thing in (t for things in self.topics.values() for t in things.values()):
            results |= set() if inspect.isclass(thing) else set(_mentioned(thing))
        lines, seen = [HEAD], Counter[str]()
        for topic, things in self.topics.items():  # in the order of the headings, of which topics are some
            _anchor(topic.replace(",", "").replace(" ", "-"), seen)
            lines.append(f"* **{topic}**: " + " · ".join(f"[{name}](#{_anchor(name, seen)})" for name in things))
        for topic, things in self.topics.items():
            lines.append(f"\n## {topic}")
            for name, thing in things.items():
                mark = "*returned*\n\n" if name in self.returned else ""
                lines.append(f"\n### {name}\n\n{mark}```text\n{_described(name, thing, name in results)}\n```")
        return "\n".join(lines) + "\n"


def _mentioned(thing: Any) -> list[str]:
    hints = thing.__annotations__
    return [str(hint) for hint in (hints.values() if inspect.isclass(thing) else [hints.get("return", "")])]


def _anchor(name: str, seen: Counter[str]) -> str:
    """Return the anchor of a heading: one that differs from an earlier one by its case only gets a number."""
    anchor = name.lower()
    seen[anchor] += 1
    return anchor if seen[anchor] == 1 else f"{anchor}-{seen[anchor] - 1}"


def _described(name: str, thing: Any, result: bool) -> str:
    """Return the call and docstring of a function, or of a class and its methods; nobody calls a result's class."""
    if not inspect.isclass(thing):
        return f"{_call(name, thing)}\n\n{_text(thing)}"
    head = f"class {name}" if result or issubclass(thing, Exception) else _call(name, thing)
    parts = [f"{head}\n\n{_text(thing)}"]
    for label, member in vars(thing).items():
        own = member.__func__ if isinstance(member, classmethod) else member
        if label.startswith("_") and label not in ("__call__", "__matmul__"):
            continue
        if isinstance(own, property):
            parts.append(f".{label}\n{_text(own)}")
        elif inspect.isfunction(own) and own.__doc__ and own.__module__.startswith("ntkengine"):
            parts.append(f"{_call(f'.{label}', own)}\n{_text(own)}")
    return "\n\n".join(parts)


def _text(thing: Any) -> str:
    return str(inspect.getdoc(thing) or "").strip()


def _call(name: str, thing: Any) -> str:
    """Return `name(parameter: type = default, …) -> type`, a parameter a line where it is long."""
    signature = inspect.signature(thing)
    shown: list[str] = []
    named = False
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not named:
            shown.append("*")
        named = named or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        shown.append(_parameter(parameter))
    back = signature.return_annotation
    end = "" if back is signature.empty or inspect.isclass(thing) else f" -> {back}"
    line = f"{name}({', '.join(shown)}){end}"
    return line if len(line) <= 110 else f"{name}(\n" + "".join(f"    {part},\n" for part in shown) + f"){end}"


def _parameter(parameter: inspect.Parameter) -> str:
    star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    kind = "" if parameter.annotation is parameter.empty else f": {parameter.annotation}"
    default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
    return f"{star}{parameter.name}{kind}{default}"


def keep(page: Path, make: Callable[[], str]) -> None:
    """Write a page, or compare it."""
    sys.path[:0] = [str(ROOT / folder) for folder in ("src", "kernels")]
    text = make()
    if "--check" not in sys.argv[1:]:
        page.write_text(text, encoding="utf-8")
    elif not page.is_file() or page.read_text(encoding="utf-8") != text:
        msg = f"{page}: is not what the docstrings say; run {sys.argv[0]}"
        raise SystemExit(msg)


def main() -> None:
    """Write the page, or compare it."""

    def make() -> str:
        import ntkengine

        return Reference(ntkengine).page()

    keep(PAGE, make)


if __name__ == "__main__":
    main()
