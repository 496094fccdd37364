"""What a value is, down to the last bit of its state: two values of one digest do the same.

Unequal digests of equal values cost a refusal; equal digests of unequal values would open a file of another job.
So what is not known is walked as a pickler would walk it, and only what installed libraries define goes by its name:
their version stands for it.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import types
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkengine.inputs.codeobjects import installed, outside_of, underlying, without_docstring
from ntkengine.inputs.streaming import brings, entry_of

_PIECE = 1 << 24
_ATOMS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(...))
# A module's own bookkeeping, and what names a source; parameters and buffers are hashed by themselves.
_NOT_STATE = frozenset(
    {*vars(nn.Module()), "ntk_source", "ntk_tokenizer", "ntk_head_new", "ntk_head_seen", "ntk_trained_on"}
)
# Likewise of classes that installed libraries define: in one's own such a name may be anything.
_NOT_STATE_THERE = _NOT_STATE | {
    "generation_config", "name_or_path", "warnings_issued", "_is_hf_initialized", "_use_kernels",
    "_weight_conversions", "kernel_config", "gradient_checkpointing", "_gradient_checkpointing_func",
    "_require_grads_hook", "_require_grads_hooks", "_output_capturing_hooks_installed", "_is_accelerate_prepared",
}  # fmt: skip
# Settings that change no value; use_cache is switched off while a kernel is computed.
_NOT_VALUES = frozenset({
    "_name_or_path", "base_model_name_or_path", "transformers_version", "peft_version", "use_cache", "architectures",
    "id2label", "label2id", "problem_type",
})  # fmt: skip
# Hooks that libraries leave after a call, which change no value.
_LEFT = frozenset({"output_capturing_hook", "make_inputs_require_grads", "make_inputs_require_grad"})
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_CODE = (
    "co_code", "co_names", "co_varnames", "co_freevars", "co_exceptiontable", "co_consts", "co_flags", "co_argcount",
    "co_posonlyargcount", "co_kwonlyargcount",
)  # fmt: skip


class Digest:
    """A running sha256 over values.

    Objects met again count by when they were first met, so that cycles end.

    Attributes:
        libraries: top-level names of modules met of which only the name counts.
    """

    def __init__(self) -> None:
        self.libraries: set[str] = set()
        self._sha = hashlib.sha256()
        self._met: dict[int, tuple[int, Any]] = {}  # with the object, or another could take its address

    def hexdigest(self) -> str:
        """Return the digest of all that was added."""
        return self._sha.hexdigest()

    def add(self, value: Any) -> Digest:
        """Add a value of any kind, and itself be returned."""
        if value is None or isinstance(value, _ATOMS):
            return self._text(type(value).__name__, repr(value))
        if type(value) is tuple:
            return self._items("tuple", value)
        if id(value) in self._met:
            return self._text("met", str(self._met[id(value)][0]))
        self._met[id(value)] = len(self._met), value
        if isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, np.ndarray) and value.dtype.hasobject is False:
            self._array(value)
        elif isinstance(value, nn.Module):
            self._model(value)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, types.ModuleType):
            self._by_name("module", value.__name__)  # what of it is used, the code that uses it says
        elif isinstance(value, types.FunctionType | types.CodeType | types.MethodType | types.CellType):
            self._function(value)
        elif isinstance(value, functools.partial):
            self._items("partial", (value.func, value.args, value.keywords))
        elif type(value) is list:
            self._items("list", value)
        elif isinstance(value, set | frozenset):
            self._items("set", sorted(Digest().add(v).hexdigest() for v in value))
        elif type(value) is dict:
            self._items("dict", (x for item in value.items() for x in item))
        elif _is_configuration(value):
            self._items("settings", (type(value), _settings(value), getattr(value, "_attn_implementation", None)))
        else:
            self._object(value)
        return self

    def _text(self, kind: str, text: str) -> Digest:
        self._sha.update(f"{kind}:{len(text)}:{text}|".encode("utf-8", "surrogatepass"))
        return self

    def _by_name(self, kind: str, name: str) -> Digest:
        self.libraries.add(name.partition(".")[0])
        return self._text(kind, name)

    def _items(self, kind: str, values: Iterable[Any]) -> Digest:
        found = list(values)
        self._text(kind, str(len(found)))
        for value in found:
            self.add(value)
        return self

    def _array(self, value: np.ndarray) -> None:
        value = np.ascontiguousarray(value)
        self._text("array", f"{value.dtype}{value.shape}")
        self._sha.update(value.reshape(-1).view(np.uint8).data)

    def _tensor(self, value: Tensor) -> None:
        self._text("tensor", f"{value.dtype}{tuple(value.shape)}")
        entry = entry_of(value)
        if entry is not None:
            rows = max(1, _PIECE // max(1, entry.nbytes // entry.shape[0]))
            for start in range(0, entry.shape[0], rows):
                piece = entry.read(start, min(start + rows, entry.shape[0])).to(value.dtype)
                self._sha.update(piece.view(torch.uint8).numpy().data)
            return
        for part in _dense(value.detach()):
            for piece in part.reshape(-1).split(_PIECE):
                self._sha.update(piece.cpu().resolve_conj().contiguous().view(torch.uint8).numpy().data)

    def _model(self, model: nn.Module) -> None:
        """Add parameters and buffers (names, dtypes, shapes, bytes), and each module's class, attributes and hooks."""
        named = dict(model.named_modules())
        self._met |= {id(m): (len(self._met) + i, m) for i, m in enumerate(named.values())}
        # Rotary tables are in no state dict; keep_vars: a streamed weight is known by its parameter.
        tensors = {**dict(model.named_buffers()), **dict(model.state_dict(keep_vars=True))}
        self._text("model", str(len(tensors)))
        for name, value in sorted(tensors.items()):
            self._text("name", name)
            if isinstance(value, Tensor):  # hashed under each of its names
                self._tensor(value)
            else:
                self.add(value)
        for name, module in named.items():
            self._text("module", name).add(type(module))
            there = installed(getattr(sys.modules.get(type(module).__module__), "__file__", None) or "")
            left = _NOT_STATE_THERE if there else _NOT_STATE
            kept = {k: v for k, v in vars(module).items() if k not in left and not (there and _remembers(k, v))}
            self._items("attributes", (x for k, v in sorted(kept.items()) for x in (k, v)))
            for kind in _HOOKS:
                self._items(kind, (hook for hook in vars(module)[kind].values() if not (brings(hook) or _left(hook))))

    def _class(self, kind: type) -> None:
        """Add a class's name, and all its code that no installed library holds, also where it was put in later."""
        self._by_name("class", f"{kind.__module__}.{kind.__qualname__}")
        for base in kind.__mro__:
            home = sys.modules.get(base.__module__)
            file = getattr(home, "__file__", None)
            own = not installed(file) if file else home is None or base.__module__ == "__main__"
            for name, value in sorted(vars(base).items()):
                function = underlying(value)
                if function is None:
                    if own and not (name.startswith("__") or name == "_abc_impl"):
                        self._text("attribute", name).add(value)
                elif own or not installed(function.__code__.co_filename):
                    self._text("method", name).add(function)

    def _function(self, value: Any) -> None:
        if isinstance(value, types.CellType):
            try:
                self._items("cell", [value.cell_contents])
            except ValueError:
                self._text("cell", "empty")
        elif isinstance(value, types.MethodType):
            self._items("method", (value.__func__, value.__self__))
        elif isinstance(value, types.CodeType):
            self._items("code", (getattr(value, name) for name in _CODE))
        elif installed(value.__code__.co_filename):
            self._by_name("library", f"{value.__module__}.{value.__qualname__}").add(value.__closure__ or ())
        else:
            outside = outside_of(value)
            given = value.__defaults__, value.__kwdefaults__, value.__closure__
            self._items("function", (without_docstring(value), *given, vars(value), outside))

    def _object(self, value: Any) -> None:
        """Add what a pickle of the value would hold; of what has no pickle its attributes, or its name."""
        if isinstance(value, types.BuiltinFunctionType | types.MethodWrapperType):
            self._by_name("builtin", f"{value.__module__}.{value.__qualname__}").add(getattr(value, "__self__", None))
            return
        if hasattr(value, "__wrapped__"):
            self._items("wrapper", (type(value), value.__wrapped__))
            return
        try:
            found = value.__reduce_ex__(4)
        except Exception:  # noqa: BLE001 - any class may refuse in its own way
            self._items("object", (type(value), getattr(value, "__dict__", None)))
            return
        if isinstance(found, str):
            self._items(f"global {found}", [type(value)])
            return
        make, args, state, listed, keyed = (*found, None, None, None)[:5]
        self._items("object", (type(value), make, args, state, list(listed or ()), list(keyed or ())))


def _remembers(name: str, value: Any) -> bool:
    """Whether an attribute keeps what the last call left, which a setting such as `cache_size` does not."""
    return "seq_len_cached" in name or ("cache" in name and not isinstance(value, bool | int | float | str))


def _left(hook: Any) -> bool:
    home = str(getattr(hook, "__module__", "")).partition(".")[0]
    return home in ("transformers", "peft") and getattr(hook, "__name__", "") in _LEFT


def _is_configuration(value: Any) -> bool:
    return callable(getattr(value, "to_dict", None)) and (hasattr(value, "model_type") or hasattr(value, "peft_type"))


def _settings(value: Any) -> Any:
    """Return a model's or adapter's settings without what names a place or a version."""
    if _is_configuration(value):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(k): _settings(v) for k, v in sorted(value.items(), key=str) if k not in _NOT_VALUES}
    return [_settings(v) for v in value] if isinstance(value, list | tuple) else value


def _dense(value: Tensor) -> list[Tensor]:
    """Return the dense tensors a tensor is made of: itself, or what a quantised one wraps."""
    if type(value) not in (Tensor, nn.Parameter) and hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        return [part for name in names for part in _dense(getattr(value, name))]
    return [value if value.layout is torch.strided else value.to_dense()]
