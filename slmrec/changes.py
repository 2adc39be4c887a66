"""In which settings one run differs from another, in a few words."""

import json
from collections.abc import Mapping
from typing import Any


def changed_settings(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The settings that differ, "name: before -> after", five at most; "its inputs changed" where none does.

    >>> changed_settings({"train": {"epochs": 3, "seed": 0}}, {"train": {"epochs": 4, "seed": 0}})
    'train.epochs: 3 -> 4'
    """
    old, new = flat_settings(before), flat_settings(json.loads(json.dumps(dict(after), default=str)))
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    changed = [f"{name}: {_short(old.get(name))} -> {_short(new.get(name))}" for name in names]
    return "; ".join(changed[:5]) if changed else "its inputs changed"


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flat_settings(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
