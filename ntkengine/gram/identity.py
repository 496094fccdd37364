"""What defines a Gram file's values, and what to do with a file that is already there."""

from __future__ import annotations

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
from ntkengine.inputs.fingerprint import (
    fingerprint_array,
    fingerprint_function,
    fingerprint_inputs,
    fingerprint_model,
)

log = logging.getLogger(__name__)


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
    """
    names = sorted(task.selected)
    given = task.readout.given
    return {
        "model": fingerprint_model(model),
        "data": [fingerprint_inputs(g) for g in task.samples.groups],
        "two_inputs": task.two,
        "params": [len(names), fingerprint_array(np.array(names))],
        "readout": [task.readout.name, "" if given is None else fingerprint_function(given)],
        **settings,
        "settings": dict(job or {}),
        **{f"{name}_sha256": fingerprint_array(array) for name, array in arrays.items() if array is not None},
    }


def writable(path: Path) -> Path:
    """Return the path after checking that a file could appear there."""
    if not path.parent.is_dir():
        msg = f"out: folder {path.parent} does not exist"
        raise InputError(msg)
    if path.is_dir():
        msg = f"out: {path} is a folder, expected a file name"
        raise InputError(msg)
    if not path.exists() and not os.access(path.parent, os.W_OK):
        msg = f"out: folder {path.parent} cannot be written to"
        raise InputError(msg)
    return path


def existing(path: Path, wanted: Mapping[str, Any], resume: bool) -> Gram:
    """Return the complete file of the same job.

    Raises:
        InputError: another job's file, naming the first difference, or `resume=False`.
    """
    if not resume:
        msg = f"out: {path} exists; remove it, choose another name, or allow resume"
        raise InputError(msg)
    difference = store.first_difference(store.read_job(path), wanted)
    if difference is not None:
        msg = f"out: {path} holds another job: {difference}"
        raise InputError(msg)
    log.info("%s is complete: nothing to compute", path)
    return store.open_gram(path)
