"""Where kernels run, and what they are launched with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ntk_kernels import runtime
from ntk_kernels.syrk import division

ROOT = Path(__file__).parent.parent.parent


def python(code, **environment):
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'kernels'}", **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


def test_without_triton_the_package_imports_and_a_launch_says_what_to_install():
    code = """
import sys
sys.modules["triton"] = None
import torch
from ntk_kernels import fold, ghost, lookup, materialise, naive, planes, runtime, signs, syrk
assert naive.syrk(torch.ones(2, 3)).shape == (2, 2)
try:
    syrk.syrk(torch.ones(2, 3), torch.zeros(2, 2, dtype=torch.float64))
except runtime.UnavailableError as error:
    print(error)
"""
    done = python(code)
    assert "pip install triton" in done.stdout, done.stderr


def test_on_a_cpu_a_launch_says_how_to_interpret():
    code = """
import torch
from ntk_kernels import runtime, syrk
assert not runtime.INTERPRETED
try:
    syrk.syrk(torch.ones(2, 3), torch.zeros(2, 2, dtype=torch.float64))
except runtime.UnavailableError as error:
    print(error)
"""
    done = python(code, TRITON_INTERPRET="0")
    assert "got cpu; TRITON_INTERPRET=1" in done.stdout, done.stderr


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize(("M", "N"), [(1, 1), (300, 300), (513, 130), (100, 700)])
def test_tiles_cover_what_is_wanted_once(M, N, lower):
    order, tiles = runtime.tile_order(M, N, 128, 64, lower, torch.device("cpu"))
    pairs = {tuple(pair) for pair in order.tolist()}
    assert len(pairs) == tiles == len(order)
    wanted = torch.ones(M, N, dtype=torch.bool)
    entries = (wanted.tril() if lower else wanted).nonzero()
    assert {(i // 128, j // 64) for i, j in entries.tolist()} == pairs


@pytest.mark.parametrize(("tiles", "steps"), [(1, 1), (1, 20_000), (20, 1024), (1056, 1024), (3, 7)])
def test_divisions_cover_all_steps_in_runs(tiles, steps):
    splits, each = division(tiles, steps, 256, 132)
    assert (splits - 1) * each < steps <= splits * each
    assert each <= 256
    if tiles == 20:  # few tiles: the features are divided until the device is full
        assert tiles * splits > 0.9 * 132


def test_stages_shrink_to_what_a_device_has():
    launch = runtime.Launch({"BM": 128}, 8, 4)
    small = runtime.Limits(80, 40, 99 << 10, 4 << 20)
    assert runtime.fitted(launch, 48 << 10, small).stages == 2
    assert runtime.fitted(launch, 8 << 10, small) is launch


def test_compiled_ahead_of_time():
    # `scripts/check_kernels.py` without arguments compiles every kernel.
    command = [sys.executable, str(ROOT / "scripts" / "check_kernels.py"), "--arch", "90", "--match", "x3 large"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "HGMMA" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="the launches themselves are tested on a GPU")
def test_launched_as_on_a_gpu():
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "tests.kernels.dry_run", "90"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "_materialise" in done.stdout


@pytest.mark.slow
def test_all_compiled_ahead_of_time():
    script = str(ROOT / "scripts" / "check_kernels.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
