"""The README of a bundle: a model card with a `model-index`, made from what was recorded."""

import json
from typing import Any

from slmrec.artifact import Artifact

METRICS = ("hr@1", "hr@5", "hr@10", "ndcg@5", "ndcg@10", "mrr")


def model_card(graph: Artifact, signature: dict[str, Any], benchmark: dict[str, Any] | None) -> str:
    """Markdown with YAML front matter; figures come from the benchmark's row of this graph, if there is one."""
    row = next((row for row in benchmark["rows"] if row.get("hash") == graph.hash), None) if benchmark else None
    parts = [
        _front_matter(row),
        "# A recommender as an ONNX graph",
        _contract(signature),
        _figures(row),
        _lineage(graph),
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


def _lineage(graph: Artifact) -> str:
    entries = [*graph.manifest["lineage"], {"stage": graph.stage, "kind": graph.kind, "hash": graph.hash}]
    lines = [
        f"{number}. {entry['stage']} ({entry['kind']} `{entry['hash'][:16]}`)"
        for number, entry in enumerate(entries, 1)
    ]
    return "\n".join(["## Lineage", "", *lines, "", "Settings of every stage: `manifest.json`."])
