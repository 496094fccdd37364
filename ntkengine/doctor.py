"""What this machine offers the engine: libraries, threads, memory, devices."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

# name -> what it gives when present, how to get it
_PACKAGES = {
    "torch": ("runs the models", "pip install torch"),
    "transformers": ("loads the models", "pip install transformers"),
    "peft": ("adapters: LoRA and others", "pip install peft"),
    "numpy": ("matrices", "pip install numpy"),
    "scipy": ("eigenvalues and solves", "pip install scipy"),
    "h5py": ("Gram files", "pip install h5py"),
    "scikit-learn": ("the KernelRidge estimator", "pip install scikit-learn"),
    "matplotlib": ("figures, report and demo", "pip install ntkengine[demo]"),
    "pandas": ("reads parquet files", "pip install pandas pyarrow"),
    "datasets": ("datasets.Dataset as a source", "pip install datasets"),
    "triton": ("GPU kernels", "pip install ntkengine[gpu]"),
    "mpi4py": ("runs over several processes", "pip install ntkengine[mpi]"),
}


def examine() -> list[dict[str, str]]:
    """Return one mapping per item: `name`, `found` (version or value; empty when missing), `note`."""
    rows = [_row("ntkengine", _version("ntkengine"), "this program")]
    rows.append(_row("python", platform.python_version(), platform.platform()))
    for name, (gives, how) in _PACKAGES.items():
        version = _version(name)
        rows.append(_row(name, version, gives if version else f"missing; would give: {gives}; {how}"))
    rows += _devices()
    rows.append(_row("memory", _memory(), "free of all"))
    free = shutil.disk_usage(Path.cwd()).free
    rows.append(_row("disk", f"{free / 2**30:.1f} GiB free", "in the working folder"))
    mpirun = shutil.which("mpirun")
    rows.append(
        _row("mpirun", mpirun or "", "starts several processes" if mpirun else "missing; pip install ntkengine[mpi]")
    )
    return rows


def _devices() -> list[dict[str, str]]:
    cores = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    try:
        import torch
    except (ImportError, OSError) as error:
        return [
            _row("cores", cores, "for this process"),
            _row("torch import", "", f"fails: {str(error).splitlines()[0]}"),
        ]
    rows = [_row("cores", cores, f"torch uses {torch.get_num_threads()} threads; OMP_NUM_THREADS sets it")]
    if not torch.cuda.is_available():
        return [*rows, _row("CUDA", "", "no device; the engine runs on the CPU")]
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        about = f"{found.total_memory / 2**30:.0f} GiB, compute capability {found.major}.{found.minor}"
        rows.append(_row(f"CUDA {i}", found.name, f"{about}, CUDA {torch.version.cuda}"))
    return rows


def _memory() -> str:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return "unknown"
    kib = {line.split(":")[0]: float(line.split()[1]) for line in lines if line.endswith("kB")}
    return f"{kib['MemAvailable'] / 2**20:.1f} of {kib['MemTotal'] / 2**20:.1f} GiB"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _row(name: str, found: str, note: str) -> dict[str, str]:
    return {"name": name, "found": found, "note": note}
