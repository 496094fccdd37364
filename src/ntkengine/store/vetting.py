"""What a Gram file may hold: plain numbers and texts, all of them in the file, in the shapes of a Gram.

Files come from strangers too. Nothing in them may lead out of them, load code, or make this process allocate what is
not there: everything is looked at here before the first number is read.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ntkengine.errors import InputError
from ntkengine.gram.frame import CONTRACTIONS
from ntkengine.store.heaps import vet_heaps
from ntkengine.store.schema import GROUPS, is_cross, matrices, read_json

# Filters of HDF5 itself; any other one is code loaded from a plug-in.
_FILTERS = {h5py.h5z.FILTER_DEFLATE: "gzip", h5py.h5z.FILTER_SHUFFLE: "shuffle", h5py.h5z.FILTER_FLETCHER32: "sums"}
_MATRICES = ("gram", "cross", "modules/", "crosses/")
_GROUPS = (*GROUPS, "extras", "json", "tiles")
_IDS = ("example_id", "eval_id")
_PACKED = 1100  # deflate cannot pack a byte into less than a 1032nd
_CHUNK = 1 << 24  # bytes; tiles are far smaller


def vet(file: h5py.File, path: Path, *, whole: bool) -> None:
    """Refuse a file with something in it that a Gram file never has.

    Args:
        file: open for reading.
        path: of it.
        whole: not a shard. A shard has no virtual datasets: one over itself would end HDF5 in a crash.

    Cost: looks at every object's header; reads no numbers.

    Raises:
        InputError: naming it.
        OSError, KeyError, RuntimeError, ValueError, TypeError: damaged.
    """
    datasets: list[h5py.Dataset] = []
    _vet_names(file, path, set(), datasets)
    vet_heaps(path, datasets)
    for item in datasets:
        _vet_dataset(item, path)
    for item in datasets:  # after the text that says which shards there are
        if item.is_virtual and not whole:
            raise InputError(f"{path}: {item.name} has its numbers in other files, which a shard never has")
        if item.is_virtual:
            _vet_virtual(file, item, path)


def vet_shapes(file: h5py.File, path: Path) -> None:
    """Refuse arrays whose shapes are not those of one Gram.

    Raises:
        InputError: naming the first.
    """
    if "gram" not in file or "outputs" not in file:
        missing = "outputs" if "gram" in file else "gram"
        raise InputError(f"{path}: is incomplete or damaged (no /{missing})")
    contraction, outputs = file.attrs.get("contraction"), file["outputs"].shape
    if not isinstance(contraction, str) or contraction not in CONTRACTIONS:
        raise InputError(f"{path}: contraction: expected one of {', '.join(CONTRACTIONS)}, got {contraction!r}")
    if len(outputs) != 2:
        raise InputError(f"{path}: /outputs: expected (N, C), got shape {outputs}")
    for group in GROUPS:
        numbers = set(file.get(group, ()))
        tiled = set(file.get(f"tiles/{group}", ()))
        if numbers != {str(i) for i in range(len(numbers))} or not tiled <= numbers:
            raise InputError(f"{path}: /{group}: expected matrices 0, 1, … as in /tiles/{group}, one is missing")
    width = outputs[1] if contraction == "full" else 1
    layers = outputs[1:] if contraction == "per-output" else ()
    columns = file["gram"].shape[-1:]
    held = len(file["eval_outputs"]) if "eval_outputs" in file else None
    wanted: dict[str, tuple[int | None, ...]] = {"eval_outputs": (held, outputs[1])}
    wanted |= {"targets": (outputs[0], None), "eval_targets": (held, None)}
    wanted |= {"example_id": (outputs[0],), "eval_id": (held,)}
    for name in matrices(file):
        rows = held if is_cross(name) else outputs[0]
        wanted[name] = (*layers, None if rows is None else rows * width, *columns)
    for name, shape in wanted.items():
        found = file[name].shape if name in file else None
        if found is None:
            continue
        if len(found) != len(shape) or any(n not in (None, m) for n, m in zip(shape, found, strict=True)):
            said = ", ".join("any" if n is None else str(n) for n in shape)
            raise InputError(f"{path}: /{name}: expected shape ({said}), got {found}")


def _vet_names(group: h5py.Group, path: Path, seen: set[Any], datasets: list[h5py.Dataset]) -> None:
    """Refuse links and things under two names, and gather the datasets."""
    for name in group:
        place = f"{group.name.rstrip('/')}/{name}"
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise InputError(f"{path}: {place} is a link; only plain datasets are read")
        item = group[name]
        if item in seen:  # a few dozen groups that hold each other twice are 2^dozens of paths
            raise InputError(f"{path}: {place} has another name too; only plain datasets are read")
        seen.add(item)
        if isinstance(item, h5py.Group) is not _is_group(place):
            raise InputError(f"{path}: {place} is not the kind of thing that a Gram file has there")
        if isinstance(item, h5py.Group):
            _vet_names(item, path, seen, datasets)
        elif not isinstance(item, h5py.Dataset):
            raise InputError(f"{path}: {place} is a {type(item).__name__}; only plain datasets are read")
        else:
            datasets.append(item)


def _is_group(place: str) -> bool:
    """Say whether what has this name is a group in a Gram file."""
    return place.lstrip("/") in _GROUPS or (place.startswith("/tiles/") and not place.endswith(("/crc32", "/done")))


def _vet_dataset(item: h5py.Dataset, path: Path) -> None:
    where, name = f"{path}: {item.name}", str(item.name).lstrip("/")
    if item.external:
        raise InputError(f"{where} has its numbers in other files; only plain datasets are read")
    plist = item.id.get_create_plist()
    codes = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
    for code in codes:
        if code not in _FILTERS:
            raise InputError(f"{where} is packed by filter {code}; expected {', '.join(_FILTERS.values())} or none")
    matrix = name.startswith(_MATRICES) and not name.startswith(_IDS)
    if item.shape is None or item.maxshape != item.shape:
        raise InputError(f"{where}: expected an array of a fixed shape, got shape {item.shape} up to {item.maxshape}")
    if name in _IDS or name.startswith("json/"):
        _vet_text(item, where, path)
    elif matrix and item.dtype != np.dtype("<f8"):
        raise InputError(f"{where}: expected float64, got {item.dtype}")
    elif item.dtype.kind not in "fiub" or item.dtype.itemsize > 8:
        raise InputError(f"{where}: expected plain numbers, got {item.dtype}")
    if codes and not matrix:
        raise InputError(f"{where} is packed; expected that of Gram matrices only")
    if not item.is_virtual:
        _vet_storage(item, where, packed=bool(codes))


def _vet_text(item: h5py.Dataset, where: str, path: Path) -> None:
    """Refuse what is no text, and texts that would together be longer than the file: each may be named many times."""
    kind = h5py.check_string_dtype(item.dtype)
    rank = 0 if str(item.name).startswith("/json/") else 1
    if kind is None or kind.length is not None or item.ndim != rank or item.chunks is not None:
        raise InputError(f"{where}: expected {'texts' if rank else 'one text'}, got {item.dtype} of shape {item.shape}")
    if item.size * item.id.get_type().get_size() > path.stat().st_size:
        raise InputError(f"{where}: {item.size} texts are not in a file of {path.stat().st_size} bytes")
    offset = item.id.get_offset()
    if offset is None:
        return
    lengths = np.fromfile(path, dtype=[("length", "<u4"), ("place", "V12")], count=item.size, offset=offset)["length"]
    if int(lengths.sum(dtype=np.int64)) > path.stat().st_size:
        raise InputError(f"{where}: its texts are longer than the file")


def _vet_storage(item: h5py.Dataset, where: str, *, packed: bool) -> None:
    """Refuse a shape more of which is declared than stored: HDF5 would make up the rest."""
    whole, stored = item.size * item.id.get_type().get_size(), item.id.get_storage_size()
    if item.chunks is not None:
        size = math.prod(item.chunks) * item.dtype.itemsize
        if size > _CHUNK:
            raise InputError(f"{where}: expected chunks of at most {_CHUNK} bytes, got {size}")
        count = math.prod(-(-n // c) for n, c in zip(item.shape, item.chunks, strict=True))
        whole = count * size
        if stored and count != item.id.get_num_chunks():
            stored = 0
    if whole > stored * (_PACKED if packed else 1):
        raise InputError(f"{where}: shape {item.shape} needs {whole} bytes, {stored} are stored")


def _vet_virtual(file: h5py.File, item: h5py.Dataset, path: Path) -> None:
    shards = read_json(file, "shards", list) if "json/shards" in file else []
    allowed = [shard["file"] for shard in shards]
    covered = 0
    for source in item.virtual_sources():
        name = source.file_name
        if name not in allowed or Path(name).name != name or name == path.name:
            msg = f"{path}: {item.name} reads {name!r}, which is not one of its shards"
            raise InputError(msg)
        covered += source.vspace.get_select_npoints()
    if covered != item.size:
        raise InputError(f"{path}: {item.name}: shape {item.shape} has {item.size} entries, its shards {covered}")
    if os.environ.get("HDF5_VDS_PREFIX"):
        msg = f"{path}: HDF5_VDS_PREFIX is set, so its shards would be looked for elsewhere; unset it"
        raise InputError(msg)
