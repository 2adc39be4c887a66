"""Options that several commands share, and what every command does with its result."""

import json
import os
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from slmrec.errors import ConfigError
from slmrec.processes import is_main_process

Command = TypeVar("Command", bound=Callable[..., Any])


def runs_folder() -> Path:
    """Where artefacts lie by default: --runs, else SLMCOMPRESS_RUNS, else ./runs."""
    root = click.get_current_context().find_root()
    return Path(root.params.get("runs") or os.environ.get("SLMCOMPRESS_RUNS") or "runs")


def common_options(command: Command) -> Command:
    """--config, --seed, --device, --json and --force, which every stage takes."""
    for option in (
        click.option("--force", is_flag=True, help="Replace an artefact made with other settings or inputs."),
        click.option("--json", "as_json", is_flag=True, help="One JSON object alone on stdout; progress on stderr."),
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
        click.option("--seed", type=int, default=0, show_default=True, help="Of everything random."),
        click.option("--runs", type=click.Path(path_type=Path), expose_value=False, callback=_set_runs, is_eager=True,
                     help="Folder of default inputs and outputs  [default: $SLMCOMPRESS_RUNS or ./runs]"),
        click.option("-c", "--config", type=click.Path(dir_okay=False, path_type=Path), is_eager=True,
                     expose_value=False, callback=_read_config, help="TOML file with any flag of the command."),
    ):  # fmt: skip
        command = option(command)
    return command


def decoder_training_options(command: Command) -> Command:
    """Batch, rates, warm-up and precision, of every command that trains a decoder."""
    for option in (
        click.option("--precision", type=click.Choice(["auto", "bf16", "fp32"]), default="auto", show_default=True),
        click.option("--warmup-steps", default=20, show_default=True),
        click.option("--item-learning-rate", default=1e-3, show_default=True,
                     help="Peak rate of item table, maps and head."),
        click.option("--learning-rate", default=3e-4, show_default=True, help="Peak rate of the decoder."),
        click.option("--batch-size", default=16, show_default=True, help="Sequences in a step."),
    ):  # fmt: skip
        command = option(command)
    return command


def device_memory_options(command: Command) -> Command:
    """--accumulate and --checkpoint-gradients: the same step in less memory."""
    for option in (
        click.option("--checkpoint-gradients", is_flag=True,
                     help="Compute activations twice instead of keeping them: less memory, more time."),
        click.option("--accumulate", default=1, show_default=True,
                     help="Micro-batches of a step on each device: less memory, the same gradient."),
    ):  # fmt: skip
        command = option(command)
    return command


def dry_run_option(command: Command) -> Command:
    """--dry-run, of commands that run for long."""
    text = "Check the input, say what would be done, and stop."
    return click.option("--dry-run", is_flag=True, help=text)(command)


def model_option(command: Command) -> Command:
    """-m/--model: the input artefact."""
    return click.option(
        "-m",
        "--model",
        type=click.Path(path_type=Path),
        help="Input artefact  [default: the usual one below RUNS, which is printed]",
    )(command)


def data_option(command: Command) -> Command:
    """-d/--data: the dataset."""
    return click.option("-d", "--data", type=click.Path(path_type=Path), help="Dataset  [default: RUNS/data]")(command)


def output_option(default: str) -> Callable[[Command], Command]:
    """-o/--output: where the artefact goes."""
    return click.option(
        "-o", "--output", type=click.Path(path_type=Path), help=f"Output folder  [default: RUNS/{default}]"
    )


def say(message: str) -> None:
    """Progress and choices go to stderr, so that stdout stays one JSON object or one result."""
    if is_main_process():
        click.echo(message, err=True)


def print_result(result: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """The one print of a command, whatever the number of processes."""
    if is_main_process():
        click.echo(json.dumps(result, allow_nan=False) if as_json else text)


def _set_runs(context: click.Context, _: click.Parameter, value: Path | None) -> None:
    if value is not None:
        context.find_root().params["runs"] = value


def _read_config(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist", remedy="-c FILE.toml with lines such as num-layers = 4") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}", remedy="lines such as num-layers = 4") from None
    taken = [parameter for parameter in context.command.params if parameter.name != "config"]
    names = {flag.lstrip("-"): parameter.name for parameter in taken for flag in parameter.opts}
    unknown = [name for name in values if name.replace("_", "-") not in names]
    if unknown:
        raise ConfigError(
            f"{path} sets {unknown[0]!r}, which is no flag of {context.info_name}",
            remedy=f"one of {', '.join(sorted(names))}",
        )
    parameters = {parameter.name: parameter for parameter in taken}
    for name, value in values.items():
        if problem := _misfit(context, parameters[names[name.replace("_", "-")]], value):
            raise ConfigError(
                f"{path} sets {name} to {value!r}{problem}", remedy=f"{name} as the command line takes it"
            )
    context.default_map = {names[name.replace("_", "-")]: value for name, value in values.items()}


def _misfit(context: click.Context, kind: Any, value: Any) -> str | None:
    """Why a flag cannot have a value that TOML has, as the end of a sentence; None where it can."""
    is_list, expected = isinstance(value, list), None
    if isinstance(value, bool) != bool(kind.is_flag):
        expected = "true or false" if kind.is_flag else "text or a number"
    elif isinstance(value, float) and isinstance(kind.type, click.types.IntParamType):
        expected = "a whole number"
    elif not (is_list or isinstance(value, str | int | float)):
        expected = "text or a number"
    elif is_list and not kind.multiple and isinstance(kind.type, click.types.StringParamType):
        expected = "one value"
    if expected:
        return f", expected is {expected}"
    try:
        kind.type_cast_value(context, value)
    except click.UsageError as error:
        return f": {error.message}"
    except (TypeError, AttributeError):  # click converts what a command line holds: text
        return ", a value of another type"
    return None
