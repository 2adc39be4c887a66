"""distill: the student."""

import shutil
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

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
from slmrec.compress_config import DistillConfig, FeatureConfig, OnlineConfig
from slmrec.config import TrainConfig
from slmrec.errors import ConfigError


@click.command()
@click.option("--num-layers", default=4, show_default=True, help="Decoder layers of the student.")
@click.option(
    "--num-blocks", default=4, show_default=True, help="Blocks whose features are matched, at most --num-layers."
)
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
@click.option("--direction-weight", type=float, help="Cosine term, lambda_1  [default: 1.0; 0 with --signal logits]")
@click.option(
    "--magnitude-weight", type=float, help="Squared distance, lambda_2  [default: 0.1; 0 with --signal logits]"
)
@click.option(
    "--supervision-weight", default=0.1, show_default=True, help="Multiple supervision, lambda_3; 0 with one block."
)
@click.option(
    "--l2-scale", "magnitude_scale", type=click.Choice(["hidden", "none"]), default="hidden", show_default=True
)
@click.option("--list-weight", default=0.0, show_default=True, help="Divergence from the teacher's best items' scores.")
@click.option("--list-size", default=50, show_default=True, help="Best items the list term compares, or all.")
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
@decoder_training_options
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
        fields, text = planned(output, samples, config.train, plan)
        if plan.feature_store_bytes is not None:
            place = next(folder for folder in output.absolute().parents if folder.is_dir())
            fields["disk_free_bytes"] = shutil.disk_usage(place).free
            if fields["disk_free_bytes"] < plan.feature_store_bytes:
                text += f"\nthe features do not fit: {place} has {fields['disk_free_bytes'] / 1e6:,.1f} MB free"
        print_result(fields, text, as_json=as_json)
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
    given = click.get_current_context().get_parameter_source("source")
    if together and given is not ParameterSource.DEFAULT:  # by default features are stored, and online none are
        raise ConfigError(
            "online, features are those of the step, wherever --features says they come from",
            remedy="leave out --features, or leave out --online",
        )
    if not together and online != {"signal": "features", "teacher_gradient": False}:
        raise ConfigError("--signal and --teacher-gradient belong to online distillation", remedy="--online with them")
    compares_features = online["signal"] == "features"
    for name in ("direction_weight", "magnitude_weight"):
        if flags[name] is None:
            flags[name] = getattr(DistillConfig, name) if compares_features else 0.0
    return DistillConfig(
        **flags,
        features=FeatureConfig(**features),
        online=OnlineConfig(**online) if together else None,
        train=TrainConfig(**train, seed=seed),
    )
