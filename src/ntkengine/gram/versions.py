"""Versions of the libraries that take part in a job: what they define counts by its name alone."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from torch import nn

from ntkengine.inputs.fingerprint import libraries_of
from ntkengine.inputs.readout import Readout


def versions(model: nn.Module, readout: Readout) -> dict[str, str]:
    """Return the versions of the installed libraries that a model's classes are of, a readout uses, or any model needs.

    `identity` knows what such a library defines by its name alone.
    """
    homes = {type(module).__module__.partition(".")[0] for module in model.modules()}
    homes |= libraries_of(readout.given)
    found = {}
    for name in sorted(homes | {"torch", "transformers", "ntkengine"}):
        version = getattr(sys.modules.get(name), "__version__", None)
        if isinstance(version, str):
            found[name] = version
    return found


def other_versions(there: Mapping[str, str], here: Mapping[str, str]) -> str | None:
    """Return `library: version there, version here` where two sets of versions differ, or None."""
    found = [
        f"{name} {there[name]} there, {here[name]} here" for name in here if there.get(name, here[name]) != here[name]
    ]
    return "; ".join(found) or None
