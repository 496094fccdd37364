"""Fingerprints: what does another thing is told apart, what does the same is known again."""

from __future__ import annotations

import copy
import enum
import functools
import importlib
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import torch
from torch import nn

from ntkengine.inputs.fingerprint import fingerprint_function, fingerprint_model, libraries_of
from tests.brute import tiny_model

SCALE = {"by": 1.0}


class Plain:
    def __init__(self, k):
        self.k = k

    def read(self, out, _inputs):
        return out * self.k


class Slotted:
    __slots__ = ("k",)

    def __init__(self, k):
        self.k = k

    def __call__(self, out, _inputs):
        return out * self.k


class Kind(enum.Enum):
    ONE = 1
    TWO = 2


def keyed(k):
    def read(out, _inputs, *, scale=k):
        return out * scale

    return read


def closing(value):
    return lambda out, _inputs: out * value.k


def table(k):
    functions = {"double": lambda x: 2 * x, "times": lambda x: k * x}
    return lambda out, _inputs: functions["times"](out)


def class_of(k):
    """Return a class of the same name each time, whose forward differs."""
    body = f"def forward(self, x):\n    return {k} * self.inner(x)\n"
    space = {}
    exec(body, space)  # noqa: S102 - an edited source file
    return type("Same", (nn.Module,), {"forward": space["forward"], "__module__": __name__})


def holding(value, cls=nn.Identity):
    model = cls()
    model.inner = nn.Linear(2, 2, bias=False)
    nn.init.ones_(model.inner.weight)
    model.held = value
    return model


def patched(k):
    model = holding(None)
    model.forward = types.MethodType(lambda self, x: k * self.inner(x), model)
    return model


def hooked(k):
    model = holding(None)
    model.inner.register_forward_hook(lambda _module, _args, out: k * out)
    return model


def large(last):
    big = torch.zeros((1 << 24) + 1)
    big[-1] = last
    return big


def settings(**changes):
    model = tiny_model("bert")
    config = copy.deepcopy(model.config)
    config.update(changes)
    model.bert.encoder.layer[0].attention.self.config = config
    return model


FUNCTIONS = {
    "bound to an object": lambda k: Plain(k).read,
    "with slots": Slotted,
    "keyword default": keyed,
    "closing over an object": lambda k: closing(Plain(k)),
    "closing over a dict of functions": table,
    "partial of a method": lambda k: functools.partial(Plain(k).read, None),
    "wrapped": lambda k: functools.lru_cache(keyed(k)),
    "numpy scalar": lambda k: closing(Plain(np.float32(k))),
}
MODELS = {
    "partial": lambda k: holding(functools.partial(torch.clamp, max=float(k))),
    "closure": lambda k: holding(keyed(k)),
    "numpy attribute": lambda k: holding(np.full(3, k)),
    "large tensor": lambda k: holding(large(float(k))),
    "object": lambda k: holding(Plain(k)),
    "enum": lambda k: holding(Kind(k)),
    "cache size": lambda k: setattr(model := holding(None), "cache_scale", k) or model,
    "edited forward": lambda k: holding(None, class_of(k)),
    "own forward": patched,
    "closure of a hook": hooked,
    "a layer's own configuration": lambda k: settings(layer_norm_eps=1e-5 * k),
    "order of functions": lambda k: holding(dict([("a", torch.sin), ("b", torch.cos)][:: 3 - 2 * k])),
}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_functions(case):
    one, again, two = (fingerprint_function(FUNCTIONS[case](k)) for k in (1, 1, 2))
    assert one == again != two


@pytest.mark.parametrize("case", MODELS)
def test_models(case):
    one, again, two = (fingerprint_model(MODELS[case](k)) for k in (1, 1, 2))
    assert one == again != two


def test_a_method_put_into_a_library_class(monkeypatch):
    before = fingerprint_model(holding(None))
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * x @ self.weight.T)
    assert fingerprint_model(holding(None)) != before


def test_a_copy_and_a_cycle():
    model = holding([1, {"a": (2.0, "b")}])
    model.held.append(model.held)
    model.itself = (model,)
    assert fingerprint_model(copy.deepcopy(model)) == fingerprint_model(model)
    bert = tiny_model("bert")
    assert fingerprint_model(copy.deepcopy(bert)) == fingerprint_model(bert) == fingerprint_model(tiny_model("bert"))


def test_what_a_call_leaves_behind_is_not_the_model():
    model = holding(None)
    before = fingerprint_model(model)
    model.key_cache, model.max_seq_len_cached = torch.zeros(3), 7
    assert fingerprint_model(model) == before


def found():
    """Return fingerprints of an adapter, of a function and of a model with a method of its own."""
    import peft

    adapted = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    return [fingerprint_model(adapted), fingerprint_function(table(2)), fingerprint_model(patched(2))]


def test_another_process_finds_the_same():
    pytest.importorskip("peft")
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    done = subprocess.run(
        [sys.executable, "-c", "from tests.test_digest import found; print(*found())"],
        cwd=Path(__file__).parent.parent, check=True, capture_output=True, text=True,
        env={**os.environ, "PYTHONHASHSEED": seed},
    )  # fmt: skip
    assert done.stdout.split() == found()


def test_what_a_module_of_ones_own_holds_counts_where_it_is_used(tmp_path, monkeypatch):
    (tmp_path / "own_helper.py").write_text("SCALE, OTHER = 1.0, 1.0\ndef post(x):\n    return x\n")
    monkeypatch.syspath_prepend(tmp_path)
    helper = __import__("own_helper")
    names = {"own_helper": helper}
    exec("def read(out, inputs):\n    return own_helper.post(out) * own_helper.SCALE", names)
    first = fingerprint_function(names["read"])
    monkeypatch.setattr(helper, "OTHER", 2.0)
    assert fingerprint_function(names["read"]) == first
    monkeypatch.setattr(helper, "SCALE", 2.0)
    second = fingerprint_function(names["read"])
    monkeypatch.setattr(helper, "post", lambda x: 3 * x)
    assert len({first, second, fingerprint_function(names["read"])}) == 3


def test_what_a_folder_without_init_holds_counts(tmp_path, monkeypatch):
    (tmp_path / "settings_here").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    found = []
    for alpha in (1.0, 2.0, 1.0):
        (tmp_path / "settings_here" / "values.py").write_text(f"ALPHA = {alpha}\n")
        for name in [name for name in sys.modules if name.startswith("settings_here")]:
            del sys.modules[name]
        importlib.invalidate_caches()
        shutil.rmtree(tmp_path / "settings_here" / "__pycache__", ignore_errors=True)
        home = importlib.import_module("settings_here.values")
        read = eval("lambda out, _: settings_here.values.ALPHA * out", {"settings_here": sys.modules["settings_here"]})
        assert alpha == home.ALPHA
        found.append(fingerprint_function(read))
    assert found[0] == found[2] != found[1]


def test_a_signature_counts_and_a_docstring_does_not():
    def of(text):
        space: dict = {}
        exec(text, space)
        return fingerprint_function(space["f"])

    assert of("def f(w): return len(w)") != of("def f(*w): return len(w)")
    assert of("def f(w, v): return w") != of("def f(w, /, v): return w") != of("def f(w, *, v): return w")
    assert of('def f(w):\n "one"\n return w') == of('def f(w):\n "two"\n return w')
    assert of('def f(w):\n "one"\n return "one"') != of('def f(w):\n "two"\n return "two"')


def test_libraries_that_a_readout_uses_are_known():
    def read(out, _inputs):
        return scipy.special.expit(np.asarray(out))

    assert {"scipy", "numpy"} <= libraries_of(read)
    assert libraries_of(None) == set()


def leave_capturing(model):
    model(torch.ones(1, 3, dtype=torch.long), output_hidden_states=True)


def leave_labels(model):
    model(torch.ones(1, 3, dtype=torch.long), labels=torch.tensor([1]))


def leave_checkpointing(model):
    model.gradient_checkpointing_enable()
    model.gradient_checkpointing_disable()


@pytest.mark.parametrize("leave", [leave_capturing, leave_labels, leave_checkpointing])
def test_ordinary_use_of_a_model_leaves_it_the_same(leave):
    model = tiny_model("bert")
    before = fingerprint_model(model)
    leave(model)
    assert fingerprint_model(model) == before
    model.register_forward_hook(lambda _m, _i, out: out)
    assert fingerprint_model(model) != before


def test_a_setting_that_is_called_cached_counts():
    model = nn.Linear(2, 2)
    model.cached_scale, model.max_seq_len_cached = 1.0, 4
    first = fingerprint_model(model)
    model.max_seq_len_cached = 8  # of rotary tables, which calls make longer
    assert fingerprint_model(model) == first
    model.cached_scale = 3.0
    assert fingerprint_model(model) != first


READS = {
    "package": "import own_package.inner\ndef read(out, inputs):\n    return own_package.inner.post(out)",
    "imported inside": "def read(out, inputs):\n    from own_package.inner import post\n    return post(out)",
    "module imported inside": "def read(out, inputs):\n    from own_package import inner\n    return inner.post(out)",
    "by a text": "from own_package import inner\ndef read(out, inputs):\n    return out * getattr(inner, 'SCALE')",
    "global by a text": "from own_package.inner import SCALE\ndef read(out, _):\n    return out * globals()['SCALE']",
}


@pytest.mark.parametrize("case", READS)
def test_what_a_package_of_ones_own_holds_counts_however_it_is_reached(case, tmp_path, monkeypatch):
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for scale in (1.0, 1.0, 2.0):
        (tmp_path / "own_package/inner.py").write_text(f"SCALE = {scale}\ndef post(x):\n    return x * SCALE\n")
        for name in [name for name in sys.modules if name.startswith("own_package")]:
            monkeypatch.delitem(sys.modules, name)
        importlib.invalidate_caches()
        names: dict = {}
        with monkeypatch.context() as now:
            now.setattr(sys, "dont_write_bytecode", True)
            exec(READS[case], names)
            found.append(fingerprint_function(names["read"]))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("name", ["cache_keys", "prompt_cache", "kernel_config", "generation_config"])
def test_in_a_class_of_ones_own_every_attribute_counts(name):
    model = Own()
    setattr(model, name, torch.ones(3))
    first = fingerprint_model(model)
    setattr(model, name, 2 * torch.ones(3))
    assert fingerprint_model(model) != first


class Own(nn.Linear):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(2, 2)
