"""The tables of README.md and docs/, made from `benchmarks/results/`.

python benchmarks/readme.py           # write them
python benchmarks/readme.py --check   # exit 1 where they say something else
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from choosing import choosing, item_scaling
from scale_tables import bulk, scale, scale_bytes
from study_tables import controls, depth_study, learning_rates, prices, request_times, reviewers, slmrec

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


def orthogonality(entry: dict[str, Any]) -> str:
    """What 8 bits and a layer less change, and whether they change it differently for a student."""
    rows = ["| data | model | fp32 | 8-bit | one layer less, healed | both |", "|---|---|---|---|---|---|"]
    found = [
        "| data | student | compression | interaction, % (95 % interval over users) | by seed | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in entry["result"]["datasets"].items():
        by_model: dict[str, list[str]] = {}
        for line in result["table"]:
            change = "" if line["compression"] == "fp32" else f" ({100 * line['change']:+.1f} %)"
            by_model.setdefault(line["model"], []).append(f"{line['ndcg@10']:.4f}{change}")
        rows += [f"| {name} | {model} | " + " | ".join(cells) + " |" for model, cells in by_model.items()]
        for one in result["interactions"]:
            low, high = (100 * end for end in one["interval"])
            seeds = f", {one['seeds_to_decide']} seeds" if one.get("seeds_to_decide") else ""
            needed = f" (about {one['users_to_decide']} users{seeds} would decide)" if one["users_to_decide"] else ""
            each = ", ".join(f"{100 * estimate:+.1f}" for estimate in one.get("by_seed", []))
            found.append(
                f"| {name} | {one['student']} | {one['compression']} | {100 * one['estimate']:+.1f} "
                f"({low:+.1f} to {high:+.1f}) | {each} | {one['verdict']}{needed} |"
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


def eight_bit(entry: dict[str, Any]) -> str:
    """What 8 bits cost a trained model and what they give it."""
    rows = ["| | of fp32's NDCG@10, validation | test | first ten in common |", "|---|---|---|---|"]
    notes = []
    for model, result in entry["result"].items():
        for way, found in result["accuracy"].items():
            shares = [f"{v[0]:.3f} ({v[1]:.3f} to {v[2]:.3f})" for v in (found[k]["of_fp32"] for k in SPLITS)]
            rows.append(f"| {model}, {way} | {' | '.join(shares)} | {found['test']['overlap@10']:.3f} |")
        speed = [f"{size} {found['8-bit']['ratio']:.2f}x" for size, found in result["speed"].items()]
        alone = {way: found["users"] - found["bit_equal"] for way, found in result["company"].items()}
        users = result["company"]["fp32"]["users"]
        table = ", ".join(f"{name} {100 * share:.1f} %" for name, share in result["item_table"].items())
        notes.append(
            f"{model}: the decoder's layers take {result['decoder_bytes_of_fp32']:.3f} of the fp32 bytes; the 8-bit "
            f"graph is faster than the fp32 one by {', '.join(speed)}. Users whose scores depend on company, of "
            f"{users}: {', '.join(f'{way} {count}' for way, count in alone.items())}. 8-bit item table: {table}."
        )
    return "\n".join([*rows, "", "\n\n".join(notes)])


SPLITS = ("validation", "test")


def unseen_items(entry: dict[str, Any]) -> str:
    """How well items unseen in training are placed, among all items and among themselves."""
    result = entry["result"]
    asked = ("all items", "new items alone")
    rows = ["| vectors of new items | " + " | ".join(f"HR@10 among {name}" for name in asked) + " |", "|---|---|---|"]
    for way, found in result["rows"].items():
        values = [found[name]["hr@10"] for name in asked]
        cells = [f"{one['estimate']:.3f} ({one['low']:.3f} to {one['high']:.3f})" for one in values]
        rows.append(f"| {way} | {' | '.join(cells)} |")
    users = result["num_users"]["of new items"]
    return "\n".join(
        [*rows, "", f"{users} users whose last item is one of {result['num_new_items']} new ones; one seed."]
    )


def pruning(entry: dict[str, Any]) -> str:
    """Two layers fewer, by each criterion."""
    result = entry["result"]
    rows = [
        "| layers chosen by | NDCG@10 | of the whole teacher's (95 % interval) | layers kept |",
        "|---|---|---|---|",
    ]
    rows.append(f"| none is left out | {result['whole']['ndcg@10']:.4f} | 1.000 | all 8 |")
    for criterion, row in result["rows"].items():
        estimate, low, high = row["of_whole"]
        kept = "; ".join(", ".join(map(str, layers)) for layers in row["kept_layers"])
        rows.append(f"| {criterion} | {row['ndcg@10']:.4f} | {estimate:.3f} ({low:.3f} to {high:.3f}) | {kept} |")
    return "\n".join(rows)


def calibration_memory(entry: dict[str, Any]) -> str:
    """Memory of calibration by the number of histories."""
    parts = [
        f"{run['histories']} histories: {(run['peak_bytes'] - run['peak_bytes_before']) / 1e6:.0f} MB more than before"
        for run in entry["result"]["runs"]
    ]
    return f"Peak of resident memory while calibrating: {', '.join(parts)}."


def serving_peers(entry: dict[str, Any]) -> str:
    """The graphs against what else serves the same student."""
    result = entry["result"]
    sizes = list(result["ratios"])
    spread = "(10th to 90th percentile of rounds)"
    rows = [f"| | faster than eager, {sizes[0]} {spread} |", "|---|---|"]
    if len(sizes) > 1:
        rows = [f"| | faster than eager, {sizes[0]} {spread} | {sizes[1]} | first ten in common |", "|---|---|---|---|"]
    for name in result["ratios"][sizes[0]]:
        cells = [result["ratios"][size][name] for size in sizes]
        shown = " | ".join(f"{one['ratio']:.2f}x ({one['p10']:.2f} to {one['p90']:.2f})" for one in cells)
        same = "" if name.startswith("teacher") else f"{result['overlap@10'][name]:.3f}"
        rows.append(f"| {name} | {shown} | {same} |" if len(sizes) > 1 else f"| {name} | {shown} |")
    if "mean_length" in result:
        rows += ["", f"Histories of {result['mean_length']:.1f} items on average."]
    return "\n".join(rows)


def serving_ablation(entry: dict[str, Any]) -> str:
    """What each transformation gives alone, and what is lost without it."""
    result = entry["result"]
    sizes, names = list(result["ratios"]), [n for n in result["ratios"]["batch 1"] if not n.endswith("alone")]
    rows = [f"| | {' | '.join(sizes)} | {' | '.join(f'{size}, it alone' for size in sizes)} |"]
    rows.append("|---|" + "---|" * (2 * len(sizes)))
    for name in names:
        alone = f"{name.removeprefix('all but ')} alone"
        cells = [f"{result['ratios'][size][name]['ratio']:.2f}x" for size in sizes]
        cells += [
            f"{result['ratios'][size][alone]['ratio']:.2f}x" if alone in result["ratios"][size] else ""
            for size in sizes
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def process_memory(entry: dict[str, Any]) -> str:
    """Memory of a further process, and what sharing more of it costs."""
    result = entry["result"]
    rows = [
        "| | private | shared | all processes together | batch 1 | batch 32 |",
        "|---|---|---|---|---|---|",
    ]
    for precision in ("fp32", "8-bit"):
        for way in ("packed", "unpacked"):
            one = result[precision][way]
            speed = result[precision]["unpacked_speed"]
            shown = [f"{speed[size]['ratio']:.2f}x" if way == "unpacked" else "1" for size in speed]
            rows.append(
                f"| {precision}, {way} | {one['private_mb'][0]:.0f} MB | {one['shared_mb'][0]:.0f} MB "
                f"| {one['proportional_mb']:.0f} MB | {' | '.join(shown)} |"
            )
    return "\n".join(
        [
            *rows, "",
            f"{result['processes']} processes on one graph of {result['num_items']:,} items, whose lists are one "
            "(`python benchmarks/process_memory.py`). Item tables are shared either way.",
        ]
    )  # fmt: skip


def floor(entry: dict[str, Any]) -> str:
    """Arithmetic, bytes and floor of one student's artefacts."""
    result = entry["result"]
    best = result["ceilings"]
    rows = ["| | billion operations | MB | floor by | measured over floor |", "|---|---|---|---|---|"]
    for name, by_batch in result["rows"].items():
        for batch, one in by_batch.items():
            operations = (one["fp32_operations"] + one["int8_operations"]) / 1e9
            rows.append(
                f"| {name}, {batch.replace('_', ' ')} | {operations:.3f} | {one['num_bytes'] / 1e6:.1f} "
                f"| {one['bound']} | {one['measured_over_floor']:.2f} |"
            )
    note = (
        f"At best this machine did {best['fp32_operations_s'] / 1e9:,.0f} billion operations a second in fp32, "
        f"{best['int8_operations_s'] / 1e9:,.0f} in 8 bits, and read {best['read_bytes_s'] / 1e9:.0f} GB a second "
        "(`python benchmarks/floor.py`)."
    )
    return "\n".join([*rows, "", note])


def engines(entry: dict[str, Any]) -> str:
    """Engines built without a GPU, and accuracy as placed."""
    rows = [
        "| precision | device | items | engine | built in | of the fp32 student's NDCG@10: validation | test |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in entry["result"]["rows"]:
        kept = [row["kept"].get(split) for split in SPLITS]
        shown = [f"{one[0]:.3f} ({one[1]:.3f} to {one[2]:.3f})" if one else "" for one in kept]
        ranges = f", {row['ranges']}" if row["rounded"] and row["ranges"] else ""
        rows.append(
            f"| {row['precision']}{ranges} | {row['device']} | {row['num_items']:,} "
            f"| {row['size_bytes'] / 1e6:.0f} MB | {row['build_s']:.1f} s | {' | '.join(shown)} |"
        )
    return "\n".join(rows)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "demo": demo,
    "training_speed": training_speed,
    "data_speed": data_speed,
    "baselines": baselines,
    "slmrec": slmrec,
    "slmrec_beauty": slmrec,
    "slmrec_ml_1m": slmrec,
    "slmrec_beauty_terms": slmrec,
    "slmrec_ml_1m_terms": slmrec,
    "learning_rates_ml_1m": learning_rates,
    "request_times_beauty": request_times,
    "request_times_ml_1m": request_times,
    "depth_study": depth_study,
    "reviewers": reviewers,
    "prices": prices,
    "controls_ml_100k": controls,
    "distill_speed": distill_speed,
    "eight_bit_ml_100k": eight_bit,
    "eight_bit_beauty": eight_bit,
    "pruning_ml_100k": pruning,
    "unseen_items_ml_100k": unseen_items,
    "calibration_memory": calibration_memory,
    "orthogonality": orthogonality,
    "serving_peers": serving_peers,
    "serving_peers_other": serving_peers,
    "serving_peers_lengths": serving_peers,
    "serving_ablation": serving_ablation,
    "process_memory": process_memory,
    "floor": floor,
    "engines": engines,
    "bulk": bulk,
    "scale": scale,
    "scale_bytes": scale_bytes,
    "choosing": choosing,
    "item_scaling": item_scaling,
}
RECORDED_AS = {
    "baselines": "baselines_ml_100k", "slmrec": "slmrec_ml_100k", "scale_bytes": "scale", "choosing": "orthogonality",
}  # fmt: skip
"""Results whose file is not named as their table."""


def main() -> int:
    """Write or check every table, in the one page that has a place for it."""
    pages = {path: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]}
    made = dict(pages)
    for name, table in TABLES.items():
        entry = json.loads((RESULTS / f"{RECORDED_AS.get(name, name)}.json").read_text(encoding="utf-8"))
        body = f"<!-- {name} -->\n{table(entry)}\n<!-- /{name} -->"
        found = 0
        for path, text in made.items():
            pattern = rf"<!-- {name} -->.*?<!-- /{name} -->"
            made[path], places = re.subn(pattern, lambda _, b=body: b, text, flags=re.DOTALL)
            found += places
        if found != 1:
            print(f"README.md and docs/ have {found} places for the table {name!r}")
            return 1
    changed = [path for path, text in made.items() if text != pages[path]]
    if "--check" in sys.argv:
        for path in changed:
            print(f"{path.name} differs from benchmarks/results: run python benchmarks/readme.py")
        return int(bool(changed))
    for path in changed:
        path.write_text(made[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
