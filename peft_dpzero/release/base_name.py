"""What a release calls its base model: its name on the Hub, or nothing. A local path is nobody's business."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from peft_dpzero.errors import DPZeroError
from peft_dpzero.modules import unwrapped
from peft_dpzero.release.adapter import ADAPTER_CONFIG_NAME, PLACE

_BASE = "base_model_name_or_path"
# Where the Hub's client keeps what it downloaded.
_CACHED = re.compile(r"models--(?P<repo>[^/\\]+)[/\\]snapshots[/\\]")


def base_name(model: Any, given: str | None = None) -> str | None:
    """The base's name on the Hub; None if it is known by a local folder only.

    A folder's own name is no substitute: on the Hub, and in another's working directory, it may be another model.

    Args:
        model: the trained one. What its adapter names as the base counts, else what the model was loaded from.
        given: the name that the user gave.

    Raises:
        DPZeroError: `given` is no name that a model on the Hub can have.
    """
    if given is not None:
        return given_name(given)
    base = unwrapped(model)
    adapter = model.peft_config[model.active_adapter] if hasattr(model, "peft_config") else None
    places = (
        getattr(adapter, _BASE, None),
        getattr(base, "name_or_path", None),
        getattr(getattr(base, "config", None), "_name_or_path", None),
    )
    return hub_name(next((str(place) for place in places if place), ""))


def given_name(name: Any) -> str | None:
    """What a user calls the base; None if nothing is given.

    Raises:
        DPZeroError: it is no name that a model on the Hub can have.
    """
    if name is None or (isinstance(name, str) and _is_name(name)):
        return name
    raise DPZeroError(f"base_model must be a name on the Hub, such as organization/model; got {name!r}.")


def hub_name(place: str) -> str | None:
    """The Hub name that `place` is, or that it was downloaded under; None for any other folder."""
    if cached := _CACHED.search(place):
        return cached["repo"].replace("--", "/")
    return place if _is_name(place) and not Path(place).exists() else None


def name_base(folder: Path, name: str | None) -> None:
    """Puts `name` into each adapter's configuration in `folder`, in place of what the base was loaded from.

    Other places that it names, such as a prompt's tokenizer, become Hub names too, or a folder's last name.
    """
    for path in folder.rglob(ADAPTER_CONFIG_NAME):
        config = json.loads(path.read_text(encoding="utf-8"))
        for key, place in config.items():
            if key == _BASE:
                config[key] = name
            elif key.endswith(PLACE) and place:
                config[key] = hub_name(place) or name or Path(place).name
        path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _is_name(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name)
