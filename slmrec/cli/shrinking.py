"""prune and quantize, and what they are decided by: importance and sensitivity."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slmrec.cli.loading import choose, choose_student, resolve_output
from slmrec.cli.options import (
    Command,
    common_options,
    data_option,
    decoder_training_options,
    model_option,
    output_option,
    print_result,
    say,
)
from slmrec.compress_config import (
    CalibrationConfig,
    ImportanceConfig,
    PruneConfig,
    QuantizeConfig,
    SensitivityConfig,
)
from slmrec.config import TrainConfig
from slmrec.errors import ConfigError

if TYPE_CHECKING:
    from slmrec.artifact import Artifact
    from slmrec.dataset import Dataset

FEW_HISTORIES = 64


def calibration_options(command: Command) -> Command:
    """--calibration-histories and --migrate, of whatever rounds to 8 bits."""
    for option in (
        click.option("--migrate/--no-migrate", default=True, show_default=True,
                     help="Move outliers of activations into the weights; exact in fp32."),
        click.option("--calibration-histories", default=512, show_default=True,
                     help="Histories of validation users that outliers and ranges are found on."),
    ):  # fmt: skip
        command = option(command)
    return command


def _is_full_precision(artifact: "Artifact") -> bool:
    return "quantize" not in artifact.stages


def _calibration(flags: dict[str, Any], seed: int) -> CalibrationConfig:
    return CalibrationConfig(
        histories=flags.pop("calibration_histories"), migrate=flags.pop("migrate"), seed=seed
    )  # fmt: skip


def _output_beside(parent: "Artifact", output: Path | None, ending: str) -> Path:
    beside = parent.path if parent.path.name else parent.path.resolve()
    return resolve_output(output or beside.with_name(f"{beside.name}-{ending}"), "")


def _warn_of_few(config: CalibrationConfig, data: "Dataset") -> None:
    from slmrec.sequences import validation_cases

    found = min(config.histories, len(validation_cases(data.sequences)))
    if found < FEW_HISTORIES:
        say(f"calibration has {found} histories; ranges of fewer than {FEW_HISTORIES} may not fit other users")


@click.command()
@click.option("--num-layers", type=int, help="Layers that remain.")
@click.option("--drop", help="Layers to drop by number, from 0, such as 2,5.")
@click.option(
    "--criterion",
    type=click.Choice(["damage", "angular", "influence"]),
    default="damage",
    show_default=True,
    help="A layer's worth: NDCG@10 lost without it; how far it turns the user vector; 1 - cosine of in and out.",
)
@click.option("--contiguous", is_flag=True, help="Drop neighbouring layers alone.")
@click.option("--mlp-size", type=int, help="Feed-forward channels that remain in a layer.")
@click.option("--num-heads", type=int, help="Query heads that remain in a layer.")
@click.option("--heal-epochs", default=1, show_default=True, help="Epochs of distillation from the unpruned model.")
@click.option("--max-users", default=2000, show_default=True, help="Validation users that layers are judged by.")
@decoder_training_options
@model_option
@data_option
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Output folder  [default: <model>-pruned]")
@common_options
def prune(
    model: Path | None, data: Path | None, output: Path | None, device: str, seed: int, as_json: bool, force: bool,
    **flags: Any,
) -> None:  # fmt: skip
    """Drop layers, heads or channels of a student (or of a teacher, with -m), and heal what is left."""
    config = _prune_config(flags, seed)
    parent = choose_student(
        model, wanted=lambda artifact: _is_full_precision(artifact) and "prune" not in artifact.stages
    )  # fmt: skip
    dataset = choose(data, "data", "slmcompress data FILE", "dataset")
    from compress.prune import prune as run
    from compress.prune import read_pruning
    from slmrec.cli.stages import made, made_text
    from slmrec.dataset import load_dataset

    output = _output_beside(parent, output, "pruned")
    result = run(parent, load_dataset(dataset.path), output, config, device=device, force=force)
    record, text = read_pruning(result[0])
    print_result(made(*result) | {"pruning": record}, f"{made_text(*result)}\n{text}", as_json=as_json)


def _prune_config(flags: dict[str, Any], seed: int) -> PruneConfig:
    drop = flags.pop("drop") or ""
    try:
        layers = tuple(int(layer) for layer in drop.split(",") if layer.strip())
    except ValueError:
        raise ConfigError(f"--drop {drop!r} is no list of layers", remedy="--drop 2,5") from None
    importance = ImportanceConfig(max_users=flags.pop("max_users"), seed=seed)
    fields = {name: flags.pop(name) for name in TrainConfig.__dataclass_fields__ if name in flags}
    train = TrainConfig(epochs=max(1, flags["heal_epochs"]), seed=seed, **fields)
    return PruneConfig(**flags, drop=layers, importance=importance, train=train)


@click.command()
@click.option("--bits", default=8, show_default=True, help="Of weights and activations.")
@click.option(
    "--backend",
    type=click.Choice(["neutral", "bitsandbytes"]),
    default="neutral",
    show_default=True,
    help="Layers that any backend runs, or LLM.int8 for PyTorch.",
)
@click.option(
    "--accuracy-gate", default=0.99, show_default=True, help="Least share of the parent's validation NDCG@10."
)
@click.option("--keep-fp", multiple=True, help="Layers that stay fp32, such as layers.3.mlp.down; * matches.")
@click.option("--auto-keep", is_flag=True, help="Keep the most sensitive layers in fp32 until the gate holds.")
@calibration_options
@model_option
@data_option
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Output folder  [default: <model>-int8, <model>-llm-int8]"
)
@common_options
def quantize(
    model: Path | None, data: Path | None, output: Path | None, device: str, seed: int, as_json: bool, force: bool,
    **flags: Any,
) -> None:  # fmt: skip
    """Make a student 8-bit: int8 weights per output channel, int8 activations per token."""
    config = QuantizeConfig(calibration=_calibration(flags, seed), **flags)
    parent = choose_student(model, wanted=_is_full_precision)
    dataset = choose(data, "data", "slmcompress data FILE", "dataset")
    from compress.quantize import quantize as run
    from compress.quantize import read_gate
    from slmrec.cli.stages import made, made_text
    from slmrec.dataset import load_dataset

    log = load_dataset(dataset.path)
    if config.backend == "neutral":
        _warn_of_few(config.calibration, log)
    output = _output_beside(parent, output, "int8" if config.backend == "neutral" else "llm-int8")
    result = run(parent, log, output, config, device=device, force=force)
    gate, text = read_gate(result[0])
    print_result(made(*result) | {"gate": gate}, f"{made_text(*result)}\n{text}", as_json=as_json)


@click.command()
@click.option("--max-users", default=2000, show_default=True, help="Validation users that are asked.")
@calibration_options
@model_option
@data_option
@output_option("sensitivity")
@common_options
def sensitivity(
    model: Path | None, data: Path | None, output: Path | None, device: str, seed: int, as_json: bool, force: bool,
    **flags: Any,
) -> None:  # fmt: skip
    """Measure what 8 bits in each layer alone would cost; writes a table and a plot."""
    config = SensitivityConfig(calibration=_calibration(flags, seed), **flags)
    parent = choose_student(model, wanted=_is_full_precision)
    dataset = choose(data, "data", "slmcompress data FILE", "dataset")
    from compress.sensitivity import read_sensitivity, sensitivity_text, write_sensitivity
    from slmrec.dataset import load_dataset

    log = load_dataset(dataset.path)
    _warn_of_few(config.calibration, log)
    result = write_sensitivity(
        parent, log, resolve_output(output, "sensitivity"), config, device=device, force=force
    )  # fmt: skip
    _print_analysis(result, read_sensitivity, sensitivity_text, as_json=as_json)


@click.command()
@click.option("--max-users", default=2000, show_default=True, help="Validation users that are asked.")
@model_option
@data_option
@output_option("importance")
@common_options
def importance(
    model: Path | None, data: Path | None, output: Path | None, device: str, seed: int, as_json: bool, force: bool,
    max_users: int,
) -> None:  # fmt: skip
    """Measure what each layer is worth, by three criteria; writes a table and a heatmap."""
    config = ImportanceConfig(max_users=max_users, seed=seed)
    parent = choose_student(model, wanted=_is_full_precision)
    dataset = choose(data, "data", "slmcompress data FILE", "dataset")
    from compress.importance import importance_text, read_importance, write_importance
    from slmrec.dataset import load_dataset

    log = load_dataset(dataset.path)
    result = write_importance(
        parent, log, resolve_output(output, "importance"), config, device=device, force=force
    )  # fmt: skip
    _print_analysis(result, read_importance, importance_text, as_json=as_json)


def _print_analysis(
    result: "tuple[Artifact, bool]",
    read: "Callable[[Artifact], dict[str, Any]]",
    text: Callable[[list[dict[str, Any]]], str],
    *,
    as_json: bool,
) -> None:
    from slmrec.cli.stages import made, made_text

    record = read(result[0])
    users = f"{record['num_users']} validation users"
    print_result(
        made(*result) | record, f"{made_text(*result)}; {users}\n{text(record['layers'])}", as_json=as_json
    )  # fmt: skip
