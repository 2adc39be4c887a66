"""train-items and train-teacher."""

from pathlib import Path
from typing import Any

import click

from slmrec.cli.loading import choose, resolve_output
from slmrec.cli.options import (
    common_options,
    data_option,
    decoder_training_options,
    device_memory_options,
    dry_run_option,
    model_option,
    output_option,
    print_result,
)
from slmrec.config import RecipeConfig, SasrecConfig, TeacherConfig, TrainConfig, WindowConfig


@click.command("train-items")
@click.option("--hidden-size", default=64, show_default=True, help="Width of the item table.")
@click.option("--num-layers", default=2, show_default=True)
@click.option("--num-heads", default=1, show_default=True)
@click.option("--dropout", default=0.3, show_default=True)
@click.option(
    "--supervision",
    type=click.Choice(["all", "prefixes"]),
    default="all",
    show_default=True,
    help="Targets: every position in one pass, or every prefix by itself, which costs more and pays on short ones.",
)
@click.option("--max-history", default=50, show_default=True, help="Newest items the model sees.")
@click.option("--max-events", type=int, help="Newest training events used of each user  [default: all]")
@click.option("--epochs", default=200, show_default=True)
@click.option("--patience", type=int, default=20, show_default=True, help="Epochs without a better validation NDCG@10.")
@click.option("--batch-size", default=128, show_default=True, help="Windows in a step.")
@click.option("--learning-rate", default=1e-3, show_default=True)
@click.option("--weight-decay", default=0.01, show_default=True)
@data_option
@output_option("items")
@dry_run_option
@common_options
def train_items(
    data: Path | None, output: Path | None, device: str, seed: int, as_json: bool, force: bool, dry_run: bool,
    **flags: Any,
) -> None:  # fmt: skip
    """Train SASRec with full cross-entropy: the teacher's item table, and the bar it has to pass."""
    config = SasrecConfig(
        hidden_size=flags["hidden_size"],
        num_layers=flags["num_layers"],
        num_heads=flags["num_heads"],
        dropout=flags["dropout"],
        supervision=flags["supervision"],
        window=WindowConfig(max_history=flags["max_history"], max_events=flags["max_events"]),
        train=TrainConfig(
            epochs=flags["epochs"],
            patience=flags["patience"],
            batch_size=flags["batch_size"],
            learning_rate=flags["learning_rate"],
            weight_decay=flags["weight_decay"],
            precision="fp32",
            seed=seed,
        ),
    )
    dataset = choose(data, "data", "slmcompress data FILE", "dataset")
    from slmrec.cli.stages import already, planned, trained
    from slmrec.dataset import load_dataset
    from slmrec.train_items import item_samples, items_stage
    from slmrec.train_items import train_items as run

    output, log = resolve_output(output, "items"), load_dataset(dataset.path)
    if dry_run:
        there = already(output, lambda: items_stage(config, log), force=force)
        if there is not None:
            print_result(*trained(there, True), as_json=as_json)
            return
        print_result(*planned(output, item_samples(config, log), config.train), as_json=as_json)
        return
    result = run(log, output, config, device=device, force=force)
    print_result(*trained(*result), as_json=as_json)


@click.command("train-teacher")
@click.option(
    "--backbone",
    default="smollm2-135m",
    show_default=True,
    help="Named source, folder or hub id (LLaMA, Mistral, Qwen2, Qwen3).",
)
@click.option("--num-layers", default=8, show_default=True, help="First layers of the backbone that are used.")
@click.option("--head", type=click.Choice(["tied", "linear"]), default="tied", show_default=True)
@click.option("--prompt", type=click.Choice(["slmrec", "prefix", "none"]), default="prefix", show_default=True)
@click.option("--positions", type=click.Choice(["compact", "padded"]), default="compact", show_default=True)
@click.option("--supervision", type=click.Choice(["all", "prefixes", "last"]), default="all", show_default=True)
@click.option("--titles", type=click.Choice(["auto", "none"]), default="auto", show_default=True)
@click.option("--item-table", type=click.Choice(["trainable", "frozen"]), default="trainable", show_default=True)
@click.option("--dropout", default=0.2, show_default=True, help="Of item vectors at the decoder's input.")
@click.option("--tuning", type=click.Choice(["full", "lora"]), default="full", show_default=True)
@click.option(
    "--share-prefix/--no-share-prefix", default=True, show_default=True, help="Compute the instruction once per step."
)
@click.option("--max-history", default=50, show_default=True, help="Newest items the model sees.")
@click.option(
    "--max-events", type=int, default=100, show_default=True, help="Newest training events used of each user."
)
@click.option("--epochs", default=3, show_default=True)
@click.option("--patience", type=int, help="Epochs without a better validation NDCG@10  [default: train all epochs]")
@decoder_training_options
@device_memory_options
@click.option("--save-every-steps", default=50, show_default=True, help="Steps between resumable states.")
@model_option
@data_option
@output_option("teacher")
@dry_run_option
@common_options
def train_teacher(
    model: Path | None, data: Path | None, output: Path | None, device: str, seed: int, as_json: bool, force: bool,
    dry_run: bool, **flags: Any,
) -> None:  # fmt: skip
    """Train an E4SRec-style teacher: the first layers of a language model read items and predict the next one.

    -m/--model names the SASRec checkpoint whose item table it starts from  [default: RUNS/items]
    """
    config = TeacherConfig(
        backbone=flags["backbone"],
        num_layers=flags["num_layers"],
        tuning=flags["tuning"],
        share_prefix=flags["share_prefix"],
        recipe=RecipeConfig(**{name: flags[name] for name in RecipeConfig.__dataclass_fields__}),
        window=WindowConfig(max_history=flags["max_history"], max_events=flags["max_events"]),
        train=TrainConfig(
            **{name: flags[name] for name in TrainConfig.__dataclass_fields__ if name in flags}, seed=seed
        ),
    )
    items = choose(model, "items", "slmcompress train-items", "checkpoint")
    dataset = choose(data, "data", "slmcompress data FILE", "dataset")
    from compress.plan import with_features_to_come
    from slmrec.cli.stages import already, planned, trained
    from slmrec.dataset import load_dataset
    from slmrec.train_teacher import plan_teacher, teacher_samples, teacher_shape, teacher_stage
    from slmrec.train_teacher import train_teacher as run

    output, log = resolve_output(output, "teacher"), load_dataset(dataset.path)
    if dry_run:
        there = already(output, lambda: teacher_stage(config, items, log), force=force)
        if there is not None:
            print_result(*trained(there, True), as_json=as_json)
            return
        shape, samples = teacher_shape(config, items, log), teacher_samples(config.recipe, config.window, log)
        plan = with_features_to_come(plan_teacher(shape, config, samples, device), shape, samples)
        print_result(*planned(output, samples, config.train, plan), as_json=as_json)
        return
    result = run(items, log, output, config, device=device, force=force)
    print_result(*trained(*result), as_json=as_json)
