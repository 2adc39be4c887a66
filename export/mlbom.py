"""The ML-BOM of a bundle: a CycloneDX 1.6 document (ECMA-424) of what the model is made of, from and with.

Written here because CycloneDX's own library has no `modelCard` (11.12.0); the tests read it by that library's schema.
It holds no date and no place: the same bundle has the same document, and its serial number follows from the rest.
"""

import contextlib
import platform
import uuid
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote

from export.engine_files import ENGINE_FILE, read_engines
from export.items import PROJECTION_FILE
from export.runtime import DATA_FILES, SIGNATURE_FILE, read_signature
from slmrec.artifact import Artifact, canonical_hash, file_sha256, write_json
from slmrec.catalogue import ITEMS_FILE
from slmrec.sources import SOURCES, Source
from slmrec.versions import library_versions

MLBOM_FILE = "mlbom.cdx.json"
METRICS = ("hr@1", "hr@5", "hr@10", "ndcg@5", "ndcg@10", "mrr")
LATENCIES = ("p50_ms", "p95_ms", "p99_ms")
NEEDED = ("jaxtyping", "numpy", "onnxruntime", "polars", "psutil", "pyarrow", "slmcompress")
"""Packages that answering by a bundle imports; the others were there when it was made."""

Entry = Mapping[str, Any]
"""An ancestor as manifests keep it: stage, kind, hash, settings; or a component of the document."""


def write_ml_bom(folder: Path, parent: Artifact, row: Mapping[str, Any] | None) -> None:
    """Write the document of a bundle's folder.

    Args:
        folder: of the bundle, graphs, tables and engines in place.
        parent: what the bundle is made from: a graph, or another bundle.
        row: the benchmark's measurement of this very graph, if there is one.
    """
    write_json(folder / MLBOM_FILE, ml_bom(folder, parent, row))


def ml_bom(folder: Path, parent: Artifact, row: Mapping[str, Any] | None) -> dict[str, Any]:
    """The document; arguments as of `write_ml_bom`."""
    lineage = model_lineage(parent)
    data = [_dataset(entry) for entry in lineage if entry["kind"] == "dataset"]
    libraries = _libraries()
    model = _model(folder, lineage) | {"modelCard": _card(folder, data, row)}
    needed = [one["bom-ref"] for one in libraries if one.get("scope") == "required"]
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": model, "tools": {"components": [_tool()]}},
        "components": [*data, *libraries],
        "dependencies": [{"ref": model["bom-ref"], "dependsOn": needed}],
    }
    return document | {"serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, canonical_hash(document))}"}


def model_lineage(artifact: Artifact) -> list[Entry]:
    """What an exported graph, or a bundle, was made from, itself last: oldest first, without what a report measured."""
    own = {"stage": artifact.stage, "kind": artifact.kind, "hash": artifact.hash, "settings": artifact.settings}
    entries: Sequence[Entry] = [*artifact.manifest["lineage"], own]
    graph = next(number for number, entry in enumerate(entries) if entry["kind"] in ("graph", "engine"))
    bundles: list[Entry] = []
    for entry in reversed(entries):
        if entry["kind"] != "bundle":
            break
        bundles.insert(0, entry)
    return [*entries[: graph + 1], *bundles]


def _model(folder: Path, lineage: Sequence[Entry]) -> dict[str, Any]:
    """The model: its files, and the line of models it descends from."""
    signature = read_signature(folder)
    names = [*signature["graphs"], *DATA_FILES, SIGNATURE_FILE, ITEMS_FILE, PROJECTION_FILE]
    if (folder / ENGINE_FILE).exists():
        names += [ENGINE_FILE, *(engine["file"] for engine in read_engines(folder)["engines"])]
    files = [_file(name, file_sha256(folder / name)) for name in sorted(names) if (folder / name).exists()]
    version = canonical_hash({file["name"]: file["hashes"][0]["content"] for file in files})
    ancestors = [_ancestor(entry) for entry in lineage if entry["kind"] != "dataset"]
    return {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": "slmcompress recommender",
        "version": version[:16],
        "description": f"history in, the best {signature['top_k']} of {signature['num_items']} items out",
        "components": files,
        "pedigree": {"ancestors": [*_backbones(lineage), *ancestors]},
        "properties": _properties({"precision": signature["precision"], "opset": signature["opset"]}),
    }


def _card(folder: Path, data: Sequence[Entry], row: Mapping[str, Any] | None) -> dict[str, Any]:
    """The model card: what goes in and out, what it was trained on and, where it was measured, how good it is."""
    signature = read_signature(folder)
    parameters = {
        "task": "sequential-recommendation",
        "architectureFamily": "transformer",
        "modelArchitecture": f"decoder, item table and top-K ({signature['head']} head)",
        "datasets": [{"ref": one["bom-ref"]} for one in data],
        "inputs": _tensors(signature["inputs"]),
        "outputs": _tensors(signature["outputs"]),
    }
    measured = {} if row is None else {"quantitativeAnalysis": {"performanceMetrics": _metrics(row)}}
    return {"modelParameters": parameters} | measured


def _tensors(described: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {"format": f"{name}: {tensor['dtype']} [{', '.join(map(str, tensor['shape']))}]"}
        for name, tensor in described.items()
    ]


