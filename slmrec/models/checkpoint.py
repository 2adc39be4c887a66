"""Checkpoint folders: `config.json`, `model.safetensors`, `items.parquet`, and back to a model."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from slmrec.artifact import Artifact, Stage, open_artifact, publish, work_folder, write_json
from slmrec.catalogue import Catalogue
from slmrec.config import RecipeConfig, SasrecConfig, TrainConfig, WindowConfig
from slmrec.errors import ArtifactError
from slmrec.models.decoder import DecoderModel, DecoderSpec
from slmrec.models.layers import Int8Linear
from slmrec.models.ranking import TorchRecommender
from slmrec.models.sasrec import Sasrec
from slmrec.writing import save_tensors

CONFIG_FILE, WEIGHTS_FILE, TRAINING_FILE = "config.json", "model.safetensors", "training.jsonl"


def save_checkpoint(folder: Path, model: Sasrec | DecoderModel, training: list[dict[str, Any]] | None = None) -> None:
    """Write a model, and the curves of its training where there are any; the catalogue is saved apart."""
    write_json(folder / CONFIG_FILE, _to_json(model))
    save_tensors(folder / WEIGHTS_FILE, model.state_dict())
    if training:
        lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in training)
        (folder / TRAINING_FILE).write_text(lines, encoding="utf-8")


def publish_checkpoint(
    output: Path, stage: Stage, model: Sasrec | DecoderModel, training: list[dict[str, Any]], items: Catalogue
) -> Artifact:
    """Make a trained model an artefact, on the CPU, and remove what its training kept to be resumed."""
    work = work_folder(output)
    with publish(output, stage) as folder:
        save_checkpoint(folder, model.cpu(), training)
        items.save(folder)
    shutil.rmtree(work)
    return open_artifact(output)


def build_model(artifact: Artifact) -> Sasrec | DecoderModel:
    """The model of a checkpoint artefact with random weights: its shapes, as a plan needs them."""
    config = json.loads((artifact.path / CONFIG_FILE).read_text(encoding="utf-8"))
    model = _from_json(config)
    for name in config.get("quantization", {}).get("layers", []):
        replace_linear(model, name, Int8Linear.from_linear(linear_at(model, name)))
    return model


def load_model(artifact: Artifact) -> Sasrec | DecoderModel:
    """The model of a checkpoint artefact, on the CPU, in training mode."""
    model = build_model(artifact)
    model.load_state_dict(load_file(artifact.path / WEIGHTS_FILE))
    return model


def load_decoder(artifact: Artifact) -> DecoderModel:
    """The model of a checkpoint that has to be a decoder (a teacher or a student)."""
    return require_decoder(load_model(artifact), artifact)


def require_decoder(model: Sasrec | DecoderModel, artifact: Artifact) -> DecoderModel:
    """The model, unless it is of another kind than a decoder."""
    if not isinstance(model, DecoderModel):
        raise ArtifactError(
            f"{artifact.path} is a {artifact.stage} checkpoint without a decoder",
            remedy="a teacher or student (-m/--model)",
        )
    return model


def load_checkpoint(artifact: Artifact, device: str = "auto") -> TorchRecommender:
    """The model of a checkpoint artefact as a recommender."""
    return TorchRecommender(load_model(artifact), device)


def quantized_layers(model: nn.Module) -> list[str]:
    """Names of the 8-bit layers, in the model's order."""
    return [name for name, module in model.named_modules() if isinstance(module, Int8Linear)]


def linear_at(model: nn.Module, name: str) -> nn.Linear:
    """The linear layer of that name."""
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def replace_linear(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put another layer in place of the one named."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)


def _to_json(model: Sasrec | DecoderModel) -> dict[str, Any]:
    if isinstance(model, Sasrec):
        return {"architecture": "sasrec", "num_items": model.num_items, "sasrec": asdict(model.config)}
    config: dict[str, Any] = {"architecture": "decoder", "spec": asdict(model.spec)}
    layers = quantized_layers(model)
    if layers:
        config["quantization"] = {
            "bits": 8, "weights": "int8 symmetric per output channel",
            "activations": "int8 symmetric per token, dynamic", "layers": layers,
        }  # fmt: skip
    return config


def _from_json(config: Mapping[str, Any]) -> Sasrec | DecoderModel:
    if config["architecture"] == "sasrec":
        settings = dict(config["sasrec"])
        settings["window"] = WindowConfig(**settings["window"])
        settings["train"] = TrainConfig(**settings["train"])
        return Sasrec(SasrecConfig(**settings), config["num_items"])
    spec = dict(config["spec"])
    spec["recipe"] = RecipeConfig(**spec["recipe"])
    spec["masked_ids"] = tuple(spec.get("masked_ids", ()))  # written since teachers can be imported
    return DecoderModel(DecoderSpec(**spec))
