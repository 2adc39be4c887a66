"""Sections of report.html beside the measurements: stages, batches, training, sensitivity, importance."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from slmrec.report import number
from slmrec.report_plots import Series, curve_plot, rate_plot, thinned
from slmrec.report_tables import batch_rates, is_term, stage_table

TERM_TITLES = {
    "loss": "Loss, all terms",
    "ce": "Cross-entropy",
    "direction": "Direction, by block",
    "magnitude": "Magnitude, by block",
    "supervision": "Supervision, by block",
    "validation_ndcg@10": "NDCG@10 on validation",
}
TITLE_LENGTH = 34
"""Characters of a name that fit above a small multiple."""


def scroll(label: str, table: str) -> str:
    """A table that may be wider than the screen, in a region that the keyboard can scroll."""
    return f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0">{table}</div>'


def stages_section(benchmark: Mapping[str, Any]) -> str:
    """What was done, in order, and what each step gained and cost."""
    table = stage_table(benchmark)
    if not table.rows:
        return ""
    head = "".join(
        f'<th scope="col">{name}</th>' for name in ("Stage", "Times as fast", "NDCG@10 kept", "Size", "Settings")
    )
    body = "".join(_stage_row(row) for row in table.rows)
    return (
        "<section><h2>Stage by stage</h2><p>Every step that led to these artefacts, in order. A measured artefact is "
        "set against the nearest one measured before it, from which it was made.</p>"
        + scroll("Stages", f'<table class="stages"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>')
        + "</section>"
    )


def _stage_row(row: Sequence[Any]) -> str:
    stage, artefact, against, faster, kept, size, settings, digest = row
    made = f"<small><b>{escape(artefact)}</b></small>" if artefact else "<small>not measured here</small>"
    over = f"<small>of {escape(against)}</small>" if against else ""
    cells = [
        f"{number(faster)}×{over}" if faster is not None else "",
        f"{100 * kept:.1f} %{over}" if kept is not None else "",
        f"{number(size)}×{over}" if size is not None else "",
    ]
    return (
        f'<tr><th scope="row">{escape(stage)}{made}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + f"<td>{escape(settings)} <code>{escape(digest)}</code></td></tr>"
    )


def batches_section(benchmark: Mapping[str, Any]) -> str:
    """A small multiple of users a second per artefact."""
    rates = {row["name"]: batch_rates(row) for row in benchmark["rows"]}
    panels = [f"<figure>{rate_plot(name, rates, _short(name))}</figure>" for name in rates]
    return (
        "<section><h2>More users at once</h2><p>Users answered a second over how many are asked for in one request, "
        "both axes logarithmic. The other artefacts are faint in the background.</p>"
        f'<div class="multiples">{"".join(panels)}</div></section>'
    )


def _short(name: str) -> str:
    return name if len(name) <= TITLE_LENGTH else f"{name[: TITLE_LENGTH - 1]}…"


def training_section(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Small multiples of every training, one per term of the loss."""
    parts = []
    for name, records in curves.items():
        plots = [
            f"<figure>{curve_plot(_short(TERM_TITLES.get(term, term.replace('_', ' '))), series)}</figure>"
            for term, series in term_groups(records).items()
        ]
        if plots:
            parts.append(f'<h3>{escape(name)}</h3><div class="multiples">{"".join(plots)}</div>')
    if not parts:
        return ""
    return (
        "<section><h2>Training and distillation</h2><p>Terms as they enter the loss, over training steps. In a "
        "distillation the student is held to its teacher block by block; lines are numbered by block, and deeper "
        "blocks are drawn stronger. A healed pruning is such a distillation too.</p>" + "".join(parts) + "</section>"
    )


def term_groups(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Series]]:
    """Small multiples of a training: one per term, blocks of a term together, validation last."""
    points: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        for name, value in record.items():
            if is_term(name, value):
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


def sensitivity_section(found: Mapping[str, Any] | None) -> str:
    """How much of the first ten changes when one layer alone is 8-bit: blocks down, projections across."""
    if not found:
        return ""
    cells: dict[str, dict[str, float]] = {}
    for one in found["layers"]:
        place = re.fullmatch(r"(?:.*\.)?(\d+)\.(?:.*\.)?(\w+)", one["layer"])
        block, part = (place.group(1), place.group(2)) if place else (one["layer"], "")
        cells.setdefault(block, {})[part] = 100 * one["overlap_loss"]
    blocks = sorted(cells, key=lambda block: (not block.isdigit(), int(block) if block.isdigit() else 0, block))
    parts = list(dict.fromkeys(part for block in blocks for part in sorted(cells[block])))
    values = [[cells[block].get(part) for part in parts] for block in blocks]
    return (
        f"<section><h2>Sensitivity to 8 bits</h2><p>Of each user's first ten recommendations, the percentage that "
        f"changes when one layer of <b>{escape(found['of'])}</b> alone is made 8-bit; {found['num_users']:,} "
        f"{escape(found['split'])} users.</p>"
        + heat_table("Sensitivity", "block", blocks, parts, values)
        + "</section>"
    )


def importance_section(found: Mapping[str, Any] | None) -> str:
    """What each layer does to the user vector and to accuracy, and the heatmap of all stretches."""
    if not found:
        return ""
    names = [str(one["layer"]) for one in found["layers"]]
    columns = {"angle turned": "angular", "block influence": "influence", "NDCG@10 lost without it, %": "damage"}
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in ("layer", *columns))
    body = "".join(
        f'<tr><th scope="row">{one["layer"]}</th><td>{one["angular"]:.3f}</td><td>{one["influence"]:.3f}</td>'
        f"<td>{100 * one['damage']:.1f}</td></tr>"
        for one in found["layers"]
    )
    lengths = [str(size) for size in range(1, len(names) + 1)]
    stretches = heat_table("Stretches of layers", "first layer", names, lengths, found["angular_distance"])
    return (
        f"<section><h2>Importance of layers</h2><p>How far each layer of <b>{escape(found['of'])}</b> turns the user "
        f"vector (angle over π), and what leaving it out costs; {found['num_users']:,} {escape(found['split'])} users. "
        "A negative cost: the ranking was better without it.</p>"
        + scroll("Layers", f'<table class="layers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>')
        + "<h3>Stretches: the angle by first layer and number of layers</h3>"
        + f"{stretches}</section>"
    )


def heat_table(
    label: str, corner: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]]
) -> str:
    """A table whose cells are the darker the larger their value, from naught on; None is left blank."""
    top = max((value for row in values for value in row if value is not None), default=0.0) or 1.0
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in (corner, *columns))
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(
            "<td></td>" if value is None else f'<td style="--heat:{max(0.0, value / top):.3f}">{value:.2f}</td>'
            for value in row
        )
        + "</tr>"
        for name, row in zip(rows, values, strict=True)
    )
    return scroll(label, f'<table class="heat"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>')
