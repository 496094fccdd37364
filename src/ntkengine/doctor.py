"""What will run where on this machine: each thing with its state, and a command that would mend it."""

from __future__ import annotations

import fcntl
import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ntkengine.doctormpi import examine_mpi

_NEEDED = ("torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "scipy", "h5py", "scikit-learn")
# Of them those with compiled parts, which may be installed and yet not load -> what is imported.
_COMPILED = {name: name for name in ("torch", "safetensors", "numpy", "scipy", "h5py")} | {"scikit-learn": "sklearn"}
# package -> (what it gives, how to get it)
_OPTIONAL = {
    "matplotlib": ("figures, report and demo", "pip install matplotlib"),
    "pandas": ("frames and parquet files", "pip install pandas pyarrow"),
    "datasets": ("datasets.Dataset as a source", "pip install datasets"),
    "gguf": ("models in GGUF files", "pip install gguf"),
}
_LITTLE_GIB = 1.0  # of disk or memory: most jobs would fail


@dataclass(frozen=True)
class Item:
    """One thing that was looked at.

    Attributes:
        name: of the thing.
        state: "ok", "missing" or "problem".
        found: version or value; empty when there is none.
        note: what it is for, or what is wrong.
        fix: a command to try; empty when nothing is to be done.
        required: whether the engine cannot run while it is not ok.
    """

    name: str
    state: str
    found: str
    note: str
    fix: str = ""
    required: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the name, as JSON-able values."""
        return {**{k: v for k, v in asdict(self).items() if k != "name"}, "found": self.found or None}


def examine() -> list[Item]:
    """Return the state of everything a job may need, its Gram file in the current folder.

    Cost: seconds: libraries are imported, and MPI is asked in a process of its own.
    """
    folder = Path.cwd()
    items = [_python(), *(_needed(name) for name in _NEEDED)]
    if any(item.name == "torch" and item.state == "ok" for item in items):
        items += _torch()
    items += [_optional(name, *about) for name, about in _OPTIONAL.items()]
    return [*items, *(Item(*found) for found in examine_mpi()), _hdf5(), _locks(folder), _memory(), _disk(folder)]


def broken(items: list[Item]) -> bool:
    """Return whether something is not ok that the engine cannot do without."""
    return any(item.required and item.state != "ok" for item in items)


def _python() -> Item:
    good = sys.version_info >= (3, 11)
    note = platform.platform() if good else "expected 3.11 or newer"
    return Item(
        "python", "ok" if good else "problem", platform.python_version(), note, "" if good else "scripts/venv", True
    )


def _needed(name: str) -> Item:
    fix = f"pip install --upgrade {name}"
    version = _version(name)
    if not version:
        return Item(name, "missing", "", "needed", f"pip install {name}", True)
    wanted = _wanted(name)
    if wanted is not None and not wanted.contains(version, prereleases=True):
        return Item(name, "problem", version, f"expected {wanted}", f"pip install '{name}{wanted}'", True)
    try:
        if name in _COMPILED:
            importlib.import_module(_COMPILED[name])
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        note = f"cannot be imported: {(str(error).splitlines() or [type(error).__name__])[0]}"
        return Item(name, "problem", version, note, fix, True)
    return Item(name, "ok", version, "needed", required=True)


def _optional(name: str, gives: str, how: str) -> Item:
    version = _version(name)
    return Item(name, "ok" if version else "missing", version, gives, "" if version else how)


def _torch() -> list[Item]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    many = threads > cores
    told = f"{threads} on {cores} core{'s' * (cores > 1)}"
    note = "more threads than cores: they wait for each other" if many else "OMP_NUM_THREADS sets them"
    items = [
        Item("threads", "problem" if many else "ok", told, note, f"export OMP_NUM_THREADS={cores}" if many else ""),
        Item("CPU", "ok", f"{torch.backends.cpu.get_cpu_capability()}", _cpu(torch.backends.mkldnn.is_available())),
    ]
    devices = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(i)
        free = torch.cuda.mem_get_info(i)[0]
        about = f"compute capability {found.major}.{found.minor}, CUDA {torch.version.cuda}, "
        about += f"{free / 2**30:.0f} of {found.total_memory / 2**30:.0f} GiB free"
        devices.append(Item(f"GPU {i}", "ok", found.name, about))
    # A build without CUDA on a machine with a driver is the usual reason for a job that is slow for no visible reason.
    hidden = not devices and Path("/proc/driver/nvidia/version").exists()
    none = "there is a driver, but torch sees no device" if hidden else "none; everything runs on the CPU"
    fix = "pip install --force-reinstall torch" if hidden else ""
    items += devices or [Item("GPU", "problem" if hidden else "missing", "", none, fix)]
    kernels = _kernels(bool(devices))
    where = f"GPU {devices[0].found}" if devices else "CPU"
    by = "Triton kernels" if devices and kernels.state == "ok" else "torch"
    return [*items, kernels, Item("jobs run on", "ok", where, f"contractions by {by}")]


def _kernels(gpu: bool) -> Item:
    import torch

    from ntkengine.gram.backend import try_kernels

    version, how = _version("triton"), "pip install triton"
    if not gpu:
        note = "GPU kernels; not needed on the CPU" if version else "GPU kernels; of no use without a GPU"
        return Item("triton", "ok" if version else "missing", version, note)
    reason = try_kernels(torch.device("cuda"))
    if reason is None:
        return Item("triton", "ok", version, "GPU kernels; a small product was right")
    fix = "" if version and "capability" in reason else how
    return Item("triton", "problem" if version else "missing", version, f"{reason}; jobs take torch", fix)


def _cpu(onednn: bool) -> str:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        flags = ""
    has = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "sve", "asimd") if f" {name}" in flags]
    return ", ".join([*has, "oneDNN" if onednn else "no oneDNN"])


def _hdf5() -> Item:
    try:
        found = importlib.import_module("h5py").version.hdf5_version
    except ImportError:
        return Item("HDF5", "missing", "", "Gram files", "pip install h5py", True)
    setting = os.environ.get("HDF5_USE_FILE_LOCKING")
    return Item("HDF5", "ok", found, f"HDF5_USE_FILE_LOCKING={setting}" if setting else "Gram files", required=True)


def _locks(folder: Path) -> Item:
    name = "file locks here"
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".ntkengine-") as file, Path(file.name).open("rb") as again:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return Item(name, "ok", "work", "two jobs cannot write one file")
            what = "are taken twice: start one job at a time"
    except PermissionError:
        return Item(name, "problem", "", f"{folder} cannot be written to", "cd ~")
    except OSError as error:
        what = f"{error.strerror}: start one job at a time"
    return Item(name, "problem", "", what, "export HDF5_USE_FILE_LOCKING=FALSE")


def _memory() -> Item:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return Item("memory", "ok", "unknown", "")
    gib = {line.split(":")[0]: float(line.split()[1]) / 2**20 for line in lines if line.endswith("kB")}
    free = gib["MemAvailable"]
    return _room("memory", free, f"of {gib['MemTotal']:.1f} GiB", "ntkengine plan job.toml --memory-gib 0.5")


def _disk(folder: Path) -> Item:
    free = shutil.disk_usage(folder).free / 2**30
    return _room("disk", free, f"in {folder}", "df -h")


def _room(name: str, free: float, note: str, fix: str) -> Item:
    little = free < _LITTLE_GIB
    told = f"{free:.1f} GiB free"
    return Item(name, "problem" if little else "ok", told, f"little, {note}" if little else note, fix if little else "")


def _wanted(name: str) -> Any:
    """Return the versions of a package that this program declares, None where it is not installed as a package."""
    from packaging.requirements import Requirement

    try:
        declared = importlib.metadata.requires("ntkengine") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [Requirement(line) for line in declared]
    return next((r.specifier for r in found if r.name == name and r.marker is None), None)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
