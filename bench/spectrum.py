"""Eigenvalues and solves against their peers, in one run each.

* `arpack`: the 10 largest pairs of a dense 3,000² Gram (outlier and power law) against scipy's ARPACK.
* `disk`: products with a 20,000² float32 Gram on disk, 512 MiB of panels, against plain reads of the same file: both
  from the disk (the file's pages dropped before each pass) and both from the page cache. Rates count the whole matrix,
  of which a product reads one triangle.
* `gradients`: preconditioned against plain conjugate gradients on a 10,000² system.
* `landmarks`: randomly pivoted Cholesky of 20,000 rows from an oracle of columns.
* `demo`: the demo's own Grams (MiniLM-L6 on 256 movie snippets, LoRA and all parameters) and 200 random principal
  submatrices of them: Ritz values and their bounds against LAPACK and against the Gram in float64, sampled traces
  against exact ones.

`python -m bench run spectrum [-- SECTION…]`.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse.linalg import eigsh as arpack

import ntkengine as ntk
from bench.record import record
from ntkengine import assets, store
from ntkengine.gram.result import Gram
from ntkengine.ridge import conjugate_gradients, preconditioner, random_cholesky
from ntkengine.spectrum import DenseOperator, PanelOperator, log_determinant

SEED = 0


def main(names: list[str]) -> int:
    """Run the sections named, by default all."""
    if unknown := [name for name in names if name not in CASES]:
        print(f"spectrum: no section {unknown[0]!r}: one of {', '.join(CASES)}", file=sys.stderr)
        return 2
    for name in names or CASES:
        config, values = CASES[name]()
        print(json.dumps(record("spectrum", {"case": name, **config}, values)), flush=True)
    return 0


def versus_arpack() -> tuple[dict[str, Any], dict[str, Any]]:
    """Time both on the same matrix, in turn."""
    N, k = 3000, 10
    values = np.r_[1e4, np.arange(1.0, N) ** -1.5]
    matrix = rotated(values)
    runs: dict[str, Callable[[], np.ndarray]] = {
        "seconds": lambda: ntk.eigsh(matrix, k).values,
        "certified_seconds": lambda: ntk.eigsh(matrix, k, certify=True).values,
        "arpack_seconds": lambda: arpack(matrix, k, which="LA")[0],
        "arpack_same_tol_seconds": lambda: arpack(matrix, k, which="LA", tol=1e-8)[0],
    }
    spent: dict[str, list[float]] = {name: [] for name in runs}
    worst = 0.0
    for _ in range(9):
        for name, run in runs.items():
            start = time.perf_counter()
            found = run()
            spent[name].append(time.perf_counter() - start)
            worst = max(worst, float(np.abs(np.sort(found) - np.sort(values)[-k:]).max()))
    result = {name: statistics.median(times) for name, times in spent.items()}
    result |= {"of_arpack": result["seconds"] / result["arpack_seconds"], "error_over_top": worst / values.max()}
    return {"N": N, "k": k, "spectrum": "1e4, i^-1.5"}, result


def from_disk() -> tuple[dict[str, Any], dict[str, Any]]:
    """Time passes over the file, raw and multiplying, in turn."""
    N, budget = 20_000, 512.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "k.h5"
        features = np.random.default_rng(SEED).standard_normal((N, 64)).astype(np.float32)
        gram = Gram(features @ features.T, np.zeros((N, 1)), "trace", "sgd", 1e-3)
        store.write_gram(path, gram, {}, {})
        del gram
        operator = PanelOperator(ntk.open_gram(path), budget)
        block = np.random.default_rng(1).standard_normal((N, operator.block))
        size = N * N * 4
        rates: dict[str, list[float]] = {}
        for cold in (True, False):
            state = "cold" if cold else "warm"
            for _ in range(7):
                for name, run in (
                    ("raw", lambda: read(path)),
                    ("vector", lambda: operator @ block[:, 0]),
                    ("block", lambda: operator @ block),
                ):
                    if cold:
                        drop(path)
                    start = time.perf_counter()
                    run()
                    rates.setdefault(f"{state}_{name}", []).append(size / (time.perf_counter() - start))
        result = {f"{name}_bytes_per_s": statistics.median(found) for name, found in rates.items()}
        for state in ("cold", "warm"):
            for name in ("vector", "block"):
                share = result[f"{state}_{name}_bytes_per_s"] / result[f"{state}_raw_bytes_per_s"]
                result[f"{state}_{name}_of_raw"] = share
        start = time.perf_counter()
        ritz = ntk.eigsh(operator, 10)
        result |= {"eigsh_seconds": time.perf_counter() - start, "eigsh_products": ritz.products}
        return {"N": N, "dtype": "float32", "budget_mib": budget, "block": operator.block}, result


def gradients() -> tuple[dict[str, Any], dict[str, Any]]:
    """Solve one system both ways."""
    N, rank, ridge, tol = 10_000, 1000, 0.1, 1e-8
    random = np.random.default_rng(SEED)
    # Features with decaying variances about a common mean: an outlier, then a power law, as empirical NTKs have.
    features = random.standard_normal((N, 4000)) * np.arange(1.0, 4001) ** -1.0
    features[:, 0] += 3.0
    operator = DenseOperator(features @ features.T)
    del features
    right = np.sign(random.standard_normal((N, 1)))
    start = time.perf_counter()
    plain = conjugate_gradients(operator, right, ridge, tol=tol)
    middle = time.perf_counter()
    quick = conjugate_gradients(
        operator, right, ridge, preconditioner=preconditioner(operator, ridge, rank, seed=SEED), tol=tol
    )
    end = time.perf_counter()
    values = {
        "plain_iterations": plain.iterations,
        "iterations": quick.iterations,
        "fewer": plain.iterations / quick.iterations,
        "plain_seconds": middle - start,
        "seconds": end - middle,
        "residual": float(quick.residual.max()),
        "plain_residual": float(plain.residual.max()),
        "difference": float(np.linalg.norm(quick.solution - plain.solution) / np.linalg.norm(plain.solution)),
    }
    return {"N": N, "rank": rank, "ridge": ridge, "tol": tol}, values


def landmarks() -> tuple[dict[str, Any], dict[str, Any]]:
    """Approximate a Gram that is never formed."""
    N, rank = 20_000, 500
    features = np.random.default_rng(SEED).standard_normal((N, 1500)) * np.arange(1.0, 1501) ** -1.0
    asked = 0

    def columns(index: np.ndarray) -> np.ndarray:
        nonlocal asked
        asked += len(index)
        return features @ features[index].T

    start = time.perf_counter()
    low = random_cholesky(columns, (features**2).sum(axis=1), rank, seed=SEED)
    spent = time.perf_counter() - start
    variances = np.linalg.svd(features[:4000], compute_uv=False) ** 2 * (N / 4000)  # close to those of all rows
    best = float(variances[rank:].sum())
    values = {
        "seconds": spent,
        "columns": asked,
        "columns_share": asked / N,
        "error_over_trace": low.error / low.trace,
        "error_over_best": low.error / best,
    }
    return {"N": N, "rank": rank}, values


def demo() -> tuple[dict[str, Any], dict[str, Any]]:
    """Compare on what users have."""
    found = assets.fetch_demo()
    examples, _ = assets.movie_snippets(found.snippets, 256, 256, SEED)
    lora = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]}
    result: dict[str, Any] = {}
    for name, peft, params in (("lora", lora, "trainable"), ("all", None, "all")):
        model = ntk.load_model(found.model_dir, peft=peft)
        inputs = ntk.tokenize(examples, model)
        gram, exact = (
            ntk.compute_gram(model, inputs, readout="margin", params=params, precision=precision)
            for precision in ("high", "exact")
        )
        result |= {f"{name}_{key}": value for key, value in against_lapack(gram, np.asarray(exact.values)).items()}
    return {"model": "MiniLM-L6", "N": 256, "draws": 200}, result


def against_lapack(gram: Gram, exact: np.ndarray) -> dict[str, float]:
    """Return the worst errors over 200 draws of rows, pairs, ends, methods and blocks, and how often bounds hold."""
    values, rng = np.asarray(gram.values), np.random.default_rng(SEED)
    worst = noisy = 0.0
    inside = inside_noisy = sampled = 0
    for draw in range(200):
        n = len(values) if draw < 20 else int(rng.integers(60, len(values)))
        at = np.ix_(*2 * [np.sort(rng.choice(len(values), n, replace=False))])
        K, k, which = values[at], int(rng.integers(1, 16)), str(rng.choice(["LA", "SA", "BE"]))
        method, block = "lanczos" if which == "LA" else "shift-invert", int(rng.choice([1, 4]))
        low = {"LA": 0, "SA": k, "BE": k // 2}[which]
        picked = np.r_[0:low, n - k + low : n]
        lapack, true = (np.linalg.eigvalsh(matrix)[picked] for matrix in (K, exact[at]))
        ritz = ntk.eigsh(K, k, which, method=method, seed=draw, block=block)
        top = float(np.linalg.norm(K, 2))
        worst = max(worst, float(np.abs(ritz.values - lapack).max()) / top)
        inside += bool((np.abs(ritz.values - lapack) <= ritz.bounds).all())
        noisy = max(noisy, float(np.abs(ritz.values - true).max()) / gram.noise)
        inside_noisy += bool((np.abs(ritz.values - true) <= ritz.bounds + gram.noise).all())
        ridge = top * 10.0 ** rng.uniform(-6, -1)
        for function in (ntk.effective_dimension, log_determinant):
            estimate = function(DenseOperator(K), ridge, method="lanczos", seed=draw)
            sampled += bool(abs(estimate - function(K, ridge)) <= estimate.error)
    return {
        "error_over_top": worst,
        "inside_bounds": inside / 200,
        "float64_error_over_noise": noisy,
        "float64_inside_bounds": inside_noisy / 200,
        "sampled_inside_error_bars": sampled / 400,
        "noise_over_top": gram.noise / float(np.linalg.norm(values, 2)),
    }


def rotated(values: np.ndarray) -> np.ndarray:
    """Return a symmetric matrix with these eigenvalues and random eigenvectors."""
    q, _ = np.linalg.qr(np.random.default_rng(SEED).standard_normal((len(values), len(values))))
    matrix = (q * values) @ q.T
    return 0.5 * (matrix + matrix.T)


def drop(path: Path) -> None:
    """Drop a file's pages from the cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: Path) -> None:
    """Read a file through one buffer of a panel's size."""
    buffer = bytearray(64 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


CASES = {"arpack": versus_arpack, "disk": from_disk, "gradients": gradients, "landmarks": landmarks, "demo": demo}
