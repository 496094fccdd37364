"""Where a model comes from: a folder, or a hub, which may be out of reach."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ntkengine.errors import InputError

_PATIENCE_S = 10.0


def check_source(path_or_id: str | Path, allow_pickle: bool) -> str:
    """Return a model's folder or hub id as text, of an adapter that of the model below, after refusing what is neither.

    Args:
        path_or_id: as for `load_model`.
        allow_pickle: likewise.

    Raises:
        InputError: no folder and not a hub's name, or a folder that holds neither a model nor an adapter.
    """
    adapter = adapter_folder(path_or_id)
    if adapter is not None:
        return check_source(_below(adapter), allow_pickle)
    source = str(path_or_id)
    local = Path(os.path.expanduser(source))  # unlike Path's own, it takes any text
    if not os.path.exists(local) and not source.startswith((".", "/", "~")) and _is_id(source):
        return source
    _check_directory(local, allow_pickle)
    return str(local)


def adapter_folder(path_or_id: str | Path) -> Path | None:
    """Return the folder if it holds a PEFT adapter and no model of its own."""
    local = Path(os.path.expanduser(str(path_or_id)))
    there = os.path.isfile(local / "adapter_config.json") and not os.path.isfile(local / "config.json")
    return local if there else None


def _below(adapter: Path) -> str:
    """Return where the model below an adapter is: in its `base`, as `finetune --save` writes it, or where it says."""
    if not (adapter / "adapter_model.safetensors").is_file():
        raise InputError(f"{adapter}: holds an adapter without its weights; expected adapter_model.safetensors")
    try:
        said = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        said = None
    base = str(adapter / "base") if (adapter / "base").is_dir() else said
    if not isinstance(base, str) or not base or adapter_folder(base) is not None:
        raise InputError(
            f"{adapter}: adapter_config.json: expected base_model_name_or_path, a model's folder or hub id"
        )
    return base


def _is_id(name: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def hub_answers() -> bool:
    """Return whether the hub can be reached; where it cannot, its own client tries every file for half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE_S)
    except Exception:  # noqa: BLE001  (of whichever client it uses; each means that nothing answers)
        return False
    return True


def _check_directory(path: Path, allow_pickle: bool) -> None:
    if not os.path.isdir(path):
        what = "is a file, expected a model directory" if os.path.exists(path) else "no such model directory"
        msg = f"{path}: {what}"
        raise InputError(msg)
    if not (path / "config.json").is_file():
        msg = f"{path}: expected a model directory with a config.json, found none"
        raise InputError(msg)
    if any(path.glob("*.safetensors")):
        return
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
    if not pickled:
        msg = f"{path}: holds no weights; expected model.safetensors"
        raise InputError(msg)
    if not allow_pickle:
        msg = (
            f"{path}: holds its weights in pickle form ({pickled[0]}), which can run any code when loaded; convert "
            "them to safetensors, or pass allow_pickle if you trust them"
        )
        raise InputError(msg)
