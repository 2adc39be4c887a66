"""Tables of bulk.py and scale.py, for docs/."""

from typing import Any


def bulk(entry: dict[str, Any]) -> str:
    """Rates of both engines, and the memory of one process."""
    rows = ["| engine | users | users/s | users/s after the start | peak memory |", "|---|---|---|---|---|"]
    for row in entry["result"]["engines"]:
        local = row["engine"] == "local"
        rows.append(
            f"| {row['engine']}{', a worker killed' if row['worker_killed'] else ''} | {row['num_users']:,} "
            f"| {row['users_per_second']:.0f} | {row['users_per_second_after_start']:.0f} "
            f"| {str(round(row['peak_bytes'] / 1e6)) + ' MB' if local else ''} |"
        )
    machine = entry["machine"]
    note = (
        f"Measured on {machine['usable_cores']} cores of an {machine['cpu']}, one run after the other (load "
        f"{machine['load_average_1min']:.1f} at the end). The demo's bundle, top {entry['result']['top_k']}; the files "
        "of both engines are the same bytes (`python benchmarks/bulk.py runs/demo`)."
    )
    return "\n".join([*rows, "", note])


def scale(entry: dict[str, Any]) -> str:
    """Floors of the plan."""
    rows = [
        "| GPU | item table | GPU hours | hours on 8 | on 64 | lists/s of one GPU | US$ a million lists | bound by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {row['gpu']} | {row['way']} | {row['gpu_hours']:,.1f} | {row['hours_on_8']:.2f} | {row['hours_on_64']:.3f} "
        f"| {row['users_per_gpu_second']:,.0f} | {row['usd_per_million_lists']:.4f} | {row['bound']} |"
        for row in entry["result"]["floors"]
    ]
    prices = ", ".join(f"{name} ${price:.2f}" for name, price in entry["result"]["prices_usd_per_gpu_hour"].items())
    return "\n".join(
        [*rows, "", f"All estimated: floors from data sheets; assumed prices of a GPU and hour: {prices}."]
    )


def scale_bytes(entry: dict[str, Any]) -> str:
    """Bytes of the plan."""
    rows = ["| | bytes (estimated: multiplied) |", "|---|---|"]
    return "\n".join(rows + [f"| {name} | {_bytes(value)} |" for name, value in entry["result"]["bytes"].items()])


def _bytes(value: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"
