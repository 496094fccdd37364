"""Seeded damage to HDF5 files that stays well-formed HDF5."""

from __future__ import annotations

import json
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from bench.fuzzing.mutators import broken_json

_TEXT = h5py.string_dtype()
_DTYPES: list[Any] = [
    "f4", "f2", ">f8", "i8", "u1", "?", "c16", "S5", _TEXT, h5py.vlen_dtype(float), h5py.ref_dtype,
    np.dtype([("a", "f8"), ("b", "i4")]), np.dtype(("f8", (2,))), h5py.enum_dtype({"a": 1}), h5py.opaque_dtype("V7"),
]  # fmt: skip
_SHAPES: list[Any] = [
    (), (0,), (1,), (3,), (0, 0), (1, 1), (2, 3), (40, 40), (2, 2, 2), (1,) * 10, (10**9,), (10**9, 10**9),
    (10**6, 10**4), (2**62,), (2**31, 2**31), (1, 10**12),
]  # fmt: skip
_ATTRIBUTES: list[Any] = [
    0, -1, 1.5, np.nan, np.inf, "", "trace", "full", "per-output", "sgd", "x" * 5000, b"bytes", [1, 2], [], ["a", "b"],
    np.ones((3, 3)), h5py.Empty("f8"), 2**63, True, np.float32(1), "ntkengine-gram/2",
]  # fmt: skip


def mutate_structure(path: Path, rng: np.random.Generator) -> None:
    """Change one number and leave its checksum, or change one to three things of the file's structure."""
    with h5py.File(path, "r+") as file:
        if rng.random() < 0.2:
            _poke(file, rng)
            return
        for _ in range(int(rng.integers(1, 4))):
            change = _CHANGES[int(rng.integers(len(_CHANGES)))]
            with suppress(KeyError, ValueError, TypeError, OSError, RuntimeError, AttributeError, MemoryError):
                change(file, rng)


def _pick(file: h5py.File, rng: np.random.Generator, kind: Any = h5py.Dataset) -> Any:
    found: list[Any] = []
    file.visititems(lambda _, item: found.append(item) if isinstance(item, kind) else None)
    heavy = [item for item in found if not item.name.startswith("/tiles")]
    found = heavy if heavy and rng.random() < 0.7 else found
    return found[int(rng.integers(len(found)))]


def _values(item: h5py.Dataset) -> Any:
    if item.size is None or item.size > 10**5 or item.external or item.is_virtual:
        raise ValueError("an earlier change has made it what takes long to read")
    return item[...]


def _again(item: h5py.Dataset, **given: Any) -> None:
    """Make a dataset anew under its name, with its attributes, checksum and all."""
    file, name, kept = item.file, item.name, dict(item.attrs)
    if "shape" not in given and "data" not in given:
        given["data"] = _values(item)
    del file[name]
    made = file.create_dataset(name, **given)
    for key, value in kept.items():
        made.attrs[key] = value


def _poke(file: h5py.File, rng: np.random.Generator) -> None:
    while True:
        item = _pick(file, rng)
        if item.size and item.dtype.kind == "f" and not item.is_virtual:
            break
    at = tuple(int(rng.integers(n)) for n in item.shape)
    item[at] = rng.choice([np.nan, np.inf, -np.inf, 0.0, float(item[at]) + 1e-12, -float(item[at]), 1e300])


def _retype(file: h5py.File, rng: np.random.Generator) -> None:
    item, dtype = _pick(file, rng), _DTYPES[int(rng.integers(len(_DTYPES)))]
    with suppress(TypeError, ValueError):
        return _again(item, data=_values(item).astype(dtype))
    return _again(item, shape=item.shape, dtype=dtype)


def _reshape(file: h5py.File, rng: np.random.Generator) -> None:
    item, shape = _pick(file, rng), _SHAPES[int(rng.integers(len(_SHAPES)))]
    if np.prod(shape, dtype=float) < 10**4 and rng.random() < 0.7:
        return _again(item, data=np.ones(shape, item.dtype))
    chunks = tuple(min(n, 64) for n in shape) if shape and rng.random() < 0.7 else None
    return _again(item, shape=shape, dtype=item.dtype, chunks=chunks, fillvalue=1 if item.dtype.kind in "iuf" else None)


def _transpose(file: h5py.File, rng: np.random.Generator) -> None:
    item = _pick(file, rng)
    _again(item, data=_values(item).T)


def _null(file: h5py.File, rng: np.random.Generator) -> None:
    item = _pick(file, rng)
    _again(item, data=h5py.Empty(item.dtype))


