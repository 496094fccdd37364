"""What defines a Gram file's values, and what to do with a file that is already there."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ntkengine import store
from ntkengine.errors import InputError
from ntkengine.gram.result import Gram
from ntkengine.gram.task import Task
from ntkengine.gram.versions import other_versions
from ntkengine.inputs.fingerprint import (
    fingerprint_array,
    fingerprint_function,
    fingerprint_inputs,
    fingerprint_model,
)

log = logging.getLogger(__name__)

_LONGEST = 220  # bytes of a file's name: it is part of the names of parts, shards and unfinished files, of up to 255


def identity(
    model: nn.Module, task: Task, settings: Mapping[str, Any], arrays: Mapping[str, Any], job: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return what defines a file's values: the same mapping means the same numbers.

    Args:
        model: as the user gave it.
        task: the validated call.
        settings: arguments that change values, as plain JSON types.
        arrays: further arrays kept in the file; None ones are left out.
        job: the caller's own mapping.

    Raises:
        InputError: one of the mappings is no JSON.
    """
    names = sorted(task.selected)
    given = task.readout.given
    hashes = {f"{name}_sha256": fingerprint_array(array) for name, array in arrays.items() if array is not None}
    # The first that differs is told: a head fitted on other targets makes another model of the same one.
    return {
        "data": [fingerprint_inputs(g) for g in task.samples.groups],
        "two_inputs": task.two,
        **{name: hashes.pop(name) for name in ("targets_sha256", "eval_targets_sha256") if name in hashes},
        "model": fingerprint_model(model),
        "params": [len(names), fingerprint_array(np.array(names))],
        "readout": [task.readout.name, "" if given is None else fingerprint_function(given)],
        **settings,
        "settings": _plain(dict(job or {})),
        **hashes,
    }


def _plain(job: dict[str, Any]) -> Any:
    """Return what a file gives back of it; refuse what JSON has no word for, NaN and infinity too."""
    try:
        return json.loads(json.dumps(job, allow_nan=False))
    except (TypeError, ValueError) as error:
        msg = f"job: expected plain JSON (texts, finite numbers, lists, mappings), got dict: {error}"
        raise InputError(msg) from error


def writable(path: Path) -> Path:
    """Return the path after checking that a file could appear there."""
    if not path.parent.is_dir():
        msg = f"out: folder {path.parent} does not exist"
        raise InputError(msg)
    if path.is_dir():
        msg = f"out: {path} is a folder, expected a file name"
        raise InputError(msg)
    if len(os.fsencode(path.name)) > _LONGEST:
        msg = f"out: expected a file name of at most {_LONGEST} bytes, got {len(os.fsencode(path.name))}"
        raise InputError(msg)
    if not path.exists() and not os.access(path.parent, os.W_OK):
        msg = f"out: folder {path.parent} cannot be written to"
        raise InputError(msg)
    return path


def existing(
    path: Path, wanted: Mapping[str, Any], resume: bool, here: Mapping[str, str], ids: Mapping[str, list[str]]
) -> Gram:
    """Return the complete file of the same job; other versions of libraries than its own are warned of.

    Args:
        path: the file.
        wanted: what defines the values.
        resume: False refuses it.
        here: versions.
        ids: names of examples, which the file must have where they are given.

    Raises:
        InputError: another job's file, naming the first difference, or `resume=False`.
    """
    if not resume:
        msg = f"out: {path} exists; remove it, choose another name, or allow resume"
        raise InputError(msg)
    difference = store.first_difference(store.read_job(path), wanted)
    if difference is not None:
        msg = f"out: {path} holds another job: {difference}; name another file, or remove it"
        raise InputError(msg)
    gram = store.open_gram(path)
    for kind, names in ids.items():
        there = gram.meta.get(kind, [])
        if list(map(str, names)) != there:
            row = next((i for i, pair in enumerate(zip(there, names, strict=False)) if pair[0] != str(pair[1])), 0)
            was = repr(there[row]) if there else "without names"
            msg = f"out: {path} names its examples otherwise: {kind}s[{row}] is {was} there, {names[row]!r} here"
            raise InputError(msg)
    other = other_versions(gram.meta.get("versions", {}), here)
    if other is not None:
        log.warning("%s is of the same job but of other versions, and taken as it is: %s", path, other)
    log.info("%s is complete: nothing to compute", path)
    return gram
