"""What is tested on a GPU also runs on a simulated one: host and device tensors never meet."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: tests/test_gpu.py runs on it"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to simulate a CUDA device"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    root, made = Path(torch.__file__).parent, tmp_path_factory.mktemp("simulated") / "libsimulated.so"
    flags = [
        "-std=c++20",
        "-shared",
        "-fPIC",
        "-O0",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
    ]
    paths = [f"-I{root}/include", str(HERE / "simulated/hooks.cpp"), f"-L{root}/lib", f"-Wl,-rpath,{root}/lib"]
    subprocess.run(["g++", *flags, *paths, "-lc10", "-ltorch_cpu", "-o", str(made)], check=True)
    return made


def on_the_device(library, *arguments):
    known = {**os.environ, "SIMULATED_DEVICE": str(library), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=HERE.parent, env=known, capture_output=True, text=True, check=False)


def test_it_refuses_what_a_device_refuses(library):
    code = """
import tests.simulated.plugin
import numpy as np, torch
x, w = torch.ones(3, 4, device="cuda"), torch.nn.Linear(4, 2).to("cuda")
w(x).sum().backward()
assert x.is_cuda and w.weight.grad.device.type == "cuda" and x.cpu().device.type == "cpu"
assert float(x.sum()) == 12 and x[torch.tensor([0])].is_cuda and (x + torch.tensor(1.0)).is_cuda
for wrong in (lambda: x + torch.ones(4), lambda: x.numpy(), lambda: np.asarray(x),
              lambda: torch.ones(3)[torch.zeros(1, dtype=int, device="cuda")], lambda: w(torch.ones(3, 4))):
    try:
        wrong()
    except (RuntimeError, TypeError):
        continue
    raise AssertionError
print("refused")
"""
    done = on_the_device(library, "-c", code)
    assert done.stdout.strip() == "refused", done.stderr[-2000:]


def test_the_tests_of_a_gpu_pass_on_it(library):
    run = ["-m", "pytest", "-q", "-p", "tests.simulated.plugin", "-p", "no:cacheprovider"]
    done = on_the_device(library, *run, "tests/test_gpu.py", "-k", "not roberta and not gpt2")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout
