"""Tables of SLMRec and its studies, for docs/method.md."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NAMES = {
    "teacher": "trained teacher, 8 layers",
    "CE": "4 layers, CE",
    "SLMRec": "4 layers, SLMRec",
    "untrained teacher": "4 layers, SLMRec from an untrained teacher",
    "CE, the same start": "4 layers, CE from the untrained teacher's layers",
    "online, features": "4 layers, online from an untrained teacher, features",
    "online, logits": "4 layers, online from an untrained teacher, logits",
    "online, trained teacher": "4 layers, online from the trained teacher, features",
    "no titles": "items by their ids alone",
    "frozen table": "SASRec's item vectors not trained on",
    "random decoder": "layers never pretrained",
}
"""Rows of reviewers.py and controls.py in full."""


def slmrec(entry: dict[str, Any]) -> str:
    """SLMRec's rows on one data set, means over seeds; the paired test is against the student trained by CE alone."""
    timed = entry["result"]["rows"][0]["p50_ms"] is not None
    rows = [
        "| | HR@1 | HR@10 | NDCG@10 (95 % interval over users) | by seed | of the teacher's | against CE, p (Holm) "
        "| mean rank |" + timed * " p50, batch 1 |"
    ]
    rows += ["|---|---|---|---|---|---|---|---|" + timed * "---|"]
    for line in entry["result"]["rows"]:
        low, high = line["ndcg@10_interval"]
        by_seed = ", ".join(f"{value:.4f}" for value in line["ndcg@10_by_seed"])
        tested = "" if line["p"] is None else f"{line['difference']['estimate']:+.4f}, {line['p_holm']:.2g}"
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
            *([f"{line['p50_ms']:.1f} ms"] if timed else []),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    if known := entry["result"].get("teacher_against_sasrec"):
        rows += ["", f"The teacher against SASRec-CE: {known['estimate']:+.4f} ({known['low']:+.4f} to "
                     f"{known['high']:+.4f}), p = {known['p']:.2g}."]  # fmt: skip
    for line in entry["result"].get("shared_table", []):
        if line["row"].startswith("SLMRec + list"):
            low, high = line["difference"]["low"], line["difference"]["high"]
            rows += ["", f"{line['row']} against CE + shared table: {line['difference']['estimate']:+.4f} "
                         f"({low:+.4f} to {high:+.4f}), p = {line['p_holm']:.2g} after Holm."]  # fmt: skip
    data, seeds = entry["result"]["dataset"], len(entry["result"]["rows"][0]["ndcg@10_by_seed"])
    tied = (
        f", of whom {data['num_tied_targets']} have their last two events at once" if "num_tied_targets" in data else ""
    )
    note = (
        f"Test split, {data['num_users']:,} users{tied}, full catalogue, past excluded; {counted(seeds)}; SmolLM2-135M "
        "de-quantized from Q4_1."
    )
    return "\n".join([*rows, "", note])


def counted(seeds: int) -> str:
    """How many seeds, in words of a caption."""
    return f"{seeds} seeds" if seeds > 1 else "one seed"


def depth_study(entry: dict[str, Any]) -> str:
    """Teachers trained at a depth, beside the deepest one read at that depth."""
    result = entry["result"]
    seeds = len(result["trained"][0]["test_ndcg@10"])
    by_seed = seeds > 1
    head = ["layers", "trained at this depth (95 % interval over users)", *["by seed"] * by_seed]
    head += [f"the deepest, read there {way}" for way in result["exits"]]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for line in result["trained"]:
        layers, values = line["num_layers"], line["test_ndcg@10"]
        low, high = line["interval"]
        cells = [str(layers), f"{np.mean(values):.4f} ({low:.3f} to {high:.3f})"]
        cells += [", ".join(f"{value:.4f}" for value in values)] * by_seed
        cells += [f"{exits[layers - 1]:.4f}" for exits in result["exits"].values()]
        rows.append(f"| {' | '.join(cells)} |")
    pair = result["closest_to_apart"]
    note = (
        f"SASRec-CE: {result['sasrec']:.4f}; {counted(seeds)}, exits those of the first. Of all pairs of depths "
        f"{pair['num_layers'][0]} and {pair['num_layers'][1]} are the closest to being told apart, "
        f"p = {pair['p_holm']:.2g} after Holm."
    )
    return "\n".join([*rows, "", note])


def reviewers(entry: dict[str, Any]) -> str:
    """Students of other teachers, of one layer and trained online; and how alike student and teacher are inside."""
    result = entry["result"]
    rows = _accuracies(result["rows"], "CE")
    asked = ["| | against | difference (95 % interval) | p (Holm) |", "|---|---|---|---|"]
    for one in result["answers"]:
        names = " | ".join(NAMES.get(one[side], one[side]) for side in ("row", "against"))
        found = one["difference"]
        shown = f"{found['estimate']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})"
        asked.append(f"| {names} | {shown} | {one['p_holm']:.2g} |")
    inside = result["likeness_by_seed"]
    alike = [
        "| student | cosine to the trained teacher, by block | linear CKA, by block | first ten in common |",
        "|---|---|---|---|",
    ]
    for row in inside[0]:
        cosine, cka = (np.mean([seed[row][name] for seed in inside], axis=0) for name in ("cosine", "linear_cka"))
        common = np.mean([seed[row]["overlap@10"] for seed in inside])
        blocks = [", ".join(f"{value:.2f}" for value in values) for values in (cosine, cka)]
        alike.append(f"| {NAMES.get(row, row)} | {' | '.join(blocks)} | {common:.3f} |")
    return "\n".join([*rows, "", *asked, "", *alike])


def controls(entry: dict[str, Any]) -> str:
    """The teacher without one of its parts each."""
    return "\n".join(_accuracies(entry["result"]["rows"], "the teacher"))


def _accuracies(lines: Sequence[Mapping[str, Any]], reference: str) -> list[str]:
    """What `cells.summarize` says of each row, tested against one of them."""
    rows = [
        f"| | NDCG@10 (95 % interval over users) | by seed | of the teacher's | against {reference}, p (Holm) |",
        "|---|---|---|---|---|",
    ]
    for line in lines:
        low, high = line["ndcg@10_interval"]
        by_seed = ", ".join(f"{value:.4f}" for value in line["ndcg@10_by_seed"])
        tested = "" if line["p"] is None else f"{line['difference']['estimate']:+.4f}, {line['p_holm']:.2g}"
        name, ndcg_10 = NAMES.get(line["row"], line["row"]), line["test"]["ndcg@10"]
        rows.append(
            f"| {name} | {ndcg_10:.4f} ({low:.3f} to {high:.3f}) | {by_seed} | {line['of_teacher'][0]:.3f} | {tested} |"
        )
    return rows


def learning_rates(entry: dict[str, Any]) -> str:
    """Students at several learning rates, and what each loss has at the one that validation chooses."""
    result = entry["result"]
    rows = [
        "| | learning rate, decoder | NDCG@10 on validation | on test | against CE at its own |",
        "|---|---|---|---|---|",
    ]
    for line in result["rows"]:
        tested = ""
        if found := line.get("difference"):
            tested = f"{found['estimate']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f}), p = {line['p']:.2g}"
        name = f"{line['row']}, chosen" if line["chosen"] else line["row"]
        rate = result["rates"]["learning_rate"] * line["factor"]
        rows.append(f"| {name} | {rate:.2g} | {line['validation']:.4f} | {line['test']:.4f} | {tested} |")
    note = (
        f"Test split, {result['dataset']['num_users']:,} users; {counted(result['rows'][0]['seeds'])}; p not corrected."
    )
    return "\n".join([*rows, "", note])


def prices(entry: dict[str, Any]) -> str:
    """Price of a million lists at the best measured rate."""
    rows = ["| | users/s, at best | a million lists | times cheaper than the teacher's graph |", "|---|---|---|---|"]
    whole = entry["result"]["rows"]["teacher, graph"]["price_per_million"]
    for name, row in entry["result"]["rows"].items():
        price = row["price_per_million"]
        rate = max(row["users_per_second"].values())
        rows.append(f"| {name} | {rate:.0f} | {price:.3f} | {whole / price:.1f} |")
    machine, price = entry["machine"], entry["result"]["hour_price"]
    note = f"{machine['usable_cores']} cores of an {machine['cpu']} at an assumed {price:.2f} an hour."
    return "\n".join([*rows, "", note])


def request_times(entry: dict[str, Any]) -> str:
    """Time of a request by the shapes of a table's rows."""
    times = ", ".join(f"{row} {value:.1f} ms" for row, value in entry["result"]["p50_ms"].items())
    return f"One request by PyTorch on {entry['machine']['usable_cores']} cores, median, models in turn: {times}."
