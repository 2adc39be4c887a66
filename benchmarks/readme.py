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


def baselines(entry: dict[str, Any]) -> str:
    """Models of another library on our split, and what others published and nobody here has run."""
    result = entry["result"]
    rows = [
        "| | HR@10 | NDCG@10 (95 % interval) | on validation | settings tried | best epoch | CPU minutes, all tried |"
    ]
    rows += ["|---|---|---|---|---|---|---|"]
    for row in sorted(result["rows"], key=lambda row: -row["test"]["ndcg@10"]):
        low, high = row["ndcg@10_interval"]
        rows.append(
            f"| {row['model']} | {row['test']['hr@10']:.4f} | {row['test']['ndcg@10']:.4f} ({low:.3f} to {high:.3f}) "
            f"| {row['validation']['ndcg@10']:.4f} | {len(row['tried'])} "
            f"| {row['run']['best_epoch']} of at most {row['run']['epochs']} "
            f"| {sum(tried['cpu_seconds'] for tried in row['tried']) / 60:.1f} |"
        )
    full_ranking = [row for row in result["published"] if "full catalogue" in row["protocol"]]
    names = sorted({row["model"] for row in result["published"]} - {row["model"] for row in full_ranking})
    figures = ", ".join(f"{row['model']} {_figure(row['metrics']['ndcg@10'])}" for row in full_ranking)
    note = (
        f"ML-100K, test split, full catalogue, past excluded, seed {result['seed']}. Published by others and not run "
        f"here: {figures} (NDCG@10 on Beauty, full catalogue); {', '.join(names)} only against 999 sampled negatives "
        "(`benchmarks/peers/published.json`)."
    )
    return "\n".join([*rows, "", note])


def _figure(value: float | list[float]) -> str:
    return " to ".join(f"{end:.4f}" for end in (value if isinstance(value, list) else [value]))


def slmrec(entry: dict[str, Any]) -> str:
    """SLMRec's rows on one data set, means over seeds; the paired test is against the student trained by CE alone."""
    rows = [
        "| | HR@1 | HR@10 | NDCG@10 (95 % interval over users) | by seed | of the teacher's | against CE, p (Holm) "
        "| mean rank | p50, batch 1 |"
    ]
    rows += ["|---|---|---|---|---|---|---|---|---|"]
    for line in entry["result"]["rows"]:
        low, high = line["ndcg@10_interval"]
        by_seed = ", ".join(f"{value:.4f}" for value in line["ndcg@10_by_seed"])
        tested = "" if line["p"] is None else f"{line['difference']['estimate']:+.4f}, {line['p_holm']:.2f}"
        hr_1, hr_10, ndcg_10 = (line["test"][metric] for metric in ("hr@1", "hr@10", "ndcg@10"))
        cells = [
            line["row"],
            f"{hr_1:.4f}",
            f"{hr_10:.4f}",
            f"{ndcg_10:.4f} ({low:.3f} to {high:.3f})",
            by_seed,
            f"{line['of_teacher'][0]:.3f}",
            tested,
            f"{line['rank']:.1f}",
            f"{line['p50_ms']:.1f} ms",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def orthogonality(entry: dict[str, Any]) -> str:
    """What 8 bits and a layer less change, and whether they change it differently for a student."""
    rows = ["| data | model | fp32 | 8-bit | one layer less, healed | both |", "|---|---|---|---|---|---|"]
    found = ["| data | student | compression | interaction, % (95 % interval) | verdict |", "|---|---|---|---|---|"]
    for name, result in entry["result"]["datasets"].items():
        by_model: dict[str, list[str]] = {}
        for line in result["table"]:
            change = "" if line["compression"] == "fp32" else f" ({100 * line['change']:+.1f} %)"
            by_model.setdefault(line["model"], []).append(f"{line['ndcg@10']:.4f}{change}")
        rows += [f"| {name} | {model} | " + " | ".join(cells) + " |" for model, cells in by_model.items()]
        for one in result["interactions"]:
            low, high = (100 * end for end in one["interval"])
            needed = f" (about {one['users_to_decide']} users would decide)" if one["users_to_decide"] else ""
            found.append(
                f"| {name} | {one['student']} | {one['compression']} | {100 * one['estimate']:+.1f} "
                f"({low:+.1f} to {high:+.1f}) | {one['verdict']}{needed} |"
            )
    return "\n".join([*rows, "", *found])


def distill_speed(entry: dict[str, Any]) -> str:
    """What the feature store saves, and a shallow student's steps beside a deep teacher's."""
    result = entry["result"]
    rows = ["| one run, in turns | ratio (10th to 90th percentile of rounds) |", "|---|---|"]
    for name, ratio in result["ratios"].items():
        rows.append(f"| {name} | {ratio['median']:.2f}x ({ratio['p10']:.2f} to {ratio['p90']:.2f}) |")
    note = (
        f"The store of {result['store_targets']} targets took {result['store_seconds']:.0f} s and "
        f"{result['store_bytes'] / 1e6:.0f} MB; the student's decoder has {100 * result['parameter_share']:.1f} % of "
        "the 30-layer teacher's parameters."
    )
    return "\n".join([*rows, "", note])


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "demo": demo,
    "training_speed": training_speed,
    "data_speed": data_speed,
    "baselines": baselines,
    "slmrec": slmrec,
    "slmrec_beauty": slmrec,
    "distill_speed": distill_speed,
}
RECORDED_AS = {"baselines": "baselines_ml_100k", "slmrec": "slmrec_ml_100k"}
"""Results whose file is not named as their table."""


def main() -> int:
    """Write or check every table that the README has a place for."""
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    made = text
    for name, table in TABLES.items():
        entry = json.loads((RESULTS / f"{RECORDED_AS.get(name, name)}.json").read_text(encoding="utf-8"))
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
