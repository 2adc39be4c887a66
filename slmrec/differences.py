"""What two artefacts differ in, by their manifests: settings, inputs, versions, files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slmrec.artifact import Artifact
from slmrec.changes import flat_settings


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same."""

    what: str
    """artefact, settings, lineage, versions or files."""
    name: str
    old: Any
    new: Any

    def to_text(self) -> str:
        """A line for people."""
        shown = ["(none)" if value is None else str(value) for value in (self.old, self.new)]
        return f"{self.what:<9} {self.name}: {shown[0]} -> {shown[1]}"


def differences(old: Artifact, new: Artifact) -> list[Difference]:
    """Everything but dates and places; empty exactly where both hold the same bytes made in the same way."""
    before, after = old.manifest, new.manifest
    found = _of("artefact", *({name: one[name] for name in ("kind", "stage")} for one in (before, after)))
    found += _of("settings", flat_settings(before["settings"]), flat_settings(after["settings"]))
    found += _of("lineage", _stages(before), _stages(after))
    found += _of("versions", before["versions"], after["versions"])
    return found + _of("files", _files(before), _files(after))


def _of(what: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    names = sorted({*old, *new})
    return [Difference(what, name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)]


def _stages(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Ancestors by stage and number, as short hashes."""
    counted: dict[str, int] = {}
    found = {}
    for entry in manifest["lineage"]:
        number = counted[entry["stage"]] = counted.get(entry["stage"], 0) + 1
        name = entry["stage"] if number == 1 else f"{entry['stage']} {number}"
        found[name] = entry["hash"][:12]
        found |= {f"{name}.{setting}": value for setting, value in flat_settings(entry["settings"]).items()}
    return found


def _files(manifest: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{entry['sha256'][:12]}, {entry['size_bytes']} bytes" for name, entry in manifest["files"].items()}
