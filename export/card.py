"""What a bundle says of itself: README.md, a model card with a `model-index`, and the ML-BOM."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.engine_files import ENGINE_FILE, ENGINE_FOLDER, read_engines
from export.mlbom import METRICS, MLBOM_FILE, known_licences, model_lineage, write_ml_bom
from export.runtime import read_signature
from slmrec.artifact import Artifact

CARD_FILE = "README.md"


def write_papers(folder: Path, parent: Artifact, benchmark: dict[str, Any] | None) -> None:
    """Write model card and ML-BOM of a bundle that is complete but for them.

    Args:
        folder: of the bundle.
        parent: the graph or bundle it is made from.
        benchmark: figures come from its row of this very parent, if there is one.
    """
    row = next((row for row in benchmark["rows"] if row.get("hash") == parent.hash), None) if benchmark else None
    (folder / CARD_FILE).write_text(model_card(folder, parent, row), encoding="utf-8")
    write_ml_bom(folder, parent, row)


def model_card(folder: Path, parent: Artifact, row: dict[str, Any] | None) -> str:
    """Markdown with YAML front matter, as model hubs read it; figures are the row's, if there is one."""
    parts = [
        _front_matter(row),
        "# A recommender as an ONNX graph",
        _contract(read_signature(folder)),
        _engines(folder),
        _figures(row),
        _lineage(parent),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(row: dict[str, Any] | None) -> str:
    lines = ["---", "library_name: onnxruntime", "tags: [recommendation, sequential-recommendation, onnx]"]
    if row is not None and row["accuracy"] is not None:
        accuracy = row["accuracy"]
        lines += [
            "model-index:",
            "- name: slmcompress bundle",
            "  results:",
            "  - task: {type: sequential-recommendation}",
        ]
        lines += [f"    dataset: {{type: leave-one-out, name: {json.dumps(accuracy['protocol'])}}}", "    metrics:"]
        lines += [
            f"    - {{type: {json.dumps(name)}, value: {accuracy[name]:.5f}}}" for name in METRICS if name in accuracy
        ]
    return "\n".join([*lines, "---"])


def _contract(signature: dict[str, Any]) -> str:
    return f"""\
History in, the best {signature["top_k"]} of {signature["num_items"]} items out, {signature["precision"]}.

| tensor | type | shape | meaning |
|---|---|---|---|
| item_ids | int64 | batch x history | internal ids, oldest first, 0s on the left; at most {signature["max_history"]} |
| exclude_ids | int64 | batch x n | never returned besides the history; padded with 0; n may be 0 |
| top_items | int64 | batch x {signature["top_k"]} | best first; 0 where nothing is left |
| top_scores | float32 | batch x {signature["top_k"]} | -inf where nothing is left |

`items.parquet` maps internal ids (`item`) to external ones (`item_id`) and titles. Pad a history to the smallest of
the buckets {", ".join(map(str, signature["buckets"]))} that holds it, never to the longest of a batch: then a user's
answer does not depend on who shares it. Ties: {signature["ties"]}.

Check it on the machine that will serve it, then ask it:

    slmcompress verify BUNDLE
    slmcompress recommend -m BUNDLE ITEM ITEM ..."""


def _figures(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    lines = ["## Measured", "", "| | |", "|---|---|"]
    if row["accuracy"] is not None:
        lines += [f"| {name.upper()} | {row['accuracy'][name]:.4f} |" for name in METRICS if name in row["accuracy"]]
    lines += [
        f"| {name}, batch 1 | {value:.2f} |" for name, value in row["latency"]["batch_1"].items() if value is not None
    ]
    return "\n".join([*lines, "", "On which machine and how: `benchmark.json`."])


def _engines(folder: Path) -> str:
    """The TensorRT engines that go along, or what builds them on the target."""
    if not (folder / ENGINE_FILE).exists():
        return ""
    record = read_engines(folder)
    rows = [
        f"| `{engine['file']}` | {engine['flavor']} {engine['version']} | {engine['compute_capability'] or 'default'} |"
        for engine in record["engines"]
    ]
    table = ["| file | built by | compute capability |", "|---|---|---|", *rows, ""] if rows else []
    build = f"Build them on the target: `python {ENGINE_FOLDER}/build_engine.py --output .` (needs TensorRT alone)."
    return "\n".join([f"## TensorRT engines, {record['precision']}", "", *table, build])


def _gate(entry: Mapping[str, Any]) -> str:
    how = {"underpowered": "passed, but the users there were do not resolve it"}
    return f"; accuracy gate: {how.get(entry['gate'], entry['gate'])}" if "gate" in entry else ""


def _lineage(parent: Artifact) -> str:
    lineage = model_lineage(parent)
    lines = [
        f"{number}. {entry['stage']} ({entry['kind']} `{entry['hash'][:16]}`){_gate(entry)}"
        for number, entry in enumerate(lineage, 1)
    ]
    licences = [f"* {name}: {licence}" for name, licence in known_licences(lineage).items()]
    papers = f"""\
Settings of every stage: `manifest.json`. As a CycloneDX ML-BOM, with hashes, data sets, packages and the licences that
are known: `{MLBOM_FILE}`."""
    made_of = ["## Licences of what it was made from", "", *licences] if licences else []
    return "\n".join(["## Lineage", "", *lines, "", papers, "", *made_of]).rstrip()