def _metrics(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Accuracy with its interval, and latency; CycloneDX wants text."""
    found = []
    accuracy = row["accuracy"] or {}
    for name in (name for name in METRICS if name in accuracy):
        one: dict[str, Any] = {"type": name, "value": f"{accuracy[name]:.5f}", "slice": accuracy["protocol"]}
        if name in accuracy.get("intervals", {}):
            low, high = accuracy["intervals"][name]
            one["confidenceInterval"] = {"lowerBound": f"{low:.5f}", "upperBound": f"{high:.5f}"}
        found.append(one)
    latency = row["latency"]["batch_1"]
    found += [
        {"type": name, "value": f"{latency[name]:.2f}", "slice": "batch 1"}
        for name in LATENCIES
        if latency.get(name) is not None
    ]
    return found


def _ancestor(entry: Entry) -> dict[str, Any]:
    return {
        "type": "machine-learning-model",
        "bom-ref": f"{entry['stage']}-{entry['hash'][:16]}",
        "name": entry["stage"],
        "version": entry["hash"][:16],
        "properties": _properties({"kind": entry["kind"], "hash": entry["hash"]} | _shape(entry["settings"])),
    }


def _shape(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a stage's settings those that say what kind of model came out; all are in manifest.json."""
    return {name: settings[name] for name in ("num_layers", "loss", "bits", "backend") if settings.get(name)}


def _backbones(lineage: Sequence[Entry]) -> list[dict[str, Any]]:
    """The pretrained decoders that teachers began with: name and hash, and the licence where it is known here."""
    found = {}
    for settings in (entry["settings"] for entry in lineage if entry["settings"].get("backbone")):
        name, content = str(settings["backbone"]), settings.get("backbone_hash")
        source = SOURCES.get(name)
        shown = name if source or not Path(name).is_absolute() else Path(name).name
        one: dict[str, Any] = {"type": "machine-learning-model", "bom-ref": f"backbone-{shown}", "name": shown}
        if source is not None:
            one |= {"description": source.what, "licenses": _licences(source)}
        if content is not None:
            one |= {"version": content[:16], "properties": _properties({"hash": content})}
        found[shown] = one
    return list(found.values())


def _dataset(entry: Entry) -> dict[str, Any]:
    """A dataset with the files it was read from, and the licence of a named one, known by its files."""
    inputs = entry["settings"].get("inputs") or {}
    logs, items_file = inputs.get("files", []), inputs.get("items_file")
    contents = {content for _, content in logs}
    source = next((one for one in SOURCES.values() if contents & set(one.files.values())), None)
    name = source.name if source else ", ".join(name for name, _ in logs) or "interactions"
    files = [_file(name, content) for name, content in [*logs, *([items_file] if items_file else [])]]
    found: dict[str, Any] = {
        "type": "data",
        "bom-ref": f"data-{entry['hash'][:16]}",
        "name": name,
        "version": entry["hash"][:16],
        "data": [{"type": "dataset", "name": name}],
        "properties": _properties({"hash": entry["hash"]}),
    }
    if files:
        found["components"] = files
    if source is not None:
        found |= {"description": source.what, "licenses": _licences(source)}
    return found


def known_licences(lineage: Sequence[Entry]) -> dict[str, str]:
    """Licences of the data sets and pretrained decoders of a lineage, by name; "unknown" where it is not known here."""
    data = [_dataset(entry) for entry in lineage if entry["kind"] == "dataset"]
    found = {}
    for one in [*data, *_backbones(lineage)]:
        licence = one["licenses"][0]["license"] if "licenses" in one else {}
        found[one["name"]] = licence.get("name") or licence.get("id") or "unknown"
    return found


def _licences(source: Source) -> list[dict[str, Any]]:
    kind = "name" if " " in source.licence else "id"
    return [{"license": {kind: source.licence}}]


def _libraries() -> list[dict[str, Any]]:
    """Packages that were there, those that answers need as required ones, and Python."""
    versions = library_versions()
    for name in NEEDED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    versions.pop("python")
    python = {
        "type": "platform", "bom-ref": "python", "name": "python", "version": platform.python_version(),
        "scope": "required",
    }  # fmt: skip
    return [
        python,
        *(_library(name, version) for name, version in sorted(versions.items())),
    ]


def _library(name: str, version: str) -> dict[str, Any]:
    reference = f"pkg:pypi/{name}@{quote(version)}"
    scope = "required" if name in NEEDED else "excluded"
    found = {"type": "library", "bom-ref": reference, "name": name, "version": version, "scope": scope}
    return found | ({} if name == "slmcompress" else {"purl": reference})  # which no public index holds


def _tool() -> dict[str, Any]:
    return {
        "type": "application",
        "name": "slmcompress",
        "version": library_versions().get("slmcompress", "unknown"),
        "licenses": [{"license": {"id": "Apache-2.0"}}],
    }


def _file(name: str, content: str) -> dict[str, Any]:
    return {"type": "file", "name": name, "hashes": [{"alg": "SHA-256", "content": content}]}


def _properties(values: Mapping[str, Any]) -> list[dict[str, str]]:
    """Properties of ours, in CycloneDX's way of naming them; text, by name."""
    return [{"name": f"slmcompress:{name}", "value": str(value)} for name, value in sorted(values.items())]
