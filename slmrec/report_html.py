"""report.html: one self-contained page; what was measured can be read again from the JSON it embeds."""

import base64
import hashlib
import json
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
from slmrec.report_plots import Point, shape, tradeoff_plot
from slmrec.report_sections import (
    batches_section,
    importance_section,
    scroll,
    sensitivity_section,
    stages_section,
    training_section,
)
from slmrec.report_tables import settings_text

KINDS = ("checkpoint", "graph", "engine", "bundle")
SCRIPT_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{SCRIPT_HASH}'"
"""Nothing is fetched, and no script but the page's own runs, should a name ever get through as one."""


def to_html(report: Report) -> str:
    """Write the whole page."""
    benchmark = report.benchmark
    sections = [
        _header(benchmark),
        _plot(benchmark["rows"]),
        _recommended(benchmark),
        _table(benchmark),
        _details(benchmark["rows"]),
        stages_section(benchmark),
        batches_section(benchmark),
        _example(report.example),
        training_section(report.curves),
        sensitivity_section(report.analyses.get("sensitivity")),
        importance_section(report.analyses.get("importance")),
        _provenance(benchmark),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Accuracy against latency</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + '\n</main>\n<div class="tip" role="tooltip" hidden></div>\n'
        f'<script type="application/json" id="benchmark">{script_json(benchmark)}</script>\n'
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def script_json(value: object) -> str:
    r"""JSON that cannot end the script element it stands in.

    >>> script_json({"name": "</script>"})
    '{"name": "\\u003c/script\\u003e"}'
    """
    text = json.dumps(value, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _header(benchmark: Mapping[str, Any]) -> str:
    baseline = next(row for row in benchmark["rows"] if row["name"] == benchmark["baseline"])
    others = [row for row in benchmark["rows"] if row is not baseline]
    made_from_it = [row for row in others if baseline["stages"][-1] in row["stages"][:-1]]
    best = sorted((_finding(row, baseline["name"]) for row in made_from_it or others), reverse=True)[:1]
    finding = f'<p class="finding">{best[0][1]}</p>' if best else ""
    return (
        f'<header><p class="eyebrow">slmcompress benchmark · {escape(str(benchmark["created"])[:10])}</p>'
        f"<h1>Accuracy against latency</h1>{finding}<p>{escape(_setting(benchmark))}</p></header>"
    )


def _setting(benchmark: Mapping[str, Any]) -> str:
    """What the reader looks at: models that guess the next item, of whom, and where they were measured."""
    dataset, machine = benchmark["dataset"], benchmark["machine"]
    counts = [f"{dataset[f'num_{of}']:,} {of}" for of in ("users", "items", "interactions") if f"num_{of}" in dataset]
    where = machine.get("gpu") or f"{machine.get('usable_cores')} cores of {machine.get('cpu')}"
    return (
        "Each of these models recommends what a user takes next. All answered the same test users in one run on "
        + where
        + (f"; the data: {', '.join(counts)}." if counts else ".")
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
        "<section><h2>The figures</h2>"
        + scroll(
            "Benchmark table",
            f'<table class="figures"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>',
        )
        + f'<p class="note">{escape(protocol_of(benchmark))}. HR@10: the share of users whose next item is among the '
        "first ten; NDCG@10: the same, counting less the further down it stands. Small figures are 95 % intervals, for "
        "speed-ups the 10th to 90th percentile of paired rounds. Kept and speed-up are relative to "
        f"{escape(benchmark['baseline'])}. Latency of one user a request, {benchmark['settings']['rounds']} "
        f"interleaved rounds; users/s in batches of {batch}. Memory is the peak of a process of its own. Over "
        "floor: how many times the time that its arithmetic and bytes take at the machine's best"
        + "".join(f" ({escape(line)})" for line in floor_lines(benchmark)[:1])
        + '.</p><p class="note screen">A column\'s name sorts by it.</p></section>'
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
        + scroll(
            "Every measured value",
            f'<table class="all"><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>',
        )
        + "</details>"
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


def _provenance(benchmark: Mapping[str, Any]) -> str:
    machine, dataset = benchmark["machine"], benchmark["dataset"]
    facts = {
        "Machine": machine_line(machine),
        "Processor features": ", ".join(machine.get("cpu_flags", [])) or "none of those that matter for 8 bits",
        "Versions": versions_line(machine),
        "Dataset": dataset_line(dataset),
        "Settings": settings_text(benchmark["settings"]),
    }
    listed = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    commands = "\n".join(benchmark["commands"])
    repeat = f"<h3>How to repeat it</h3><pre><code>{escape(commands)}</code></pre>" if commands else ""
    return (
        f"<section><h2>Where this comes from</h2><dl>{listed}</dl>{repeat}"
        '<p class="note">Absolute times belong to this machine; ratios travel better. The numbers are embedded in '
        "this page as JSON (element <code>benchmark</code>) and lie beside it in benchmark.json, benchmark.md and "
        "CSV files. <code>slmcompress compare OLD NEW</code> tells what a repetition changed.</p></section>"
    )
