"""The tables of docs/choosing.md, which put recorded results of several benchmarks side by side."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
STUDENT, EIGHT_BIT = "SLMRec", "per token, migrated"
DATA = {"ml-100k": "ml_100k", "beauty": "beauty"}


def recorded(name: str) -> Any:
    """What a benchmark found."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["result"]


def choosing(_: dict[str, Any]) -> str:
    """What each compression kept of NDCG@10 on the test split, and how much faster it answered a single user."""
    rows = ["| | data | of what it is made from, NDCG@10 (95 % interval) | faster, batch 1 |", "|---|---|---|---|"]
    for data, file in (DATA | {"ml-1m": "ml_1m"}).items():
        lines = {line["row"]: line for line in recorded(f"slmrec_{file}")["rows"]}
        times = [lines[row]["p50_ms"] for row in ("teacher", STUDENT)]  # none where a table was put together from cells
        faster = f"{times[0] / times[1]:.2f}x" if all(times) else ""
        rows.append(f"| 4 layers of 8, distilled | {data} | {_share(lines[STUDENT]['of_teacher'])} | {faster} |")
    for data, file in DATA.items():
        found = recorded(f"eight_bit_{file}")[STUDENT]
        share = _share(found["accuracy"][EIGHT_BIT]["test"]["of_fp32"])
        faster = found["speed"]["batch 1"]["8-bit"]["ratio"]
        rows.append(f"| the student in 8 bits | {data} | {share} | {faster:.2f}x |")
    for data, result in recorded("orthogonality")["datasets"].items():
        cells = {(line["model"], line["compression"]): line for line in result["table"]}
        rows.append(
            f"| 3 layers of the student's 4, healed | {data} | {1 + cells[STUDENT, 'pruned']['change']:.3f} | |"
        )
    for criterion, line in recorded("pruning_ml_100k")["rows"].items():
        rows.append(f"| 6 layers of the teacher's 8 by {criterion}, healed | ml-100k | {_share(line['of_whole'])} | |")
    return "\n".join(rows)


def item_scaling(entry: dict[str, Any]) -> str:
    """The product with the item table and top-K, by catalogue size and table."""
    result = entry["result"]
    found = {(row["num_items"], row["table"]): row for row in result["rows"]}
    rows = [
        "| items | fp32 table | 8-bit table | with fp32, ms | with 8-bit, ms | lists certified |",
        "|---|---|---|---|---|---|",
    ]
    for size in sorted({size for size, _ in found}):
        plain, small = found.get((size, "fp32")), found[size, "8-bit"]
        shown = (f"{plain['table_bytes'] / 1e6:.1f} MB", f"{plain['p50_ms']:.2f}") if plain else ("not measured", "")
        rows.append(
            f"| {size:,} | {shown[0]} | {small['table_bytes'] / 1e6:.1f} MB | {shown[1]} | {small['p50_ms']:.2f} "
            f"| {100 * small['certified']:.1f} % |"
        )
    note = (
        f"One user, the best {result['top_k']}, vectors {result['width']} wide, median of a process each "
        "(`python benchmarks/item_scaling.py`)."
    )
    return "\n".join([*rows, "", note])


def _share(found: list[float]) -> str:
    return f"{found[0]:.3f} ({found[1]:.3f} to {found[2]:.3f})" if len(found) == 3 else f"{found[0]:.3f}"
