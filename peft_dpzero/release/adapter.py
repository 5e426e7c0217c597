"""An adapter's configuration, as far as it is public and the same wherever it is written down."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

ADAPTER_CONFIG_NAME = "adapter_config.json"
# How the file was written, and where from; what else ends in this names a place, which may be a local path.
_OF_THE_FILE = ("inference_mode", "auto_mapping", "peft_version", "revision")
PLACE = "name_or_path"


def adapter_header(model: Any) -> dict[str, Any] | None:
    """The active adapter's configuration for the journal's header, JSON-ready; None if `model` has no adapter."""
    if not hasattr(model, "peft_config"):
        return None
    return comparable(model.peft_config[model.active_adapter].to_dict())


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` without its places, and with names sorted and once each: PEFT writes sets as lists, and adds to a list
    the same names again with each model that is made by it.
    """
    kept = {key: value for key, value in config.items() if key not in _OF_THE_FILE and not key.endswith(PLACE)}
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=_plain))
    return {key: _sorted(value) for key, value in plain.items()}


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def _sorted(value: Any) -> Any:
    names = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return sorted(set(value)) if names else value
