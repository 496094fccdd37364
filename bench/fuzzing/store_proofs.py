"""What is read of Gram files and of unfinished ones, and the proof that it is right."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from bench.fuzzing.proofs import ProofError
from ntkengine import store
from ntkengine.errors import InputError

# Gram files


def _numbers(gram: Any) -> dict[str, Any]:
    found = {"gram": gram.values, "cross": gram.cross, "outputs": gram.outputs, "targets": gram.targets}
    found |= {"eval_outputs": gram.eval_outputs, "eval_targets": gram.eval_targets, "noise": gram.noise}
    for group, parts in (("modules", gram.modules), ("crosses", gram.cross_modules)):
        found |= {group: list(parts), **{f"{group}/{i}": matrix for i, matrix in enumerate(parts.values())}}
    found |= {f"extras/{name}": array for name, array in gram.extras.items()}
    found |= {name: gram.meta[name] for name in ("example_id", "eval_id") if name in gram.meta}
    return {k: _plain(v) for k, v in found.items() if v is not None} | {"how": (gram.contraction, gram.transform)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return value[0], _plain(value[1])
    if isinstance(value, str | list | float):
        return value
    array = value[...] if isinstance(value, h5py.Dataset) else np.asarray(value)
    return str(array.dtype), array.shape, array.tobytes()


def prove_gram(work: Path, seeds: Path) -> None:
    from ntkengine.filecommands import described
    from ntkengine.report.tables import gram_table

    path = work / "k.h5"
    found: dict[str, Any] = {}
    unreadable = False
    problems: list[str] | None = None
    try:
        gram = store.open_gram(path)
        try:
            try:
                found = _numbers(gram)
            except OSError:  # a tile whose own sums or packing are damaged: HDF5 says so
                unreadable = True
            gram_table(gram)
            json.dumps(described(gram)).encode()
        finally:
            gram.values.file.close()
    finally:
        with contextlib.suppress(InputError):  # it has a word on every file
            problems = store.verify_gram(path)
        with contextlib.suppress(InputError):
            store.read_job(path)
    whole = store.open_gram(seeds / "k.h5")
    wanted = _numbers(whole)
    whole.values.file.close()
    added = {name for name in found if name.startswith("extras/") and name not in wanted}
    changed = [name for name, value in found.items() if name not in added and wanted.get(name) != value]
    if unreadable:
        changed.append("a tile that cannot be read")
    if not changed or problems:
        return
    with h5py.File(path) as file:  # files from before modules had checksums
        if all(name.startswith(("modules", "crosses", "cross")) and f"tiles/{name}" not in file for name in changed):
            return
    raise ProofError(f"{changed[:3]} changed and verify finds nothing")


def prove_commands(work: Path, seeds: Path) -> None:
    from ntkengine import cli

    del seeds
    path, refused = str(work / "k.h5"), 0
    for command in (["info"], ["info", "--json"], ["spectrum"], ["ridge"], ["forecast", "--json"], ["verify"]):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main([command[0], path, *command[1:]])
            except SystemExit as stop:
                code = stop.code
        if code not in (0, 1, 2) or err.getvalue().count("\n") != (0 if code == 0 else 1):
            raise ProofError(f"{command[0]}: exit {code}, {err.getvalue()!r}")
        refused += code != 0
    if refused:
        raise InputError(err.getvalue().strip())


# What an unfinished job leaves


def prove_checkpoint(work: Path, seeds: Path) -> None:
    from ntkengine.store.checkpoints import load, read_parts

    name = "rank-0000-of-0001.a"
    saved, whole = load(work / name), load(seeds / name)
    parts, wanted = list(read_parts(saved)), list(read_parts(whole))
    if saved.state != whole.state or len(parts) != len(wanted):
        raise ProofError("another state")
    for part, sound in zip(parts, wanted, strict=True):
        if not np.array_equal(part.values, sound.values):
            raise ProofError("other sums")
    store.load_newest(work)


def prove_progress(work: Path, seeds: Path) -> None:
    from ntkengine.report.tables import progress_table

    del seeds
    parts = store.parts_of(work / "k.h5")
    parts.mkdir()
    shutil.move(work / "progress.json", parts / "progress.json")
    found = store.read_progress(work / "k.h5")
    if found is not None:
        progress_table(found)
        json.dumps(found, ensure_ascii=False).encode()
