"""The repository's own rules: what must never appear, which room may import which."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Each room may import the rooms listed, and itself.
ALLOWED = {
    "errors": set(),
    "arguments": {"errors"},
    "assets": {"errors", "inputs"},
    "products": set(),
    "display": set(),
    "digits": set(),
    "inputs": {"errors", "arguments", "products", "textfile"},
    "tangents": {"errors", "products", "inputs"},
    "cluster": {"errors", "inputs", "tangents"},
    "gram": {
        "errors",
        "arguments",
        "display",
        "digits",
        "targets",
        "products",
        "inputs",
        "tangents",
        "cluster",
        "store",
    },
    "store": {"errors", "arguments", "gram", "textfile"},
    "spectrum": {"errors", "arguments", "digits"},
    "ridge": {"errors", "arguments", "digits", "targets", "spectrum"},
    "forecast": {"errors", "arguments", "display", "digits", "targets", "losses", "recipe", "descent", "spectrum"}
    | {"ridge", "report", "inputs", "gram"},
    "targets": {"errors"},
    "losses": {"errors", "arguments", "targets"},
    "recipe": {"errors", "arguments"},
    "descent": {"errors", "recipe"},
    "finetune": {"errors", "arguments", "inputs", "tangents", "losses", "recipe", "descent", "gram", "spectrum"}
    | {"forecast"},
    "report": {"errors", "digits", "textfile"},
    "textfile": {"errors"},
}
ONLY = {"h5py": {"store"}, "matplotlib": {"report"}, "mpi4py": {"cluster"}, "ntk_kernels": {"gram"}, "triton": set()}


def modules():
    for path in sorted((ROOT / "src" / "ntkengine").rglob("*.py")):
        relative = path.relative_to(ROOT / "src" / "ntkengine")
        yield (relative.parts[0] if len(relative.parts) > 1 else relative.stem), path


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_transformers_does_not_take_our_kernels_for_its_own():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import sys; sys.path.insert(0, '.'); import transformers.modeling_utils"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_folder_of_its_name_does_not_hide_the_package(tmp_path):
    (tmp_path / "ntkengine").mkdir()  # such as a clone in the folder one works in
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    code = "import ntkengine, ntk_kernels; print(ntkengine.__version__)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert found.stdout.strip() == "0.1.0", found.stderr


def test_rooms_import_only_what_lies_below_them():
    wrong = []
    for room, path in modules():
        for name in imported(path):
            top, _, rest = name.partition(".")
            target = rest.split(".")[0]
            if top == "ntkengine" and room in ALLOWED and target != room and target not in ALLOWED[room]:
                wrong.append(f"{path.name}: {name}")
            if top in ONLY and room not in ONLY[top]:
                wrong.append(f"{path.name}: {name}")
    assert not wrong


def test_kernels_know_nothing_of_the_engine():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not any(name.startswith("ntkengine") for name in imported(path)), path


UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle", "yaml"}


def test_nothing_read_can_run_code():
    wrong = []
    for path in sorted(p for room in ("src", "kernels") for p in (ROOT / room).rglob("*.py")):
        wrong += [f"{path}: imports {n}" for n in imported(path) if n.split(".")[0] in UNSAFE]
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            safe = {"weights_only": True, "allow_pickle": False}
            given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            loads = name in ("torch.load", "np.load", "numpy.load") or name.endswith("format.read_array")
            if name in ("eval", "exec") or (loads and not any(given.get(k) is v for k, v in safe.items())):
                wrong.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong
