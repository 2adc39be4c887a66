"""report.html: one self-contained page; everything in it can be read again from the JSON it embeds."""

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from slmrec.report import (
    Example,
    Report,
    bytes_text,
    dataset_line,
    floor_lines,
    largest_batch,
    load_text,
    machine_line,
    number,
    over_floor,
    protocol_of,
    versions_line,
)
from slmrec.report_page import SCRIPT, STYLE
from slmrec.report_plots import Point, Series, curve_plot, shape, thinned, tradeoff_plot

KINDS = ("checkpoint", "graph", "engine", "bundle")
NOT_TERMS = {"step", "epoch", "gradient_norm", "learning_rate", "seconds"}
TERM_TITLES = {
    "loss": "Loss, all terms",
    "ce": "Cross-entropy",
    "direction": "Direction, by block",
    "magnitude": "Magnitude, by block",
    "supervision": "Supervision, by block",
    "validation_ndcg@10": "NDCG@10 on validation",
}


def to_html(report: Report) -> str:
    """Write the whole page."""
    benchmark = report.benchmark
    sections = [
        _header(benchmark),
        _plot(benchmark["rows"]),
        _recommended(benchmark),
        _table(benchmark),
        _details(benchmark["rows"]),
        _example(report.example),
        _curves(report.curves),
        _provenance(benchmark),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Accuracy against latency</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + f'\n</main>\n<script type="application/json" id="benchmark">{script_json(benchmark)}</script>\n'
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def script_json(value: object) -> str:
    r"""JSON that cannot end the script element it stands in.

    >>> script_json({"name": "</script>"})
    '{"name": "\\u003c/script\\u003e"}'
    """
    text = json.dumps(value, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def term_groups(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Series]]:
    """Small multiples of a training: one per term, blocks of a term together, validation last."""
    points: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        for name, value in record.items():
            if name not in NOT_TERMS and isinstance(value, int | float):
                points.setdefault(name, []).append((float(record["step"]), float(value)))
    terms = [name for name in points if name != "loss" and not name.startswith("validation")]
    if len(terms) == 1:
        points.pop("loss", None)
    groups: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for name in sorted(points, key=lambda name: name.startswith("validation")):
        block = re.fullmatch(r"(.+)_block_(\d+)", name)
        group, index = (block.group(1), int(block.group(2))) if block else (name, 0)
        groups.setdefault(group, {})[index] = points[name]
    return {group: _series(blocks) for group, blocks in groups.items()}


def _series(blocks: Mapping[int, list[tuple[float, float]]]) -> list[Series]:
    """Deeper blocks are drawn stronger."""
    ordered = sorted(blocks)
    shades = [1.0 - 0.55 * (len(ordered) - 1 - place) / max(1, len(ordered) - 1) for place in range(len(ordered))]
    return [Series(str(index), thinned(blocks[index]), shade) for index, shade in zip(ordered, shades, strict=True)]


def _header(benchmark: Mapping[str, Any]) -> str:
    baseline = next(row for row in benchmark["rows"] if row["name"] == benchmark["baseline"])
    others = [row for row in benchmark["rows"] if row is not baseline]
    made_from_it = [row for row in others if baseline["stages"][-1] in row["stages"][:-1]]
    best = sorted((_finding(row, baseline["name"]) for row in made_from_it or others), reverse=True)[:1]
    finding = f'<p class="finding">{best[0][1]}</p>' if best else ""
    return (
        f'<header><p class="eyebrow">slmcompress benchmark · {escape(str(benchmark["created"])[:10])}</p>'
        f"<h1>Accuracy against latency</h1>{finding}</header>"
    )


def _finding(row: Mapping[str, Any], baseline: str) -> tuple[float, str]:
    """Give the speed-up, and a sentence about it."""
    speedup = row["ratios"]["speedup_batch_1"]
    ratio = row["ratios"].get("ndcg@10")
    kept = ""
    if ratio is not None and None not in ratio.values():
        kept = (
            f" and keeps <b>{100 * ratio['ratio']:.1f} %</b> of its NDCG@10 "
            f"(95 % interval {100 * ratio['low']:.1f} to {100 * ratio['high']:.1f} %)"
        )
    text = (
        f"<b>{escape(row['name'])}</b> answers <b>{number(speedup['median'])}×</b> as fast as "
        f"<b>{escape(baseline)}</b>{kept}."
    )
    return speedup["median"], text


def _plot(rows: Sequence[Mapping[str, Any]]) -> str:
    points = [_point(row) for row in rows if row["accuracy"] is not None]
    if not points:
        return ""
    kinds = [kind for kind in KINDS if any(point.kind == kind for point in points)]
    legend = "".join(f"<span>{_swatch(kind)} {kind}</span>" for kind in kinds)
    return (
        "<section><h2>Better is up and to the left</h2><figure>"
        + tradeoff_plot(points, width=760, height=400, css_class="wide")
        + tradeoff_plot(points, width=360, height=360, css_class="narrow")
        + f'<figcaption><span class="legend">{legend}<span><i class="dash"></i> Pareto front</span></span> '
        "Upright: 95 % interval over users. Level, rightwards: p50 to p90 of the latency."
        "</figcaption></figure></section>"
    )


def _point(row: Mapping[str, Any]) -> Point:
    latency, accuracy = row["latency"]["batch_1"], row["accuracy"]
    low, high = accuracy["intervals"]["ndcg@10"]
    p50 = latency["p50_ms"]
    kind = row["kind"] if row["kind"] in KINDS else "checkpoint"
    return Point(row["name"], kind, p50, latency.get("p90_ms", p50), accuracy["ndcg@10"], low, high)


def _swatch(kind: str) -> str:
    return f'<svg class="swatch marker {kind}" viewBox="0 0 16 16" aria-hidden="true">{shape(kind, 8, 8)}</svg>'


def _recommended(benchmark: Mapping[str, Any]) -> str:
    chosen = benchmark.get("recommended")
    if chosen is None:
        return ""
    name = f"<b>{escape(chosen['name'])}</b>" if chosen["name"] else "None of these"
    loads = [
        f"<br>{escape(row['name'])} {escape(load_text(row['load']))}." for row in benchmark["rows"] if row.get("load")
    ]
    return (
        f'<section><h2>To serve</h2><p class="recommended">{name}: {escape(chosen["reason"])}.</p>'
        f'<p class="note">{"".join(loads).removeprefix("<br>")}</p></section>'
    )


def _table(benchmark: Mapping[str, Any]) -> str:
    columns = (
        "Artefact", "NDCG@10", "Kept", "HR@10", "p50 ms", "p99 ms", "Speed-up", "Users/s", "Over floor", "Size",
        "Memory",
    )  # fmt: skip
    head = "".join(
        f'<th scope="col" aria-sort="none"><button type="button">{column}</button></th>' for column in columns
    )
    batch = largest_batch(benchmark)
    body = "".join(f"<tr>{_row(row, batch)}</tr>" for row in benchmark["rows"])
    return (
        '<section><h2>The figures</h2><div class="scroll" role="region" aria-label="Benchmark table" tabindex="0">'
        f'<table class="figures"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="note">{escape(protocol_of(benchmark))}. Small figures are 95 % intervals, for speed-ups the 10th '
        f"to 90th percentile of paired rounds. Kept and speed-up are relative to {escape(benchmark['baseline'])}. "
        f"Latency of one user a request, {benchmark['settings']['rounds']} interleaved rounds; users/s in "
        f"batches of {batch}. Memory is the peak of a process of its own. Over floor: how many times the time that its "
        "arithmetic and bytes take at this machine's best. A column's name sorts by it."
        + "".join(f"<br>{escape(line)}." for line in floor_lines(benchmark))
        + "</p></section>"
    )


def _row(row: Mapping[str, Any], batch: int) -> str:
    latency, ratios = row["latency"]["batch_1"], row["ratios"]
    kind = row["kind"] if row["kind"] in KINDS else "checkpoint"
    speedup, memory = ratios["speedup_batch_1"], row["peak_memory_bytes"]
    throughput = row["throughput"].get(f"batch_{batch}")
    cells = [
        f'<th scope="row" data-value="{escape(row["name"])}">{_swatch(kind)}<span>{escape(row["name"])}'
        f"<small>{escape(row['kind'])}</small></span></th>",
        _metric_cell(row, "ndcg@10"),
        _kept_cell(row),
        _metric_cell(row, "hr@10"),
        _cell(latency.get("p50_ms"), number(latency.get("p50_ms"))),
        _cell(latency.get("p99_ms"), number(latency.get("p99_ms"))),
        _cell(
            speedup["median"], f"{number(speedup['median'])}×", f"{number(speedup['p10'])} – {number(speedup['p90'])}"
        ),
        _cell(throughput, number(throughput)),
        _cell(over_floor(row), number(over_floor(row))),
        _cell(row["size_bytes"], bytes_text(row["size_bytes"])),
        _cell(memory, bytes_text(memory)),
    ]
    return "".join(cells)


def _cell(value: float | None, text: str, small: str = "") -> str:
    note = f"<small>{small}</small>" if small else ""
    return f'<td data-value="{"" if value is None else value}">{text}{note}</td>'


def _metric_cell(row: Mapping[str, Any], metric: str) -> str:
    accuracy = row["accuracy"]
    if accuracy is None:
        return _cell(None, "–")
    low, high = accuracy["intervals"][metric]
    return _cell(accuracy[metric], f"{accuracy[metric]:.4f}", f"{low:.4f} – {high:.4f}")


def _kept_cell(row: Mapping[str, Any]) -> str:
    ratio = row["ratios"].get("ndcg@10")
    if ratio is None:
        return _cell(None, "–")
    if row["comparison"] is None:
        return _cell(ratio["ratio"], "baseline")
    ends = (ratio["low"], ratio["high"])
    small = "" if None in ends else f"{100 * ends[0]:.1f} – {100 * ends[1]:.1f} %"
    return _cell(ratio["ratio"], f"{100 * ratio['ratio']:.1f} %", small)


def _details(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every number of the JSON, a line each and a column for each artefact."""
    flat = [
        _flatten("", {name: row[name] for name in row if name not in ("name", "artifact", "hash", "stages")})
        for row in rows
    ]
    names = list(dict.fromkeys(name for row in flat for name in row))
    head = "".join(f'<th scope="col">{escape(row["name"])}</th>' for row in rows)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{escape(_plain(row.get(name)))}</td>" for row in flat)
        + "</tr>"
        for name in names
    )
    return (
        "<details><summary>Every measured value</summary>"
        '<div class="scroll" role="region" aria-label="Every measured value" tabindex="0">'
        f'<table class="all"><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div></details>'
    )


def _flatten(prefix: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        nested = [_flatten(f"{prefix}.{key}" if prefix else key, child) for key, child in value.items()]
        return {name: leaf for part in nested for name, leaf in part.items()}
    return {} if value is None else {prefix: value}


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " – ".join(_plain(part) for part in value)
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


def _example(example: Example | None) -> str:
    if example is None:
        return ""
    history = "".join(f"<li>{escape(title)}</li>" for title in example.history)
    lists = "".join(
        f"<div><h3>{escape(name)}</h3><ol>"
        + "".join(f"<li{' class=hit' if item.is_target else ''}>{escape(item.title)}</li>" for item in items)
        + "</ol></div>"
        for name, items in example.lists.items()
    )
    return (
        f"<section><h2>One user</h2><p>User {escape(example.user)}, drawn by the seed and not picked by hand: the "
        f"newest {len(example.history)} of {example.num_history} items, and what each artefact recommends next. What "
        f"came next was <b>{escape(example.target)}</b>; a tick marks it where a list holds it.</p>"
        f'<div class="lists"><div class="past"><h3>history</h3><ul>{history}</ul></div>{lists}</div></section>'
    )


def _curves(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    parts = []
    for name, records in curves.items():
        plots = [
            f"<figure>{curve_plot(TERM_TITLES.get(term, term.replace('_', ' ')), series)}</figure>"
            for term, series in term_groups(records).items()
        ]
        if plots:
            parts.append(f'<h3>{escape(name)}</h3><div class="multiples">{"".join(plots)}</div>')
    if not parts:
        return ""
    return (
        "<section><h2>Training</h2><p>Terms as they enter the loss, over training steps. In a distillation the student "
        "is held to its teacher block by block; lines are numbered by block, and deeper blocks are drawn stronger.</p>"
        + "".join(parts)
        + "</section>"
    )


def _provenance(benchmark: Mapping[str, Any]) -> str:
    machine, dataset = benchmark["machine"], benchmark["dataset"]
    facts = {
        "Machine": machine_line(machine),
        "Processor features": ", ".join(machine.get("cpu_flags", [])) or "none of those that matter for 8 bits",
        "Versions": versions_line(machine),
        "Dataset": dataset_line(dataset),
        "Settings": ", ".join(f"{name} {value}" for name, value in benchmark["settings"].items()),
    }
    listed = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    commands = "\n".join(benchmark["commands"])
    repeat = f"<h3>How to repeat it</h3><pre><code>{escape(commands)}</code></pre>" if commands else ""
    return (
        f"<section><h2>Where this comes from</h2><dl>{listed}</dl>{repeat}"
        '<p class="note">Absolute times belong to this machine; ratios travel better. The numbers are embedded in this '
        "page as JSON (element <code>benchmark</code>) and lie beside it in benchmark.json.</p></section>"
    )