def _growing(file: h5py.File, rng: np.random.Generator) -> None:
    item = _pick(file, rng)
    _again(item, data=_values(item), maxshape=(None,) * item.ndim, chunks=True)


def _delete(file: h5py.File, rng: np.random.Generator) -> None:
    del file[_pick(file, rng, (h5py.Dataset, h5py.Group)).name]


def _extra(file: h5py.File, rng: np.random.Generator) -> None:
    groups = [file, *[g for g in ("modules", "extras", "json", "tiles", "crosses") if g in file]]
    group = groups[int(rng.integers(len(groups)))]
    group = file if group is file else file[group]
    name = str(rng.choice(["x", "-1", "99999999999999999999", "é\u2028", "٣", "0x", "a.b", "cross", "eval_id", "json"]))
    kind = int(rng.integers(3))
    if kind == 0:
        group.create_group(name)
    elif kind == 1:
        group[name] = np.dtype("f8")
    else:
        group.create_dataset(name, data=rng.normal(size=(3, 3)))


def _link(file: h5py.File, rng: np.random.Generator) -> None:
    item = _pick(file, rng, (h5py.Dataset, h5py.Group))
    name, target = item.name, _pick(file, rng, (h5py.Dataset, h5py.Group)).name
    links = [
        h5py.SoftLink(target),
        h5py.SoftLink("/nowhere"),
        h5py.ExternalLink("other.h5", "/gram"),
        file[target],
        file,
    ]
    del file[name]
    file[name] = links[int(rng.integers(len(links)))]


def _filter(file: h5py.File, rng: np.random.Generator) -> None:
    options: list[dict[str, Any]] = [
        {"compression": "lzf"}, {"compression": "gzip"}, {"fletcher32": True}, {"scaleoffset": 3}, {"shuffle": True},
        {"compression": 32015, "allow_unknown_filter": True}, {"compression": 307, "allow_unknown_filter": True},
    ]  # fmt: skip
    item, option = _pick(file, rng), options[int(rng.integers(len(options)))]
    if "allow_unknown_filter" in option:
        return _again(item, shape=item.shape, dtype=item.dtype, chunks=item.shape, **option)
    return _again(item, data=_values(item), chunks=item.shape, **option)


def _elsewhere(file: h5py.File, rng: np.random.Generator) -> None:
    item = _pick(file, rng)
    size = max(1, item.size * item.dtype.itemsize)
    _again(item, shape=item.shape, dtype=item.dtype, external=[("/etc/hostname", 0, size)])


def _virtual(file: h5py.File, rng: np.random.Generator) -> None:
    item = _pick(file, rng)
    shape = item.shape if rng.random() < 0.5 else (10**9,) * item.ndim
    layout = h5py.VirtualLayout(shape, item.dtype)
    source = str(rng.choice([".", "other.h5", "/etc/hostname", "../x.h5", "k.h5"]))
    layout[tuple(slice(0, n) for n in item.shape)] = h5py.VirtualSource(source, "gram", item.shape)
    name = item.name
    del file[name]
    file.create_virtual_dataset(name, layout)


def _attribute(file: h5py.File, rng: np.random.Generator) -> None:
    item = file if rng.random() < 0.5 else _pick(file, rng)
    names = [*item.attrs, "new"]
    name = names[int(rng.integers(len(names)))]
    # A checksum that is gone is that of an older file; a module's name has none.
    if rng.random() < 0.3 and name not in ("crc32", "new", "name"):
        del item.attrs[name]
    elif name != "name" or rng.random() < 0.5:
        value = _ATTRIBUTES[int(rng.integers(len(_ATTRIBUTES)))]
        if name != "name" or not isinstance(value, str):
            item.attrs[name] = value


def _json(file: h5py.File, rng: np.random.Generator) -> None:
    names = list(file["json"])
    name = names[int(rng.integers(len(names)))]
    text = broken_json(_values(file[f"json/{name}"]).item().decode(), rng)
    if rng.random() < 0.1:
        text = "[" * 4000 + "]" * 4000
    del file[f"json/{name}"]
    made = file.create_dataset(f"json/{name}", data=text, dtype=_TEXT)
    made.attrs["crc32"] = zlib.crc32(json.dumps(text, sort_keys=True).encode())


_CHANGES = [
    _retype, _reshape, _transpose, _null, _growing, _delete, _extra, _link, _filter, _elsewhere, _virtual, _attribute,
    _attribute, _json, _json, _json,
]  # fmt: skip
