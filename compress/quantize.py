"""quantize: int8 weights per output channel, int8 activations per token, behind an accuracy gate."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress.calibrate import some_cases
from compress.int8 import decoder_linears, load_full_precision, prepare, quantize_model, require_matches
from compress.sensitivity import accuracy_of, sensitivity
from slmrec.artifact import GATE_FILE, Artifact, is_up_to_date, open_artifact, publish, write_json
from slmrec.compress_config import QuantizeConfig
from slmrec.config import settings_of
from slmrec.dataset import Dataset, stage_on
from slmrec.errors import CheckError
from slmrec.gate import Gate, gate_of
from slmrec.locks import one_run_at_a_time
from slmrec.models.checkpoint import save_checkpoint
from slmrec.models.decoder import DecoderModel
from slmrec.models.layers import Int8Linear
from slmrec.models.llm_int8 import llm_int8
from slmrec.sequences import Cases, validation_cases

CALIBRATION_FILE = "calibration.json"
GATE_USERS_FOR_LAYERS = 500
"""Validation users that each layer's sensitivity is measured on where the gate does not hold."""


@one_run_at_a_time
def quantize(
    parent: Artifact, data: Dataset, output: Path, config: QuantizeConfig, *, device: str = "auto", force: bool = False
) -> tuple[Artifact, bool]:
    """Quantize a decoder checkpoint; nothing is written unless the gate holds.

    Raises:
        CheckError: the 8-bit model ranks worse than the gate allows; the most sensitive layers are named.
    """
    settings = settings_of(config)
    if config.backend != "neutral":
        settings["calibration"] = {"seed": config.calibration.seed}  # which users layers are judged by
    stage = stage_on(data, parent, "quantize", "checkpoint", settings)
    if is_up_to_date(output, stage, force=force):
        return open_artifact(output), True
    model = load_full_precision(parent)
    require_matches(model, config.keep_fp)
    cases = validation_cases(data.sequences)
    prepared = prepare(model, cases, config.calibration, device) if config.backend == "neutral" else None
    quantized, gate = _search(prepared.model if prepared else model.eval(), cases, config, device)
    with publish(output, stage) as folder:
        save_checkpoint(folder, quantized.cpu())
        if prepared is not None:
            write_json(folder / CALIBRATION_FILE, prepared.to_json())
        write_json(folder / GATE_FILE, gate.to_json() | {"kept_fp": decoder_linears(quantized)})
        data.items.save(folder)
    return open_artifact(output), False


def read_gate(artifact: Artifact) -> tuple[dict[str, Any], str]:
    """How an 8-bit checkpoint passed its gate: the record, and a line for people."""
    record = json.loads((artifact.path / GATE_FILE).read_text(encoding="utf-8"))
    fields = {name: record[name] for name in Gate.__dataclass_fields__}
    fields |= {name: float("inf") for name in ("low", "high") if fields[name] is None}  # where few users hit at all
    kept = f"; fp32: {', '.join(record['kept_fp'])}" if record["kept_fp"] else ""
    return record, Gate(**fields).to_text() + kept


def fewest(holds: Callable[[int], bool], most: int) -> int | None:
    """Smallest count from 1 to `most` that holds, if more of what holds holds too: doubled until it does, then halved.

    The last count that is found to hold is the one given.

    >>> fewest(lambda count: count >= 5, 13), fewest(lambda count: False, 13), fewest(lambda count: True, 0)
    (5, None, None)
    """
    failed, count = 0, min(1, most)
    while count > failed and not holds(count):
        failed, count = count, min(2 * count, most)
    if count == failed:
        return None
    while count - failed > 1:
        middle = (failed + count) // 2
        if holds(middle):
            count = middle
        else:
            failed = middle
    return count


def _search(model: DecoderModel, cases: Cases, config: QuantizeConfig, device: str) -> tuple[DecoderModel, Gate]:
    """Quantize all but `keep_fp`; with `auto_keep`, keep ever more of the most sensitive layers."""
    make = llm_int8 if config.backend == "bitsandbytes" else Int8Linear.from_linear
    before = accuracy_of(model, cases, device)
    quantized = quantize_model(model, config.keep_fp, make)
    gate = gate_of(before, accuracy_of(quantized, cases, device), config.accuracy_gate)
    if gate.passed:
        return quantized, gate
    some = some_cases(cases, GATE_USERS_FOR_LAYERS, config.calibration.seed)
    open_to_choice = [name for name in decoder_linears(model) if name not in decoder_linears(quantized)]
    worst_first = [one.layer for one in sensitivity(model.cpu(), some, device, open_to_choice, make)]
    most = len(worst_first) - 1 if config.auto_keep else 0
    passed: tuple[DecoderModel, Gate] | None = None

    def holds(count: int) -> bool:
        nonlocal passed, gate
        smaller = quantize_model(model, [*config.keep_fp, *worst_first[:count]], make)
        gate = gate_of(before, accuracy_of(smaller, cases, device), config.accuracy_gate)
        if gate.passed:
            passed = smaller, gate
        return gate.passed

    fewest(holds, most)  # what passed last was the fewest
    if passed is not None:
        return passed
    even = f" (even with {most} of {most + 1} layers in fp32)" if most else ""
    raise CheckError(
        f"8 bits cost too much{even}: {gate.to_text()}. Most sensitive layers: {', '.join(worst_first[:3])}",
        remedy="a lower --accuracy-gate" if config.auto_keep
        else f"--auto-keep, --keep-fp {worst_first[0]}, or a lower --accuracy-gate",
    )  # fmt: skip
