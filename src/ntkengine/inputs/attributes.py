"""What a forward pass leaves behind in a model's modules, and taking it away again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

_BOOKKEEPING = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = tuple(key for key, value in vars(nn.Module()).items() if "_hooks" in key and isinstance(value, dict))
_PLAIN = bool | int | float | str | torch.dtype
_CONTAINERS = dict, list, set
_LONGEST = 256  # entries of a container that is looked into
_LOOSE = frozenset({"warnings_issued", "gradient_checkpointing"})  # transformers' own, which f does not read

_OTHER = object()
Place = tuple[int, str, str]  # id of a module, attribute, key or position in it


class Attributes:
    """The attributes of a model's modules as they are now, containers one level deep; not the tensors' values."""

    def __init__(self, model: nn.Module) -> None:
        self._held = [(m, _own(m), dict(m._parameters), dict(m._buffers)) for m in model.modules()]
        self._hooks = [
            (hooks, set(hooks)) for m in model.modules() for k in _HOOKS if (hooks := vars(m).get(k)) is not None
        ]
        self._inside = [(v, v.copy()) for _, own, _, _ in self._held for v in own.values() if type(v) in _CONTAINERS]

    def restore(self) -> None:
        """Make every module's attributes, parameters and buffers the objects they were, and take new hooks away.

        Transformers' models mark themselves as hooked: of the mark and the hooks, one without the other is wrong.
        """
        for hooks, known in self._hooks:
            for key in hooks.keys() - known:
                del hooks[key]
        for module, own, parameters, buffers in self._held:
            for key in _own(module).keys() - own.keys():
                del vars(module)[key]
            vars(module).update(own)
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)
        for container, before in self._inside:
            if container != before if type(container) is set else list(_ids(container)) != list(_ids(before)):
                container.clear()
                container.extend(before) if isinstance(container, list) else container.update(before)

    def changed(self) -> list[tuple[nn.Module, str, Any]]:
        """Return (module, attribute, value) of the plain values that are others now, but for the mode."""
        return [
            (module, key, value)
            for module, own, _, _ in self._held
            for key, value in _own(module).items()
            if _is_plain(value) and key != "training" and not (_is_plain(own.get(key, _OTHER)) and own[key] == value)
        ]


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, _PLAIN)


def _own(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if key not in _BOOKKEEPING}


def _ids(container: Any) -> Iterator[Any]:
    if isinstance(container, dict):
        return ((key, id(value)) for key, value in container.items())
    return (id(value) for value in container)


def stored_weight(module: nn.Module) -> Any:
    """Return a module's weight; None without one, or where it is computed when it is read.

    To read it there may change the module: a spectral norm in train mode takes a step of its power iteration.
    """
    kind = type(module)
    if "weight" in module._parameters or not hasattr(kind, "weight") and kind.__getattr__ is nn.Module.__getattr__:
        return getattr(module, "weight", None)
    return None if any(is_parametrized(m, "weight") for m in module.modules()) else getattr(module, "weight", None)


def plain_values(model: nn.Module) -> list[dict[str, Any]]:
    """Return every module's attributes that are plain values, for comparison."""
    return [{k: v for k, v in vars(m).items() if _is_plain(v)} for m in model.modules()]


def settings(model: nn.Module) -> dict[str, Any]:
    """Return every module's attributes that are plain values or containers of them, by full name, for comparison.

    Not what says how a model is trained, nor what this package notes on it.
    """
    found: dict[str, Any] = {}
    for owner, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in _BOOKKEEPING and key != "training" and key not in _LOOSE and not key.startswith("ntk_"):
                kept = _frozen(value)
                if kept is not _OTHER:
                    found[f"{owner}.{key}"] = kept
    return found


def _frozen(value: Any) -> Any:
    """Return a plain value, or a container's plain parts; `_OTHER` for anything else."""
    if _is_plain(value):
        return value
    if type(value) not in (dict, list, tuple, set) or len(value) > _LONGEST:
        return _OTHER
    if type(value) in (list, tuple) and len(value) == 1:  # PEFT takes one name and a list of one for the same
        return _frozen(value[0])
    if type(value) is set:
        return frozenset(x for x in value if isinstance(x, _PLAIN))
    return tuple(
        (k, x)
        for k, v in (value.items() if type(value) is dict else enumerate(value))
        if (x := _frozen(v)) is not _OTHER
    )


def held_tensors(model: nn.Module) -> dict[Place, tuple[str, Tensor]]:
    """Return floating-point tensors in attributes that are no parameters or buffers, with the attribute's full name."""
    found: dict[Place, tuple[str, Tensor]] = {}
    known = {x.data_ptr() for x in model.buffers()}
    for owner, module in model.named_modules():
        for key, value in _own(module).items():
            inside = value.items() if type(value) is dict else enumerate(value) if type(value) in (list, tuple) else ()
            for at, x in [("", value), *inside]:
                if isinstance(x, Tensor) and x.is_floating_point() and x.data_ptr() not in known:
                    found[id(module), key, str(at)] = f"{owner}.{key}".lstrip("."), x
    return found


def empty(model: nn.Module, places: Iterable[Place]) -> None:
    """Make the attributes at these places None, the containers there empty; `Attributes.restore` puts all back."""
    modules = {id(module): module for module in model.modules()}
    for owner, key, _ in places:
        value = vars(modules[owner])[key]
        if type(value) in (dict, list):
            value.clear()
        else:
            setattr(modules[owner], key, None)
