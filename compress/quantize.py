"""quantize: int8 weights per output channel, int8 activations per token, behind an accuracy gate."""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from slmrec.artifact import Artifact, Stage, is_up_to_date, open_artifact, publish, write_json
from slmrec.catalogue import load_catalogue, require_same_catalogue
from slmrec.compress_config import QuantizeConfig
from slmrec.config import settings_of
from slmrec.dataset import Dataset
from slmrec.errors import CheckError, ConfigError
from slmrec.evaluate import VALIDATION_PROTOCOL, Accuracy, evaluate
from slmrec.locks import one_run_at_a_time
from slmrec.metrics import ratio_of_means
from slmrec.models.checkpoint import linear_at, load_decoder, quantized_layers, replace_linear, save_checkpoint
from slmrec.models.decoder import DecoderModel
from slmrec.models.layers import Int8Linear
from slmrec.models.ranking import TorchRecommender
from slmrec.sequences import Cases, validation_cases

CALIBRATION_HISTORIES = 64
GATE_FILE = "gate.json"


@dataclass(frozen=True, kw_only=True)
class Gate:
    """NDCG@10 on validation users after over before; the point estimate decides."""

    ratio: float
    low: float
    high: float
    """Paired 95 % bootstrap interval of the ratio."""
    required: float
    num_users: int
    ndcg_before: float
    ndcg_after: float

    @property
    def passed(self) -> bool:
        """Whether the point estimate reaches the gate."""
        return self.ratio >= self.required

    @property
    def underpowered(self) -> bool:
        """Whether the interval is wider than the gate's slack, so that these users cannot resolve it."""
        return self.high - self.low > 1 - self.required

    def to_json(self) -> dict[str, Any]:
        """What `gate.json` holds."""
        state = "underpowered" if self.underpowered else "passed" if self.passed else "failed"
        return vars(self) | {"gate": state, "passed": self.passed, "split": "validation"}

    def to_text(self) -> str:
        """One line for people."""
        text = (
            f"validation NDCG@10 {self.ndcg_before:.4f} -> {self.ndcg_after:.4f}: {self.ratio:.4f} of the parent's "
            f"(95 % interval {self.low:.4f} to {self.high:.4f}), gate {self.required}"
        )
        return text + (f"; not resolved by {self.num_users} users" if self.underpowered else "")


@one_run_at_a_time
def quantize(
    parent: Artifact, data: Dataset, output: Path, config: QuantizeConfig, *, device: str = "auto", force: bool = False
) -> tuple[Artifact, bool]:
    """Quantize a decoder checkpoint; nothing is written unless the gate holds.

    Raises:
        CheckError: the 8-bit model ranks worse than the gate allows; the most sensitive layers are named.
    """
    require_same_catalogue(
        load_catalogue(parent.path), data.items, model_name=str(parent.path), data_name=str(data.artifact.path)
    )
    parents = {"model": parent, "data": data.artifact}
    stage = Stage(name="quantize", kind="checkpoint", settings=settings_of(config), parents=parents)
    if is_up_to_date(output, stage, force=force):
        return open_artifact(output), True
    model = load_decoder(parent)
    if quantized_layers(model):
        raise ConfigError(
            f"{parent.path} is an 8-bit checkpoint already", remedy="quantize its fp32 parent (-m/--model)"
        )
    cases = validation_cases(data.sequences)
    quantized, gate = _search(model, cases, config, device)
    with publish(output, stage) as folder:
        save_checkpoint(folder, quantized.cpu())
        write_json(folder / GATE_FILE, gate.to_json() | {"kept_fp": decoder_linears(quantized)})
        data.items.save(folder)
    return open_artifact(output), False


def read_gate(artifact: Artifact) -> tuple[dict[str, Any], str]:
    """How an 8-bit checkpoint passed its gate: the record, and a line for people."""
    record = json.loads((artifact.path / GATE_FILE).read_text(encoding="utf-8"))
    fields = {name: record[name] for name in Gate.__dataclass_fields__}
    kept = f"; fp32: {', '.join(record['kept_fp'])}" if record["kept_fp"] else ""
    return record, Gate(**fields).to_text() + kept


