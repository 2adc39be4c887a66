"""The tables of the README, made from `benchmarks/results/`.

python benchmarks/readme.py           # write them
python benchmarks/readme.py --check   # exit 1 where the README says something else
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def demo(entry: dict[str, Any]) -> str:
    """Accuracy and speed of the demo's artefacts; ratios to the teacher."""
    rows = [
        "| | HR@10 | NDCG@10 (95 % interval) | of the teacher's | p50, batch 1 | speed-up | users/s, batch 32 | size |"
    ]
    rows += ["|---|---|---|---|---|---|---|---|"]
    for row in entry["rows"]:
        accuracy, ratios = row["accuracy"], row["ratios"]
        low, high = accuracy["intervals"]["ndcg@10"]
        rows.append(
            f"| {row['name']} | {accuracy['hr@10']:.4f} | {accuracy['ndcg@10']:.4f} ({low:.3f} to {high:.3f}) "
            f"| {ratios['ndcg@10']['ratio']:.3f} | {row['latency']['batch_1']['p50_ms']:.1f} ms "
            f"| {ratios['speedup_batch_1']['median']:.1f}x | {row['throughput']['batch_32']:.0f} "
            f"| {row['size_bytes'] / 1e6:.1f} MB |"
        )
    machine = entry["machine"]
    data = entry["dataset"]
    note = (
        f"Test split, all {entry['rows'][0]['accuracy']['num_users']} users, full catalogue, past excluded; "
        f"{data['num_tied_targets']} users' last two events share a timestamp. Speed on {machine['usable_cores']} "
        f"cores of an {machine['cpu']}, artefacts in turn; only the ratios carry over to another machine."
    )
    return "\n".join([*rows, "", note])


def training_speed(entry: dict[str, Any]) -> str:
    """Users per second against batches padded to the maximum."""
    result = entry["result"]
    rows = ["| batches | users/s | ratio |", "|---|---|---|"]
    for name, rate in result["users_per_second"].items():
        rows.append(f"| {name} | {rate:.0f} | {result['ratio_to_padded'][name]:.2f}x |")
    return "\n".join(rows)


def data_speed(entry: dict[str, Any]) -> str:
    """Rows a second of `slmcompress data`."""
    result = entry["result"]
    return (
        f"`slmcompress data` read {result['rows'] / 1e6:.0f} million CSV rows in {result['seconds']:.0f} s "
        f"({result['rows_per_second'] / 1e6:.2f} million a second), {result['peak_bytes'] / 1e9:.2f} GB at most."
    )


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "demo": demo,
    "training_speed": training_speed,
    "data_speed": data_speed,
}


def main() -> int:
    """Write or check every table that the README has a place for."""
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    made = text
    for name, table in TABLES.items():
        entry = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        body = f"<!-- {name} -->\n{table(entry)}\n<!-- /{name} -->"
        made, places = re.subn(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, b=body: b, made, flags=re.DOTALL)
        if places != 1:
            print(f"README.md has {places} places for the table {name!r}")
            return 1
    if "--check" in sys.argv:
        if made != text:
            print("README.md differs from benchmarks/results: run python benchmarks/readme.py")
        return int(made != text)
    path.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
