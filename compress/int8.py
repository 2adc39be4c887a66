"""Which layers become 8-bit, and what is done to a model before: calibration and migration of outliers."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from torch import nn

from compress.calibrate import calibrate, some_cases, static_ranges
from compress.smooth import Migration, migrate
from slmrec.artifact import Artifact
from slmrec.compress_config import CalibrationConfig
from slmrec.errors import ConfigError
from slmrec.models.checkpoint import linear_at, load_decoder, quantized_layers, replace_linear, require_finite
from slmrec.models.decoder import DecoderModel
from slmrec.models.layers import Int8Linear
from slmrec.models.llm_int8 import is_llm_int8
from slmrec.models.ranking import resolve_device
from slmrec.sequences import Cases


@dataclass(frozen=True)
class Calibrated:
    """A model ready to be quantized, and what was seen on the way."""

    model: DecoderModel
    migrations: Sequence[Migration]
    ranges: Mapping[str, Mapping[str, float]]
    """Static ranges of every linear layer's input, as `Statistics.ranges` has them."""
    num_histories: int

    def to_json(self) -> dict[str, Any]:
        """What `calibration.json` holds, and what a static 8-bit engine needs."""
        return {
            "histories": self.num_histories,
            "migrations": [vars(migration) for migration in self.migrations],
            "input_ranges": {name: dict(ranges) for name, ranges in self.ranges.items()},
        }


def load_full_precision(parent: Artifact) -> DecoderModel:
    """The decoder of a checkpoint that is not quantized yet."""
    model = load_decoder(parent)
    if quantized_layers(model):
        raise ConfigError(f"{parent.path} is an 8-bit checkpoint already", remedy="its fp32 parent (-m/--model)")
    require_finite(model)
    return model


def prepare(model: DecoderModel, cases: Cases, config: CalibrationConfig, device: str = "cpu") -> Calibrated:
    """Calibrate, migrate outliers, and calibrate the migrated model: its inputs have other ranges.

    Histories run on `device`; what comes back is on the CPU.
    """
    histories, target = some_cases(cases, config.histories, config.seed).histories, resolve_device(device)
    model = model.eval()
    migrations: list[Migration] = []
    if config.migrate:
        found = calibrate(model.to(target), histories, seed=config.seed)
        model, migrations = migrate(model.cpu(), found)
    ranges = static_ranges(calibrate(model.to(target), histories, seed=config.seed), model.num_layers)
    return Calibrated(model.cpu(), migrations, ranges, len(histories))


def quantize_model(
    model: DecoderModel, keep_fp: Sequence[str] = (), make: Callable[[nn.Linear], nn.Module] = Int8Linear.from_linear
) -> DecoderModel:
    """A copy whose decoder layers compute in 8 bits, but for the names that match a pattern of `keep_fp`.

    Names are relative to the decoder, such as layers.3.mlp.down_proj; item inputs and the head stay fp32.
    `make` gives the 8-bit layer of a linear one.
    """
    require_matches(model, keep_fp)
    quantized = copy.deepcopy(model)
    for name in decoder_linears(model):
        if not any(_matches(name, pattern) for pattern in keep_fp):
            full = f"decoder.{name}"
            replace_linear(quantized, full, make(linear_at(quantized, full)))
    return quantized


def require_matches(model: DecoderModel, patterns: Sequence[str]) -> None:
    """Refuse a pattern that names no linear layer, and patterns that name all."""
    names = decoder_linears(model)
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            raise ConfigError(f"no layer matches --keep-fp {pattern!r}", remedy=f"a name such as {names[-1]!r}")
    if patterns and all(any(_matches(name, pattern) for pattern in patterns) for name in names):
        raise ConfigError("--keep-fp leaves no layer in 8 bits", remedy="fewer patterns, or no quantization")


def decoder_linears(model: DecoderModel) -> list[str]:
    """Names of the decoder's linear layers that are not 8-bit, relative to the decoder."""
    modules = model.decoder.named_modules()
    return [name for name, module in modules if isinstance(module, nn.Linear) and not is_llm_int8(module)]


def _matches(name: str, pattern: str) -> bool:
    """Whether a glob names the layer, with its _proj or without."""
    return fnmatch(name, pattern) or fnmatch(name.removesuffix("_proj"), pattern)