def quantize_model(model: DecoderModel, keep_fp: Sequence[str] = ()) -> DecoderModel:
    """A copy whose decoder layers compute in 8 bits, but for the names that match a pattern of `keep_fp`.

    Names are relative to the decoder, such as layers.3.mlp.down_proj; item inputs and the head stay fp32.
    """
    names = decoder_linears(model)
    for pattern in keep_fp:
        if not any(fnmatch(name, pattern) for name in names):
            raise ConfigError(f"no layer matches --keep-fp {pattern!r}", remedy=f"a name such as {names[-1]!r}")
    quantized = copy.deepcopy(model)
    for name in names:
        if not any(fnmatch(name, pattern) for pattern in keep_fp):
            full = f"decoder.{name}"
            replace_linear(quantized, full, Int8Linear.from_linear(linear_at(quantized, full)))
    return quantized


def decoder_linears(model: DecoderModel) -> list[str]:
    """Names of the decoder's linear layers, relative to the decoder."""
    return [name for name, module in model.decoder.named_modules() if isinstance(module, nn.Linear)]


@torch.inference_mode()
def layer_errors(model: DecoderModel, cases: Cases) -> dict[str, float]:
    """Relative error of each linear layer's output when it alone computes in 8 bits, on real activations.

    The squared error over all tokens of some calibration histories, divided by the squared output.
    """
    errors: dict[str, float] = {}

    def measure(name: str, linear: nn.Linear) -> Any:
        layer = Int8Linear.from_linear(linear)

        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            gap = (layer(inputs[0]) - output).pow(2).sum() / output.pow(2).sum()
            errors[name] = max(errors.get(name, 0.0), float(gap))

        return linear.register_forward_hook(hook)

    hooks = [measure(name, linear_at(model, f"decoder.{name}")) for name in decoder_linears(model)]
    rows = np.arange(min(CALIBRATION_HISTORIES, len(cases)))
    TorchRecommender(model, "cpu").recommend(cases.select(rows).histories, k=1)
    for handle in hooks:
        handle.remove()
    return errors


def _search(model: DecoderModel, cases: Cases, config: QuantizeConfig, device: str) -> tuple[DecoderModel, Gate]:
    """Quantize all but `keep_fp`; with `auto_keep`, keep ever more of the layers with the largest error."""
    before = evaluate(TorchRecommender(model, device), cases, protocol=VALIDATION_PROTOCOL)
    errors = layer_errors(model.cpu(), cases)
    worst_first = sorted(errors, key=lambda name: -errors[name])
    kept = 0
    while True:
        quantized = quantize_model(model, [*config.keep_fp, *worst_first[:kept]])
        gate = _gate(before, evaluate(TorchRecommender(quantized, device), cases, protocol=VALIDATION_PROTOCOL), config)
        if gate.passed:
            return quantized, gate
        kept = max(1, 2 * kept)
        if not config.auto_keep or kept >= len(worst_first):
            raise CheckError(
                f"8 bits cost too much: {gate.to_text()}. Largest 8-bit errors: {', '.join(worst_first[:3])}",
                remedy=f"--auto-keep, --keep-fp {worst_first[0]}, or a lower --accuracy-gate",
            )


def _gate(before: Accuracy, after: Accuracy, config: QuantizeConfig) -> Gate:
    ratio = ratio_of_means(after.user_ndcg_10, before.user_ndcg_10)
    return Gate(
        ratio=ratio.estimate,
        low=ratio.low,
        high=ratio.high,
        required=config.accuracy_gate,
        num_users=after.num_users,
        ndcg_before=before.metrics["ndcg@10"].estimate,
        ndcg_after=after.metrics["ndcg@10"].estimate,
    )
