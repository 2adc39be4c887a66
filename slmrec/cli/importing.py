"""import-teacher."""

from pathlib import Path
from typing import Any

import click

from slmrec.cli.loading import choose, resolve_output
from slmrec.cli.options import common_options, data_option, output_option, print_result
from slmrec.config import ImportConfig, WindowConfig


@click.command("import-teacher")
@click.argument("folder", metavar="PATH", type=click.Path(path_type=Path))
@click.option("--backbone", required=True, help="The decoder it was trained on: named source, folder or hub id.")
@click.option("--table", "table_file", help="Item table: .npy, .safetensors or .pkl  [default: the one in PATH]")
@click.option("--items", "items_file", help="Columns row (of the table) and item_id: csv, parquet or jsonl.")
@click.option(
    "--part",
    type=click.Choice(["teacher", "student"]),
    default="teacher",
    show_default=True,
    help="Which model of an online distillation run.",
)
@click.option("--num-layers", type=int, help="First layers that are kept  [default: all it has]")
@click.option("--lora-alpha", type=float, help="[default: adapter_config.json's, else 16]")
@click.option("--prompt", type=click.Choice(["slmrec", "prefix", "none"]), default="slmrec", show_default=True)
@click.option("--positions", type=click.Choice(["compact", "padded"]), help="[default: SLMRec padded, else compact]")
@click.option("--max-history", type=int, help="Newest items the model sees  [default: SLMRec 30, else 50]")
@data_option
@output_option("teacher")
@common_options
def import_teacher(
    folder: Path, data: Path | None, output: Path | None, device: str, seed: int, as_json: bool, force: bool,
    max_history: int | None, **flags: Any,
) -> None:  # fmt: skip
    """Read a teacher trained with the E4SRec or SLMRec code, or a Hugging Face or PEFT folder with an item table.

    PATH is the folder that the training wrote: an adapter with adapter.pth, or a Trainer's checkpoint. None of them
    says which backbone it was. Without --items the table must have exactly the dataset's items: rows follow external
    ids that are numbers without gaps from 0 or 1, else the dataset's own order. No pickle is run.
    """
    window = None if max_history is None else WindowConfig(max_history=max_history)
    config = ImportConfig(window=window, **flags)
    dataset = choose(data, "data", "slmcompress data FILE", "dataset")
    from slmrec.cli.stages import made, made_text
    from slmrec.dataset import load_dataset
    from slmrec.import_teacher import import_teacher as run

    result = run(folder, load_dataset(dataset.path), resolve_output(output, "teacher"), config, force=force)
    read = result[0].settings
    text = (
        f"{made_text(*result)}; {read['convention']}, {read['num_layers']} layers, prompt {read['prompt']}, positions "
        f"{read['positions']}, newest {read['window']['max_history']} items"
    )
    print_result(made(*result), text, as_json=as_json)
