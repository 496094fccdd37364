"""What a flag may be, for shell completion too: names alone, so that a shell does not wait for libraries.

A test holds them against the registries of the rooms they belong to.
"""

from __future__ import annotations

from collections.abc import Callable

from ntkengine.arguments import number

CHOICES: dict[str, tuple[str, ...]] = {
    "--readout": ("logits", "margin", "loss"),
    "--contraction": ("trace", "full", "per-output", "sum-of-outputs"),
    "--transform": ("sgd", "sign", "asymmetric-sign"),
    "--precision": ("high", "exact", "fast"),
    "--backend": ("auto", "triton", "torch"),
    "--params": ("trainable", "all"),
    "--dtype": ("float32", "float64", "bfloat16", "float16"),
    "--device": ("auto", "cpu", "cuda"),
    "--peft": ("lora", "ia3", "adalora", "loha", "lokr", "oft", "boft", "vera", "prompt_tuning", "prefix_tuning"),
    "--task": ("sequence-classification", "causal-lm", "masked-lm"),
    "--optimizer": ("adam", "sgd"),
    "--loss": ("squared", "cross-entropy"),
    "--subsets": ("single", "layers", "types", "greedy", "all"),
    "--which": ("LA", "SA", "BE"),
    "--ridge": ("loo", "gcv"),
    "--head-ridge": ("loo",),
}


def completing(name: str) -> Callable[[str], list[str]]:
    """Return the completion of a flag's value: its names that begin with what is typed."""

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in CHOICES[name] if choice.startswith(incomplete)]

    return complete


def word_or_number(name: str, given: str | None) -> str | float | None:
    """Return one of a flag's words as it is, anything else as a number > 0; None as it is.

    Raises:
        InputError: neither.
    """
    words = CHOICES[name]
    if given is None or given in words:
        return given
    try:
        found: str | float = float(given)
    except ValueError:
        found = given
    return number(name, found, above=0, what=f"{', '.join(map(repr, words))} or a number")
