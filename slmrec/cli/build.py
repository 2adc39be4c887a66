"""distill, prune and quantize."""

from pathlib import Path
from typing import Any

import click

from slmrec.cli.loading import choose, choose_student, resolve_output
from slmrec.cli.options import (
    common_options,
    data_option,
    device_memory_options,
    dry_run_option,
    model_option,
    output_option,
    print_result,
)
from slmrec.compress_config import DistillConfig, FeatureConfig, OnlineConfig, QuantizeConfig
from slmrec.config import TrainConfig
from slmrec.errors import ConfigError


@click.command()
@click.option("--num-layers", default=4, show_default=True, help="Decoder layers of the student.")
@click.option("--num-blocks", default=4, show_default=True, help="Blocks whose features are matched.")
@click.option(
    "--hidden-size", type=int, help="Width of a narrower student, with --init random  [default: the teacher's]"
)
@click.option(
    "--init",
    type=click.Choice(["teacher", "teacher-first", "backbone", "random"]),
    default="teacher",
    show_default=True,
    help="Layers it starts from: the teacher's, evenly spaced or the first; the backbone's first; none.",
)
@click.option("--item-table", type=click.Choice(["trainable", "frozen"]), default="trainable", show_default=True)
@click.option(
    "--loss",
    type=click.Choice(["paper", "repo"]),
    default="paper",
    show_default=True,
    help="Means over blocks and squared distances, or sums and plain distances.",
)
@click.option("--direction-weight", default=1.0, show_default=True, help="Cosine term, lambda_1.")
@click.option("--magnitude-weight", default=0.1, show_default=True, help="Squared distance, lambda_2.")
@click.option("--supervision-weight", default=0.1, show_default=True, help="Multiple supervision, lambda_3.")
@click.option(
    "--l2-scale", "magnitude_scale", type=click.Choice(["hidden", "none"]), default="hidden", show_default=True
)
@click.option("--list-weight", default=0.0, show_default=True, help="Divergence from the teacher's best items' scores.")
@click.option("--list-size", default=50, show_default=True, help="Best items the list term compares.")
@click.option(
    "--features",
    "source",
    type=click.Choice(["stored", "live"]),
    default="stored",
    show_default=True,
    help="Teacher features: computed once before training, or at every step.",
)
@click.option(
    "--feature-dtype", "dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True
)
@click.option("--keep-features", "keep", is_flag=True, help="Leave the store for further students of this teacher.")
@click.option("--online", is_flag=True, help="Train the teacher as well, at the same time.")
@click.option(
    "--signal", type=click.Choice(["features", "logits"]), default="features", show_default=True, help="With --online."
)
@click.option(
    "--teacher-gradient/--no-teacher-gradient",
    default=False,
    show_default=True,
    help="With --online: whether feature terms move the teacher.",
)
@click.option(
    "--share-prefix/--no-share-prefix", default=True, show_default=True, help="Compute the instruction once per step."
)
@click.option("--epochs", default=4, show_default=True)
@click.option("--patience", type=int, help="Epochs without a better validation NDCG@10  [default: train all epochs]")
@click.option("--batch-size", default=16, show_default=True, help="Sequences in a step.")
@click.option("--learning-rate", default=3e-4, show_default=True, help="Peak rate of the decoder.")
@click.option("--item-learning-rate", default=1e-3, show_default=True, help="Peak rate of item table, maps and head.")
@click.option("--warmup-steps", default=20, show_default=True)
@click.option("--precision", type=click.Choice(["auto", "bf16", "fp32"]), default="auto", show_default=True)
@device_memory_options
@click.option("--save-every-steps", default=50, show_default=True, help="Steps between resumable states.")
@model_option
@data_option
@output_option("student")
@dry_run_option
@common_options
def distill(
    model: Path | None, data: Path | None, output: Path | None, device: str, seed: int, as_json: bool, force: bool,
    dry_run: bool, **flags: Any,
) -> None:  # fmt: skip
    """Train a small student to follow the teacher's features, block by block."""
    config = _distill_config(flags, seed)
    teacher = choose(model, "teacher", "slmcompress train-teacher", "checkpoint")
    dataset = choose(data, "data", "slmcompress data FILE", "dataset")
    from compress.distill import distill as run
    from compress.distill import distill_stage
    from compress.plan import plan_distillation
    from slmrec.cli.stages import already, planned, trained
    from slmrec.dataset import load_dataset

    output, log = resolve_output(output, "student"), load_dataset(dataset.path)
    if dry_run:
        there = already(output, lambda: distill_stage(teacher, log, config), force=force)
        if there is not None:
            print_result(*trained(there, True), as_json=as_json)
            return
        plan, samples = plan_distillation(teacher, log, config, device)
        print_result(*planned(output, samples, config.train, plan), as_json=as_json)
        return
    result = run(teacher, log, output, config, device=device, force=force)
    print_result(*trained(*result), as_json=as_json)


def _distill_config(flags: dict[str, Any], seed: int) -> DistillConfig:
    """Flags by the dataclass they belong to."""
    train, features, online = (
        {name: flags.pop(name) for name in fields.__dataclass_fields__ if name in flags}
        for fields in (TrainConfig, FeatureConfig, OnlineConfig)
    )
    together = flags.pop("online")
    if not together and online != {"signal": "features", "teacher_gradient": False}:
        raise ConfigError("--signal and --teacher-gradient belong to online distillation", remedy="--online with them")
    return DistillConfig(
        **flags,
        features=FeatureConfig(**features),
        online=OnlineConfig(**online) if together else None,
        train=TrainConfig(**train, seed=seed),
    )


@click.command()
@click.option("--num-layers", default=3, show_default=True, help="Layers that remain.")
@model_option
@data_option
@output_option("student-pruned")
@common_options
def prune(model: Path | None, num_layers: int, **_: Any) -> None:
    """Drop layers of a student (not in this version)."""
    raise ConfigError(
        "prune is not part of this version",
        remedy=f"slmcompress distill --num-layers {num_layers} --num-blocks {num_layers}: a student of that depth",
    )


@click.command()
@click.option("--bits", default=8, show_default=True, help="Of weights and activations.")
@click.option(
    "--accuracy-gate", default=0.99, show_default=True, help="Least share of the parent's validation NDCG@10."
)
@click.option("--keep-fp", multiple=True, help="Layers that stay fp32, such as layers.3.mlp.down_proj; * matches.")
@click.option("--auto-keep", is_flag=True, help="Keep the layers with the largest 8-bit error until the gate holds.")
@model_option
@data_option
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Output folder  [default: <model>-int8]")
@common_options
def quantize(
    model: Path | None, data: Path | None, output: Path | None, device: str, seed: int, as_json: bool, force: bool,
    **flags: Any,
) -> None:  # fmt: skip
    """Make a student 8-bit: int8 weights per output channel, int8 activations per token."""
    config = QuantizeConfig(**flags)
    parent = choose_student(model, wanted=lambda artifact: "quantize" not in artifact.stages)
    dataset = choose(data, "data", "slmcompress data FILE", "dataset")
    from compress.quantize import quantize as run
    from compress.quantize import read_gate
    from slmrec.cli.stages import made, made_text
    from slmrec.dataset import load_dataset

    beside = parent.path if parent.path.name else parent.path.resolve()
    output = resolve_output(output or beside.with_name(f"{beside.name}-int8"), "")
    result = run(parent, load_dataset(dataset.path), output, config, device=device, force=force)
    gate, text = read_gate(result[0])
    print_result(made(*result) | {"gate": gate}, f"{made_text(*result)}\n{text}", as_json=as_json)
