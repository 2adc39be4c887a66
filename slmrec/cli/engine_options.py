"""Flags of `export --trt`, in trtexec's spelling where it has one."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import click

from slmrec.engine_config import FLAVORS, HARDWARE, PRECISIONS, RANGES, EngineConfig
from slmrec.errors import ConfigError

OPTIONS = (
    click.option("--trt", is_flag=True, help="A TensorRT engine beside the graph; the flags below are for it."),
    click.option("--precision", type=click.Choice(PRECISIONS), help="[default: int8 after quantize, else fp16]"),
    click.option(
        "--ranges", type=click.Choice(RANGES), help="Calibrated ranges of int8 and fp8.  [default: percentile]"
    ),
    click.option("--trt-flavor", type=click.Choice(FLAVORS), help="rtx builds without a GPU.  [default: auto]"),
    click.option("--compute-capability", help="Such as 8.0,8.9.  [default: the GPU here; rtx: all]"),
    click.option("--min-shapes", help="Such as item_ids:1x1,exclude_ids:1x0.  [default: from the data]"),
    click.option("--opt-shapes", help="Usual shapes, for which kernels are chosen."),
    click.option("--max-shapes", help="Largest shapes."),
    click.option("--workspace", type=int, help="MiB of scratch memory for the build."),
    click.option("--timing-cache", type=click.Path(), help="File of kernel timings, read and written."),
    click.option("--hardware-compat", type=click.Choice(HARDWARE), help="Run on other devices too.  [default: none]"),
    click.option("--version-compatible", is_flag=True, default=None, help="Run with later TensorRT versions too."),
    click.option("--accuracy-gate", type=float, help="Least share of validation NDCG@10 to keep.  [default: 0.99]"),
)


def engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the flags."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def engine_config(flags: dict[str, Any], *, wanted: bool) -> EngineConfig | None:
    """The engine's settings, taken out of a command's flags; None without --trt.

    Raises:
        ConfigError: flags of the engine without --trt.
    """
    names = [*(field.name for field in fields(EngineConfig) if field.name != "flavor"), "trt_flavor"]
    given = {name: flags.pop(name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    if not wanted:
        if given:
            flag = f"--{next(iter(given)).replace('_', '-')}"
            raise ConfigError(f"{flag} is for TensorRT engines", remedy=f"export --trt {flag} ..., or without it")
        return None
    if "compute_capability" in given:
        given["compute_capability"] = tuple(part.strip() for part in given["compute_capability"].split(","))
    if "trt_flavor" in given:
        given["flavor"] = given.pop("trt_flavor")
    return EngineConfig(**given)
