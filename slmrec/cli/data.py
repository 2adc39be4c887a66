"""data: raw logs, or a named source, become a dataset."""

from pathlib import Path
from typing import Any

import click

from slmrec.cli.loading import resolve_output
from slmrec.cli.options import common_options, output_option, print_result
from slmrec.config import DataConfig

FORMATS = ["auto", "csv", "parquet", "jsonl", "movielens", "amazon", "recbole", "sequences"]


@click.command()
@click.argument("inputs", nargs=-1, required=True, metavar="FILE...|ml-100k")
@click.option("--format", type=click.Choice(FORMATS), default="auto", show_default=True, help="Of the files.")
@click.option("--user-column", help="Name of the user column  [default: found by its usual names]")
@click.option("--item-column", help="Name of the item column  [default: found by its usual names]")
@click.option("--time-column", help="Name of the timestamp column  [default: found by its usual names]")
@click.option(
    "--items-file", help="Table of item titles  [default: what is published with the first file, such as u.item]"
)
@click.option("--item-id-column", help="Column of ids in --items-file.")
@click.option("--title-column", help="Column of titles in --items-file.")
@click.option("--min-events", default=0, show_default=True, help="k-core: drop rarer users and items, repeatedly.")
@click.option("--max-bad-rows", default=0, show_default=True, help="Malformed rows tolerated.")
@output_option("data")
@common_options
def data(
    inputs: tuple[str, ...], output: Path | None, device: str, seed: int, as_json: bool, force: bool, **flags: Any
) -> None:
    """Read interaction logs and write a dataset: sorted by time, ids numbered, titles kept.

    FILE may be CSV, Parquet, JSON lines, MovieLens (u.data, ratings.dat), Amazon reviews (.json, .json.gz), RecBole
    (.inter) or text with one `user item item ...` per line, oldest first.
    """
    config = DataConfig(**flags)
    from slmrec.cli.stages import made, made_text
    from slmrec.dataset import load_dataset
    from slmrec.interactions import prepare_dataset
    from slmrec.sources import SOURCES, source_files

    named = len(inputs) == 1 and inputs[0] in SOURCES and not Path(inputs[0]).exists()
    files = source_files(inputs[0]) if named else [Path(name) for name in inputs]
    result = prepare_dataset(files, resolve_output(output, "data"), config, force=force)
    info = dict(load_dataset(result[0].path).info)
    text = (
        f"{made_text(*result)}\n{info['num_users']} users, {info['num_items']} items, "
        f"{info['num_interactions']} events ({info['mean_length']:.1f} a user), {info['num_titles']} titles\n"
        f"{info['num_duplicates']} duplicate rows dropped, {info['num_filtered']} filtered, {info['num_bad_rows']} "
        f"malformed; {info['num_train_only_users']} users with fewer than 3 events are train only\n"
        f"{info['num_tied_targets']} of {info['num_evaluable_users']} users' last two events share a timestamp"
    )
    if info["items_file"]:
        text += f"\ntitles from {info['items_file']}"
    text += "".join(f"\nmalformed: {row}" for row in info["bad_rows_shown"])
    print_result(made(*result) | info, text, as_json=as_json)
