"""What a report tells beside its measurements, read from artefacts: stages passed, trainings, analyses."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slmrec.artifact import MANIFEST, Artifact, open_artifact, read_manifest

TRAINING_FILE = "training.jsonl"
ANALYSES = ("sensitivity", "importance")
"""Stages whose findings a report shows; each lies in RUNS under its name, in a JSON file of that name."""


def stages_of(named: Mapping[str, Artifact]) -> list[dict[str, Any]]:
    """Every stage that led to the artefacts, each once, what it was made from first.

    `name` is the artefact's, where it takes part, and `before` that of its nearest ancestor that takes part.
    """
    names = {artifact.hash: name for name, artifact in named.items()}
    found: dict[str, dict[str, Any]] = {}
    for artifact in named.values():
        lineage = [*artifact.manifest["lineage"], {**artifact.manifest, "settings": artifact.settings}]
        for entry in lineage:
            stage = {key: entry[key] for key in ("stage", "kind", "hash", "settings")}
            found.setdefault(entry["hash"], {**stage, "name": names.get(entry["hash"]), "before": None})
        before = (names[entry["hash"]] for entry in reversed(lineage[:-1]) if entry["hash"] in names)
        found[artifact.hash]["before"] = next(before, None)
    return list(found.values())


def trainings(named: Mapping[str, Artifact]) -> dict[str, list[dict[str, Any]]]:
    """Training records of the artefacts and of those they come from that still lie there, oldest artefact first.

    An ancestor that does not take part goes by its folder's name.
    """
    names = {artifact.hash: name for name, artifact in named.items()}
    found: dict[str, list[dict[str, Any]]] = {}
    seen: set[str] = set()
    for artifact in named.values():
        for one in [*_ancestors(artifact), artifact]:
            records = [] if one.hash in seen else read_training(one)
            seen.add(one.hash)
            folder = one.path.name if one.path.name not in named else f"{one.path.name} {one.hash[:8]}"
            if records:
                found[names.get(one.hash, folder)] = records
    return found


def read_training(artifact: Artifact) -> list[dict[str, Any]]:
    """Read the records of the artefact's training, oldest first; none where it was not trained."""
    path = artifact.path / TRAINING_FILE
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def find_analyses(runs: Path, named: Mapping[str, Artifact]) -> dict[str, dict[str, Any]]:
    """Findings of the analyses in RUNS that looked at one of the artefacts or at one they come from.

    `of` is the name of what was looked at. An altered analysis is an `ArtifactError`.
    """
    stages = {stage["hash"]: stage for stage in stages_of(named)}
    found = {}
    for name in ANALYSES:
        if not (runs / name / MANIFEST).is_file() or read_manifest(runs / name)["stage"] != name:
            continue
        analysis = open_artifact(runs / name)
        model = analysis.manifest["parents"]["model"]
        if model["hash"] in stages:
            content = json.loads((analysis.path / f"{name}.json").read_text(encoding="utf-8"))
            found[name] = {**content, "of": stages[model["hash"]]["name"] or Path(model["path"]).name}
    return found


def _ancestors(artifact: Artifact) -> Iterator[Artifact]:
    """Those that still lie where they were read, unchanged by their manifests, oldest first."""
    for entry in artifact.manifest["parents"].values():
        path = Path(os.path.normpath(artifact.path / entry["path"]))
        if not (path / MANIFEST).is_file():
            continue
        parent = Artifact(path, read_manifest(path))
        if parent.hash == entry["hash"]:
            yield from _ancestors(parent)
            yield parent
