"""A tuned model as a folder: whole, and with what is below its adapter where that is new."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntkengine.errors import CheckFailed, InputError

if TYPE_CHECKING:
    from torch import nn

_PLAIN = (True, False, "gaussian")  # starts of LoRA that leave the weights below as they are
_DATA: dict[str, Any] = {
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    "loftq_config": {},
}  # of the other starts


def needs_base(model: nn.Module, params: Any) -> bool:
    """Whether an adapter's file and the model it was put on do not make this model.

    Parameters are trained that are not in the file, or the adapter's start changed the weights below, and would change
    them again.
    """
    configs = getattr(model, "peft_config", None)
    if configs is None:
        return False
    from peft import get_peft_model_state_dict

    from ntkengine.inputs.parameters import select_parameters

    if any(getattr(config, "init_lora_weights", True) not in _PLAIN for config in configs.values()):
        return True
    inside = {t.data_ptr() for t in get_peft_model_state_dict(model, save_embedding_layers=False).values()}
    return any(p.data_ptr() not in inside for p in select_parameters(model, params).values())


def check_savable(model: nn.Module, below: bool) -> None:
    """Refuse a model whose weights to be saved are not in memory.

    Raises:
        InputError: naming the first.
    """
    from ntkengine.inputs.streaming import entry_of

    if below or not hasattr(model, "peft_config"):
        for name, p in model.named_parameters():
            if entry_of(p) is not None:
                raise InputError(f"save: {name} stays in its file, and would not be saved; load it without stream")


def save_model(model: nn.Module, folder: Path, below: bool, check: Callable[[Path], None]) -> None:
    """Save a model, whole or not at all; of an adapter also the model below it, if asked for, in `base`.

    Args:
        model: taken apart where `below`.
        folder: a new one.
        below: an adapter's file has no head, nor what else was trained beside it.
        check: called with the folder before it gets its name.

    Raises:
        CheckFailed: a weight is not finite.
        OSError: the disk refused.
    """
    from safetensors import SafetensorError

    from ntkengine.inputs.models import quiet

    partial = folder.absolute().with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tuned: Any = model
    try:
        with quiet():
            tuned.save_pretrained(partial)
        if tuned.ntk_tokenizer is not None:
            tuned.ntk_tokenizer.save_pretrained(partial)
        if hasattr(tuned, "peft_config") and below:
            base = tuned.unload() if hasattr(tuned.base_model, "unload") else tuned.get_base_model()
            with quiet():
                base.save_pretrained(partial / "base")
            config = partial / "adapter_config.json"
            found = json.loads(config.read_text(encoding="utf-8"))
            found["base_model_name_or_path"] = str(folder.absolute() / "base")
            if found.get("init_lora_weights", True) not in _PLAIN:  # which base/ has been through
                found |= {"init_lora_weights": True} | {name: v for name, v in _DATA.items() if name in found}
            config.write_text(json.dumps(found, indent=2), encoding="utf-8")
        _check_finite(partial, folder)
        check(partial)
        partial.rename(folder)
    except SafetensorError as error:
        raise OSError(f"{folder}: is not written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_finite(partial: Path, folder: Path) -> None:
    import torch
    from safetensors import safe_open

    for path in sorted(partial.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (it is no mapping)
                if not bool(torch.isfinite(file.get_tensor(name)).all()):
                    raise CheckFailed(f"{folder}: is not written: {name} would not be finite")
